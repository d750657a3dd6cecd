"""Where a plugin is tried: small runs of tiny models in this process, what came of them, and their results read again.

A run that was made is not made twice: checks ask for what they need, and share it.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from sft.certify import tiny
from sft.certify.subject import Subject, other_values, wishes
from sft.conformance import forward
from sft.context import Run, Summary
from sft.errors import UsageError
from sft.fine_tune import run as fine_tune
from sft.inference.export import export
from sft.inference.merge import merge
from sft.inference.open import load_for_inference
from sft.plugins.discovery import import_plugin, installed
from sft.plugins.files import name_of
from sft.plugins.marks import hookimpl, implements
from sft.plugins.registry import Plugin
from sft.plugins.trial import trial_of
from sft.seams import Batch
from sft.settings.arguments import core_options
from sft.tensor_files import read_tensors

SHOWN = np.array([3, 5, 7, 9, 11, 13, 2, 4, 17, 19, 23, 29])
Started = Callable[[Run], Any]


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        folder: The run's own.
        steps: What ``sft_step_ended`` was told of each step.
        evaluations: What ``sft_evaluated`` was told.
        logits: Of the model at the end, by the core's own attention; float32 [1, S, V].
        started: What the caller's function gave of the run before its first step.
        said: The lines that the run told.
        printed: What was written past them.
        ended_early: Whether a plugin asked the run to end.
    """

    folder: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    logits: Any = None
    started: Any = None
    said: list[str] = field(default_factory=list)
    printed: str = ""
    ended_early: bool = False

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.steps]

    @property
    def minimised(self) -> list[float]:
        """What the run minimises, of each evaluation: its objective, or cross-entropy."""
        return [record.get("eval_objective", record["eval_loss"]) for record in self.evaluations]

    def files(self) -> dict[str, str]:
        """A digest of each file of the result: weights, and what says how to read them."""
        names = ("adapter_config.json", "config.json")
        own = [path for path in self.folder.iterdir() if path.suffix == ".safetensors" or path.name in names]
        return digests(self.folder, own)

    def numbers(self) -> tuple[list[float], list[dict[str, Any]], dict[str, bytes]]:
        """What was learned, without what was only written down: losses, evaluations, the result's tensors."""
        tensors = [item for path in self.folder.glob("*.safetensors") for item in read_tensors(path).items()]
        return self.losses, self.evaluations, {name: one.tobytes() for name, one in tensors}


class Lab:
    """The tiny models, the data, and the runs of one subject, in a folder that is its own."""

    def __init__(
        self, subject: Subject, work: Path, extra: Sequence[type] = (), others: Sequence[str] | None = None
    ) -> None:
        """``others`` are the plugins beside which the subject is tried; None: all that are installed."""
        self.subject, self.work, self.extra = subject, work, tuple(extra)
        self._others = list(installed() if others is None else others)
        self.data = tiny.write_data(work / "data")
        self._models: dict[str, Path] = {}
        self._runs: dict[str, Outcome] = {}
        self._count = 0
        self.tried: dict[str, str | None] = {}
        """What checks have to say of what several of them would try."""

    @property
    def others(self) -> list[str]:
        """The plugins beside which the subject is tried."""
        return [name for name in self._others if name not in self.subject.own]

    def instead(self) -> Lab:
        """Another lab, in which the subject is without the adapter that was arranged."""
        company = [name for name in self.subject.company if name not in self.subject.arranged]
        subject = replace(self.subject, company=company, arranged=[])
        return Lab(subject, self.place("instead"), self.extra, self._others)

    def place(self, what: str) -> Path:
        """A path for ``what`` where nothing is yet."""
        self._count += 1
        return self.work / f"{what}-{self._count}"

    @cached_property
    def varied(self) -> dict[str, Any]:
        """Another value for each option of the subject that can be guessed one, where a run takes them together."""
        found: dict[str, Any] = {}
        if self.subject.shares:  # whose options ask for processes
            return found
        for name, option in self.subject.options.items():
            for value in other_values(option, self.subject.tried):
                try:
                    self.run(**{**found, name: value})
                except UsageError:
                    continue
                found[name] = value
                break
        return found

    # --- runs -----------------------------------------------------------------------------------------------

    def model(self, family: str = "llama", **config: Any) -> Path:
        """The folder of a tiny model; ``config`` overrides keys of its ``config.json``."""
        key = json.dumps([family, config], sort_keys=True)
        if key not in self._models:
            self._models[key] = tiny.make(self.work / f"model-{len(self._models)}", family, **config)
        return self._models[key]

    def names(self, beside: Iterable[str] = (), without: bool = False) -> list[str]:
        """The plugins of a run: the subject, what it cannot be without, and ``beside``; ``without`` the subject."""
        return no_others([*(self.subject.company if without else self.subject.names), *beside])

    def settings(self, model: Path, names: Sequence[str], **more: Any) -> dict[str, Any]:
        """Those of a run of three steps with four rows each."""
        values: dict[str, Any] = {
            "plugin": list(names),
            "model_name_or_path": str(model),
            "dataset_name_or_path": str(self.data),
            "output_dir": str(self.place("run")),
            "max_length": 64,
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        return {**values, **self.needed(names), **more}

    def needed(self, names: Iterable[str]) -> dict[str, Any]:
        """The settings without which ``names`` could not be tried, as they say themselves, and a data set of
        the records that they read; the subject has the last word."""
        found: dict[str, Any] = {}
        for name in reversed([*names]):
            if name != self.subject.request and name not in installed():
                continue
            trial = trial_of(self.subject.plugin if name == self.subject.request else import_plugin(name))
            found.update(trial.settings)
            if trial.records:
                folder = self.work / f"records of {Path(name).stem}"
                if not folder.exists():
                    tiny.write_data(folder, trial.records)
                found["dataset_name_or_path"] = str(folder)
        return found

    def needed_of_core(self, names: Iterable[str]) -> dict[str, Any]:
        """Of the settings that ``names`` need, those that a run without them has too."""
        return {name: value for name, value in self.needed(names).items() if name in core_options()}

    def run(
        self,
        beside: Sequence[str] = (),
        *,
        without: bool = False,
        model: Path | None = None,
        started: Started | None = None,
        also: Sequence[type] = (),
        fresh: bool = False,
        **settings: Any,
    ) -> Outcome:
        """A run of the subject and what is ``beside`` it, or ``without`` the subject; ``started`` is called before the
        first step, and ``also`` are classes of plugins that watch. The same run is not made twice, unless ``fresh``.
        """
        model = model or self.model()
        names = self.names(beside, without)
        if without:  # what of its settings is the core's is that of both
            settings = {**self.needed_of_core([self.subject.request]), **settings}
        key = json.dumps([names, str(model), settings], sort_keys=True, default=str)
        cached = not fresh and started is None and not also
        if cached and key in self._runs:
            return self._runs[key]
        values = self.settings(model, names, **settings)
        outcome = Outcome(Path(values["output_dir"]))
        given = [one for one in self.extra if not (without and name_of(one) == self.subject.name)]
        self._disturb()
        shown = io.StringIO()
        with redirect_stdout(shown), redirect_stderr(shown), mock.patch.object(warnings, "showwarning", _unheard):
            fine_tune(values, plugins=[*given, *also, _watch(outcome, started)], say=outcome.said.append)
        outcome.printed = shown.getvalue()
        if cached:
            self._runs[key] = outcome
        return outcome

    def _disturb(self) -> None:
        """Whoever draws from a generator that all share draws something else each time."""
        import paddle

        random.seed(self._count)
        np.random.seed(self._count)
        paddle.seed(self._count)

    def resumed(self, whole: Outcome, step: int, beside: Sequence[str] = (), **settings: Any) -> Outcome:
        """The run of ``whole`` gone on with from its checkpoint of ``step``, in another folder."""
        place = str(whole.folder / f"checkpoint-{step}")
        return self.run(beside, fresh=True, resume_from_checkpoint=place, **settings)

    # --- results --------------------------------------------------------------------------------------------

    def reloaded(self, outcome: Outcome, model: Path | None = None) -> Any:
        """float32 logits [1, S, V] of the result of a run, read from its files."""
        model = model or self.model()
        if (outcome.folder / "adapter_config.json").is_file():
            return logits_of(load_for_inference(str(model), outcome.folder, quiet, self.reading())[0])
        return logits_of(load_for_inference(str(outcome.folder), None, quiet, no_others())[0])

    def reading(self) -> list[str]:
        """The plugins that are named where a result is read: an adapter's files know the others."""
        return no_others(self.subject.files)

    def merged(self, outcome: Outcome, model: Path | None = None) -> Any:
        """float32 logits [1, S, V] of the base with the adapter of a run folded in."""
        folder = self.place("merged")
        merge(str(model or self.model()), outcome.folder, folder, quiet, self.subject.files)
        return logits_of(load_for_inference(str(folder), None, quiet, no_others())[0])

    def exported(self, outcome: Outcome, form: str, model: Path | None = None, **options: Any) -> dict[str, str]:
        """A digest of each file that `sft export --to FORM` writes of the result of a run."""
        adapter = outcome.folder if (outcome.folder / "adapter_config.json").is_file() else None
        base = outcome.folder if adapter is None else model or self.model()
        folder = self.place("exported")
        export(str(base), adapter, form, folder, quiet, self.subject.files, options=options)
        return digests(folder, folder.rglob("*"))

    def draws(self, beside: Sequence[str] = (), **settings: Any) -> bool:
        """Whether what is learned depends on what paddle's generator gives: dropout, noise."""

        class Reseed(Plugin):
            name = "certify-reseed"
            api_version = 1
            order = -1_000_000

            @hookimpl
            def sft_micro_batch(self, run: Run, batch: Batch) -> None:
                import paddle

                paddle.seed(987_654_321 + run.step)

        plain = self.run(beside, **settings)
        return self.run(beside, also=[Reseed], **settings).losses != plain.losses


def _unheard(*_: Any, **__: Any) -> None:
    """Warnings are those of libraries, and no line of the plugin's."""


def _watch(outcome: Outcome, started: Started | None) -> type:
    class Watch(Plugin):
        """Notes what a run tells."""

        name = "certify-watch"
        api_version = 1

        @hookimpl
        def sft_run_started(self, run: Run) -> None:
            if started is not None:
                outcome.started = started(run)

        @hookimpl
        def sft_step_ended(self, run: Run, record: dict[str, Any]) -> None:
            outcome.steps.append(record)

        @hookimpl
        def sft_evaluated(self, run: Run, record: dict[str, Any]) -> None:
            outcome.evaluations.append({key: value for key, value in record.items() if key != "eval_seconds"})

        @hookimpl
        def sft_run_ended(self, run: Run, summary: Summary) -> None:
            outcome.ended_early = summary.stopped_early is not None
            outcome.logits = logits_of(run.model)

    return Watch


def no_others(names: Iterable[str] = ()) -> list[str]:
    """What asks for ``names``, and leaves out the plugins that wish to be active on this device."""
    wanted = [*dict.fromkeys(names)]
    return [*wanted, *(f"no:{name}" for name in wishes() if name not in wanted)]


def digests(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Of each file among ``paths``, by where it is in ``folder``."""
    files = sorted(path for path in paths if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


def quiet(text: str) -> None:
    """Nothing is told."""


def provides(name: str, hook: str) -> bool:
    """Whether the installed plugin ``name`` implements ``hook``."""
    return name in installed() and implements(import_plugin(name), hook)


def logits_of(model: Any, as_it_trains: bool = False) -> np.ndarray:
    """float32 [1, S, V] by the core's own attention: others differ in the last bits. ``as_it_trains``: without leaving
    training mode."""
    from sft.models.attention import DefaultAttention

    mode, own = model.training, model.attention
    (model.train if as_it_trains else model.eval)()
    model.attention = DefaultAttention()
    try:
        return forward(model, SHOWN[None])
    finally:
        model.attention = own
        (model.train if mode else model.eval)()

"""Where a plugin is tried: small runs of tiny models in this process, what came of them, and their results read again.

A run that was made is not made twice: checks ask for what they need, and share it.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from sft.certify import tiny
from sft.certify.subject import Subject, other_values, wishes
from sft.conformance import forward
from sft.context import Run, Summary
from sft.errors import SftError, UsageError
from sft.fine_tune import run as fine_tune
from sft.inference.merge import merge
from sft.inference.open import load_for_inference
from sft.plugins.discovery import import_plugin, installed
from sft.plugins.marks import hookimpl, implements
from sft.plugins.registry import Plugin
from sft.seams import Batch
from sft.tensor_files import read_tensors

CLOSE = 1e-5
"""Two ways of computing the same logits in float32 are so near, as a share of the largest."""
NEAR = 1e-3
"""So near are losses after steps of training by two ways of computing the same gradients."""

SHOWN = np.array([3, 5, 7, 9, 11, 13, 2, 4, 17, 19, 23, 29])
Started = Callable[[Run], Any]


class FailedError(AssertionError):
    """What must hold does not: a sentence."""


class NotTriedError(Exception):
    """Why a case cannot be tried here: a sentence."""


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
    """

    folder: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    logits: Any = None
    started: Any = None
    said: list[str] = field(default_factory=list)
    printed: str = ""

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.steps]

    def files(self) -> dict[str, str]:
        """A digest of each file of the result: weights, and what says how to read them."""
        names = ("adapter_config.json", "config.json")
        found = [path for path in self.folder.iterdir() if path.suffix == ".safetensors" or path.name in names]
        return {path.name: hashlib.blake2b(path.read_bytes()).hexdigest() for path in sorted(found)}

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
        self.others = [name for name in (installed() if others is None else others) if name not in subject.own]
        self.data = tiny.write_data(work / "data")
        self._models: dict[str, Path] = {}
        self._runs: dict[str, Outcome] = {}
        self._count = 0
        self.tried: dict[str, str | None] = {}
        """What checks have to say of what several of them would try."""

    def place(self, what: str) -> Path:
        """A path for ``what`` where nothing is yet."""
        self._count += 1
        return self.work / f"{what}-{self._count}"

    @cached_property
    def varied(self) -> dict[str, Any]:
        """Another value for each option of the subject that can be guessed one, where a run takes them together."""
        found: dict[str, Any] = {}
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
        wanted = [*(self.subject.company if without else self.subject.names), *beside]
        return [*dict.fromkeys(wanted), *(f"no:{name}" for name in wishes() if name not in wanted)]

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
        """The settings without which the subject and ``names`` could not be tried, as they say themselves."""
        plugins = [import_plugin(name) for name in names if name in installed()]
        found: dict[str, Any] = {}
        for plugin in (*plugins, self.subject.plugin):
            found.update(getattr(plugin, "certify", {}))
        return found

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
        key = json.dumps([names, str(model), settings], sort_keys=True, default=str)
        cached = not fresh and started is None and not also
        if cached and key in self._runs:
            return self._runs[key]
        values = self.settings(model, names, **settings)
        outcome = Outcome(Path(values["output_dir"]))
        self._disturb()
        shown = io.StringIO()
        with redirect_stdout(shown), redirect_stderr(shown), mock.patch.object(warnings, "showwarning", _unheard):
            fine_tune(values, plugins=[*self.extra, *also, _watch(outcome, started)], say=outcome.said.append)
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
        return logits_of(load_for_inference(str(outcome.folder), None, quiet, without_wishes())[0])

    def reading(self) -> list[str]:
        """The plugins that are named where a result is read: an adapter's files know the others."""
        return [*self.subject.files, *without_wishes()]

    def merged(self, outcome: Outcome, model: Path | None = None) -> Any:
        """float32 logits [1, S, V] of the base with the adapter of a run folded in."""
        folder = self.place("merged")
        merge(str(model or self.model()), outcome.folder, folder, quiet, self.subject.files)
        return logits_of(load_for_inference(str(folder), None, quiet, without_wishes())[0])

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
            outcome.logits = logits_of(run.model)

    return Watch


def without_wishes() -> list[str]:
    """What leaves out the plugins that wish to be active on this device."""
    return [f"no:{name}" for name in wishes()]


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


def same(found: Mapping[str, Any] | Sequence[Any], expected: Any, what: str) -> None:
    """Both to the last bit."""
    if found != expected:
        raise FailedError(f"{what}: {_first_difference(found, expected)}")


def close(found: Any, expected: Any, what: str, tolerance: float = CLOSE) -> None:
    """Arrays or lists of numbers, as near as ``tolerance`` times the largest."""
    one, other = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if one.shape != other.shape:
        raise FailedError(f"{what}: {one.shape} where {other.shape} is expected")
    if not np.isfinite(one).all():
        raise FailedError(f"{what}: not finite")
    off, largest = float(np.abs(one - other).max(initial=0.0)), float(np.abs(other).max(initial=0.0))
    if off > tolerance * largest:
        raise FailedError(f"{what}: {off:.2e} apart, where the largest value is {largest:.2e}")


def refused(action: Callable[[], Any], what: str) -> str:
    """The one sentence in which ``action`` is refused."""
    try:
        action()
    except SftError as error:
        return str(error)
    except Exception as error:
        raise FailedError(f"{what} is no error in a sentence but a {type(error).__name__}: {error}") from error
    raise FailedError(f"{what} is accepted")


def _first_difference(found: Any, expected: Any) -> str:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        keys = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
        return f"{keys[0]} differs"
    for number, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            return f"at place {number}, {_short(one)} where {_short(other)} is expected"
    return f"{len(found)} where {len(expected)} are expected"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "…"

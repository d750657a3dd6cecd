"""The folder of a run, opened to compute steps of it again: what it wrote down, its checkpoints, and its settings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sft.errors import UsageError
from sft.fine_tune import prepare_run
from sft.settings.again import ITS_OWN, check_data_is_there, report_of, settings_again
from sft.training.checkpoint_folder import checkpoints, is_auto, is_checkpoint, read_state, step_of
from sft.training.journal import read_metrics
from sft.training.resume_checks import changed_settings
from sft.training.steps_file import HEAD, SIZE, StepFigures, read_steps
from sft.training.steps_file import NAME as STEPS

if TYPE_CHECKING:
    from sft.context import CoreRun

PLACES = ("model_name_or_path", "tokenizer_name_or_path", "dataset_name_or_path")
"""Settings that say where something is; it may have moved."""
_NOWHERE: Mapping[str, str | None] = MappingProxyType({})


@dataclass(frozen=True)
class Leg:
    """A stretch of a run that was computed with the same settings and the same arithmetic."""

    after: int
    """The step after which it begins."""
    settings: dict[str, Any]
    arithmetic: dict[str, Any] | None
    """None where an earlier version of sft did not write it down."""


@dataclass(frozen=True)
class OpenedRun:
    """A run whose folder holds this ``run.json``. ``moved`` are settings that say where its model and data are now."""

    folder: Path
    record: dict[str, Any]
    figures: StepFigures | None
    moved: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path, moved: Mapping[str, str | None] = _NOWHERE) -> OpenedRun:
        """Raises :class:`UsageError` where ``folder`` holds no run that trains."""
        record = report_of(folder)
        if record["settings"].get("do_train") is False:
            raise UsageError(f"{folder} holds a run that only measured (do_train false); there is no step to replay.")
        places = {name: place for name, place in moved.items() if place is not None}
        return cls(folder, record, read_steps(folder), places)

    # --- steps ----------------------------------------------------------------------------------------------

    def check(self, steps: Iterable[int]) -> None:
        """Refuse steps that the run has not computed, as far as that is known before its data are read."""
        last = None if self.figures is None else len(self.figures)
        for step in steps:
            if step >= 1 and (last is None or step <= last):
                continue
            if step >= 1 and self.cut is not None:
                raise UsageError(
                    f"{self.cut}, step {step:,} not among them; put the file back as it was, or move it away to replay "
                    "without what it says."
                )
            has = "numbers its steps from 1" if last is None else f"has computed steps 1 to {last:,}"
            so_far = " so far" if last is not None and self.record.get("status") == "running" else ""
            raise UsageError(f"{self.folder} {has}{so_far}, and step {step:,} is none of them; give one that is.")

    @cached_property
    def cut(self) -> str | None:
        """A clause that says where the file of figures has been cut off, if it has fewer steps than the run has
        computed by all else that is in its folder."""
        if self.figures is None:
            return None
        result, path = self.record.get("result"), self.folder / STEPS
        steps = [step_of(one) for one in checkpoints(self.folder) if is_checkpoint(one)]
        if isinstance(result, dict):
            steps.append(int(result.get("steps", 0)))
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            steps += [int(line["step"]) for line in read_metrics(self.folder)]
        computed = max(steps, default=0)
        size = path.stat().st_size  # after all else: the run may be under way, and writes here first
        has = max(len(self.figures), (size - len(HEAD)) // SIZE)
        if has >= computed:
            return None
        return (
            f"{path} has been cut off at byte {size:,}: the run has computed {computed:,} steps, and it has the "
            f"figures of the first {has:,} only"
        )

    def recorded(self, step: int) -> tuple[float, float] | None:
        """Loss and gradient norm of a step as the run wrote them down."""
        figures = self.figures
        if figures is None or step > len(figures) or not figures.known[step - 1]:
            return None
        return float(figures.loss[step - 1]), float(figures.grad_norm[step - 1])

    def required_figures(self) -> StepFigures:
        """Raises :class:`UsageError` where there are none."""
        if self.figures is not None and not self.figures.taken.any() and self.cut is not None:
            raise UsageError(f"{self.cut}; name a step yourself with sft replay --step N, once it is moved away.")
        if self.figures is None or not self.figures.taken.any():
            raise UsageError(
                f"{self.folder} has no {STEPS} with the figures of its steps, which earlier versions of sft did not "
                "write; name a step yourself with sft replay --step N."
            )
        return self.figures

    def leg(self, step: int) -> Leg:
        """The stretch in which a step was computed."""
        after, record = 0, self.record
        for one in record.get("earlier", []):
            if step <= one["until"]:
                return Leg(after, one["settings"], one["arithmetic"])
            after = one["until"]
        return Leg(after, record["settings"], record.get("arithmetic"))

    @cached_property
    def starts(self) -> dict[int, Path]:
        """The checkpoints from which steps can be computed, by their step: the run's own, and one of another folder
        from which it went on."""
        found = {step_of(path): path for path in checkpoints(self.folder)}
        for settings in (self.record["settings"], *(one["settings"] for one in self.record.get("earlier", []))):
            named = settings.get("resume_from_checkpoint")
            path = Path(str(named)).expanduser()
            if named and not is_auto(named) and is_checkpoint(path):
                found.setdefault(int(read_state(path)["step"]), path)
        return found

    # --- the run, prepared again ------------------------------------------------------------------------------

    def prepared(
        self, leg: Leg, start: Path | None, output_dir: Path, say: Callable[[str], None]
    ) -> tuple[CoreRun, list[str]]:
        """The run as it was in a ``leg``, about to be read and set up: from the checkpoint ``start`` on, or from its
        beginning, in another folder; and settings that are not what they were. What it measures, saves and logs is left
        out, unless what is learned hears of it.
        """
        check_data_is_there(self.folder, leg.settings, self.moved)
        values = {**settings_again(self.record, written=leg.settings), **self.moved, "output_dir": str(output_dir)}
        rows = self._rows_per_step(leg)
        if rows is not None:
            values["gradient_accumulation_steps"] = rows // leg.settings["per_device_train_batch_size"]
        if start is not None:
            values["resume_from_checkpoint"] = str(start)
        run = prepare_run(values, (), say)
        run.say = say  # whatever the run itself was to say
        run.without_effect = []  # the run itself has said it
        run.date = datetime.fromisoformat(self.record.get("date") or self.record["started"]).replace(tzinfo=None)
        changed = _changed(run, leg)
        _leave_out_measuring(run)
        return run, changed

    def _rows_per_step(self, leg: Leg) -> int | None:
        """The rows that all processes of the run had together in each step; None where it had one process alone, which
        its settings describe."""
        said = self.record.get("schedule", {}).get("rows_per_step")
        states = (read_state(path) for path in self.starts.values())
        found = said or next((state["data"]["rows_per_step"] for state in states), None)
        if found is None and self.processes(leg) > 1:
            raise UsageError(
                f"{self.folder} does not say how many rows its processes had in a step, as an earlier version of sft "
                "wrote it, and has no checkpoint that does; it cannot be replayed."
            )
        return None if found is None else int(found)

    def processes(self, leg: Leg) -> int:
        """How many processes shared the run."""
        return int((leg.arithmetic or {}).get("processes", 1))


def _changed(run: CoreRun, leg: Leg) -> list[str]:
    """Settings of ``run`` that are not what the ``leg`` had, though nothing that is computed is left out yet."""
    now = run.settings.written()
    return [
        f"{name} {was!r} (now {now[name]!r})"
        for name, (was, _) in changed_settings(run, leg.settings).items()
        if name in now and name not in (*PLACES, *ITS_OWN, "plugin", "gradient_accumulation_steps")
    ]


def _leave_out_measuring(run: CoreRun) -> None:
    """Nothing is evaluated, answered or saved, for none of it changes what is learned; but where a plugin that shapes
    that hears of evaluations, they are made."""
    settings = run.settings
    settings.training.save_strategy, settings.training.load_best_model_at_end = "no", False
    settings.generation.num_samples, settings.data.eval_with_do_generation = 0, False
    if not {*run.plugins.shaping()} & {*run.plugins.implementing("sft_evaluated")}:
        settings.training.evaluation_strategy, settings.training.do_eval = "no", False

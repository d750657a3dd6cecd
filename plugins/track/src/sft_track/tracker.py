"""What all trackers share: when a log is opened and closed, what goes into it, and under which names."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import sft

if TYPE_CHECKING:
    from pathlib import Path

    from sft import Run, Summary


class Tracker(sft.Plugin, ABC):
    """Logs each line of ``metrics.jsonl``, from the main process alone. A subclass writes, by its library.

    Attributes:
        library: The module that is imported when the log is opened, and not before.
        failed: Whether the log could not be opened; nobody tries again, for that may take minutes each time.
    """

    library: ClassVar[str]
    observes = True

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._is_open = self.failed = False
        self._earlier: str | None = None
        self._after = 0
        self._id = ""

    # --- what a subclass does -------------------------------------------------------------------------------

    @abstractmethod
    def begin(self, run: Run, earlier: str | None, after: int) -> str:
        """Open the log. ``earlier`` is what this returned in the run that is resumed after step ``after``; None where a
        new one begins. Returns what finds it again."""

    @abstractmethod
    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Log the ``numbers`` of ``step``."""

    @abstractmethod
    def end(self, status: str, summary: dict[str, Any]) -> None:
        """Close the log; ``status`` is finished, failed or interrupted, ``summary`` what came of a finished run."""

    # --- when -----------------------------------------------------------------------------------------------

    @sft.hookimpl
    def sft_check(self, run: Run) -> None:
        if importlib.util.find_spec(self.library) is not None:
            return
        cure = f'pip install "sft-track[{self.name}]"'
        asked = [str(name).lower() for name in run.given.get("plugin", [])]
        if self.name in (*run.settings.training.report_to, *asked):
            raise sft.UsageError(f"{self.name} needs {self.library}, which is not installed; {cure}, or leave it out.")
        run.say(f"note: report_to all leaves out {self.name}, for its library is not installed ({cure})")
        self.failed = True

    @sft.hookimpl
    def sft_restore(self, run: Run, state: dict[str, Any], why: str, step: int) -> None:
        if why == "resume" and state["id"]:
            self._earlier, self._after = state["id"], step

    @sft.hookimpl
    def sft_run_started(self, run: Run) -> None:
        self._open(run)

    @sft.hookimpl
    def sft_logged(self, run: Run, record: dict[str, Any]) -> None:
        if self._open(run):
            self.write(record["step"], dict(numbers_of(record)))

    @sft.hookimpl
    def sft_state(self, run: Run) -> dict[str, Any]:
        return {"id": self._id}

    @sft.hookimpl
    def sft_run_ended(self, run: Run, summary: Summary) -> None:
        if self._open(run):
            self._is_open = False
            self.end("finished", summary.as_dict())

    @sft.hookimpl
    def sft_run_failed(self, run: Run, error: BaseException) -> None:
        if self._is_open:
            self._is_open = False
            self.end("interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed", {})

    def _open(self, run: Run) -> bool:
        """Whether the log is open, which it is from the first call on; of several processes in the main one alone."""
        if self._is_open or self.failed or not run.strategy.is_main:
            return self._is_open
        self.failed = True  # until it is open
        self._id = self.begin(run, self._earlier, self._after)
        self._is_open, self.failed = True, False
        return True


def name_of(run: Run) -> str:
    """What the run is called."""
    return run.settings.training.run_name or run.output_dir.resolve().name


def numbers_of(record: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line by what trackers call them: ``train/loss``, ``eval/loss``, of one of several dev sets
    ``eval/NAME/loss``, and a plugin's own as it is, ``NAME/key``."""
    kind = "eval" if "eval_loss" in record else "train"
    for key, value in record.items():
        if isinstance(value, Mapping):  # eval_sets
            for name, one in value.items():
                yield from numbers_of(one, f"{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
            own = key.removeprefix("eval_")
            yield (key if "/" in key else f"{kind}/{within}{own}"), float(value)


def folder_in(parent: Path, earlier: str | None) -> Path:
    """The folder in ``parent`` that a log goes into: the one that is called ``earlier``, or one that is not there yet,
    called after the moment. A run that replaces another has a curve of its own."""
    from datetime import datetime

    if earlier is not None:
        return parent / earlier
    moment = datetime.now().strftime("%Y%m%d-%H%M%S")
    names = (f"{moment}{f'-{number}' if number else ''}" for number in range(1000))
    return next(parent / name for name in names if not (parent / name).exists())

"""What the board knows of runs: each is read anew when its folder has changed, and never for a large share of the time,
since the run itself may need this machine."""

from __future__ import annotations

import itertools
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import sft
from sft_ui_board.folders import runs_in, strange_file
from sft_ui_board.orders import asked

SHARE = 20.0
"""A run whose reading takes a second is read again after so many."""
LOOK_EVERY = 5.0
"""Seconds between two searches of RUNS_DIR for runs."""
PATIENCE = 1.0
"""Seconds of one answer in which runs are read for the first time; the others come with the next ones."""
RECENT = 20
"""Logged steps by which the time that is left is told."""
LOG_BYTES, LOG_LINES = 65_536, 300
"""Of the end of a run's log."""
_SENT = (
    "name status error started step total_steps seconds result settings changed plugins packages "
    "machine skipped_steps trained total moments curves answers checkpoints"
).split()
"""What of a :class:`sft.RunReport` the page shows."""

_GROW = ("metrics.jsonl", "steps.bin")
"""Files of a run that tell how far it is."""

_READS = itertools.count(1)


class Unknown(sft.UsageError):
    """Of a run that is not there."""


@dataclass
class Watched:
    """A run that is followed."""

    folder: Path
    report: sft.RunReport | None = None
    fault: str | None = None
    """Why it cannot be read."""
    reads: int = 0
    """Which reading this is, of all of them; 0 before the first."""
    holder: sft.Holder | None = None
    """The process that writes there now."""
    _state: Any = None
    _due: float = 0.0

    def look(self, root: Path) -> None:
        """Read it, if it has changed. While a process writes there, that is not done again before its time has come."""
        self.holder = sft.holder_of(self.folder)
        now, state = time.monotonic(), self._changes()  # later, so that a run that has ended is read as it ended
        if state == self._state or (now < self._due and self.holder is not None):
            return
        self._read(root)
        self.holder = sft.holder_of(self.folder) or self.holder
        self._state, self._due = state, now + SHARE * (time.monotonic() - now)

    def _read(self, root: Path) -> None:
        """What goes wrong is the ``fault`` of this run, and none of the others."""
        self.reads = next(_READS)
        try:
            strange = strange_file(self.folder, root)
            if strange is not None:
                self.report = None
                raise sft.UsageError(f"{strange} in it leads out of RUNS_DIR, or is no plain file; it is not read.")
            self.report, self.fault = sft.read_run(self.folder), None
        except Exception as error:
            self.fault = sft.safe(str(error) or type(error).__name__)

    @property
    def status(self) -> str:
        """What the run is now: a run that goes on may end without a word in any file."""
        if self.report is None:
            return "unreadable" if self.fault else "unread"
        if self.report.status in ("running", "died"):
            return "running" if self.holder is not None else "died"
        return self.report.status

    @property
    def left(self) -> float | None:
        """Seconds until its last step."""
        if self.report is None or self.holder is None:
            return None
        return seconds_left(self.report, _age(self.folder))

    def _changes(self) -> Any:
        """What changes with the run: its steps, lines of metrics.jsonl, and files that come and go."""
        return tuple(_state_of(self.folder / name) for name in ("", *_GROW, "run.json"))


@dataclass
class Watch:
    """The runs below ``root``."""

    root: Path
    runs: dict[str, Watched] = field(default_factory=dict)
    _due: float = 0.0

    def look(self) -> None:
        """Find runs that have come or gone."""
        began = time.monotonic()
        if began >= self._due:
            found = runs_in(self.root)
            self.runs = {name: self.runs.get(name) or Watched(folder) for name, folder in found.items()}
            self._due = began + max(LOOK_EVERY, SHARE * (time.monotonic() - began))

    def lines(self) -> list[dict[str, Any]]:
        """Each run in a line."""
        self.look()
        began, found = time.monotonic(), []
        for name, run in self.runs.items():
            if run.reads or time.monotonic() - began < PATIENCE:
                run.look(self.root)
            found.append({"id": name, **_line(run)})
        return found

    def named(self, name: str) -> Watched:
        """The run that a request names: looked up among those that were found, for no text of a request is a path."""
        self.look()
        if name not in self.runs:
            raise Unknown(f"There is no run {sft.shown(name)} in {self.root} any more.")
        return self.runs[name]

    def run(self, name: str, seen: str = "", log_seen: str = "") -> dict[str, Any]:
        """One run. Its account and its log are left out where the page has ``seen`` them as they are."""
        run = self.named(name)
        run.look(self.root)
        found: dict[str, Any] = {"id": name, "status": run.status, "fault": run.fault, "seen": f"{run.reads}"}
        if run.report is None:
            return found
        holder = run.holder
        found |= {
            "asked": asked(run.folder, run.report.started) if holder is not None else [],
            "holder": f"process {holder.pid} on {holder.host}" if holder is not None else None,
            "left": run.left,
            "loss": _line(run)["loss"],
            "memory": memory_of(holder),
            "log_seen": _log_state(run.folder),
        }
        if seen != found["seen"]:
            whole = run.report.as_json()
            found["report"] = {key: whole[key] for key in _SENT}
        if log_seen != found["log_seen"]:
            found["log"] = log_of(run.folder)
        return found


def _line(run: Watched) -> dict[str, Any]:
    report = run.report
    if report is None:
        return {"status": run.status}
    loss = report.latest_loss
    return {
        "name": report.name,
        "status": run.status,
        "step": report.step,
        "total_steps": report.total_steps,
        "loss": loss.values[-1] if loss is not None else None,
        "left": run.left,
    }


def seconds_left(report: sft.RunReport, age: float) -> float | None:
    """Seconds until the last step, ``age`` seconds after the last one that was made: by the speed of the last lines,
    evaluations between them included, and of the steps since. None where that is not known."""
    at = report.moments
    if report.total_steps is None or not at.steps:
        return None
    first = max(0, len(at.steps) - 1 - RECENT)
    steps, seconds = at.steps[-1] - at.steps[first], at.seconds[-1] - at.seconds[first]
    if not steps:
        steps, seconds = at.steps[-1], at.seconds[-1]
    measured = [one for one in report.evaluations if at.steps[first] < one["step"] <= at.steps[-1]]
    seconds += sum(one["eval_seconds"] for one in measured if isinstance(one.get("eval_seconds"), float))
    steps += report.step - max([at.steps[-1], *(one["step"] for one in report.evaluations)])
    seconds += max(0.0, report.seconds - at.seconds[-1])
    return max(0.0, seconds / steps * (report.total_steps - report.step) - age)


def memory_of(holder: sft.Holder | None) -> int | None:
    """Bytes that the process of a run and those that it has started hold; None where that is another machine's."""
    if holder is None or holder.pid is None or not holder.is_here:
        return None
    try:
        process = psutil.Process(holder.pid)
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
    except psutil.Error:  # it has ended meanwhile
        return None


def machine() -> dict[str, int]:
    """The memory of this machine, in bytes."""
    memory = psutil.virtual_memory()
    return {"total": memory.total, "used": memory.total - memory.available}


def log_of(folder: Path) -> list[str]:
    """The last lines of what a run has said; of one that began before there was a log, none."""
    try:
        # The folder may have changed since it was looked through: neither a link nor a pipe is followed.
        handle = os.open(folder / "sft.log", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                return []
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_BYTES))
            text = file.read(LOG_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return []
    lines = text.splitlines()
    return lines[1 if size > LOG_BYTES else 0 :][-LOG_LINES:]


def _log_state(folder: Path) -> str:
    return "-".join(str(part) for part in _state_of(folder / "sft.log") or ())


def _age(folder: Path) -> float:
    """Seconds since the last step."""
    times = [state[2] for name in _GROW if (state := _state_of(folder / name)) is not None]
    return max(0.0, time.time() - max(times) / 1e9) if times else 0.0


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def harmless(value: Any) -> Any:
    """``value``, JSON, with each text in it as it may be shown: no code that turns lines round, no secrets."""
    if isinstance(value, str):
        return sft.safe(value)
    if isinstance(value, Mapping):
        return {sft.safe(str(key)): harmless(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [harmless(one) for one in value]
    return value

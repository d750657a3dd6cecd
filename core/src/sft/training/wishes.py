"""What a run is asked while it trains: by hooks (``run.control``), by files in its folder, by signals.

The processes of a run may be asked different things. They agree by one ``largest`` a step, which says whether anybody
has been asked anything; only then do they ask each other what.
"""

from __future__ import annotations

import contextlib
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from sft.control import EVALUATE, SAVE, STOP
from sft.foreign_text import shown

if TYPE_CHECKING:
    from sft.context import CoreRun

_ASKED = 0.5
"""What a process says that has been asked something, and has heard no signal: less than any signal's number."""
_LONGEST = 200
"""Characters of the reason that a file gives."""

Mark = tuple[int, int, int] | None


class Wishes:
    """What all processes of ``run`` have agreed on, and not done yet.

    Attributes:
        stops: Why the run is to end now, as after its last step; None where it is not.
        saves: Whether a checkpoint is to be written.
        evaluates: Whether the dev data is to be measured.
        signal: The signal that ends the run; 0 where there is none.
    """

    def __init__(self, run: CoreRun) -> None:
        self._run = run
        self.stops: str | None = None
        self.saves = self.evaluates = False
        self.signal = 0
        self._files = _Files(run) if run.strategy.is_main else None
        self._told_of_no_data = False

    def hear(self) -> None:
        """Ask what has come since the last call. All processes take part, and know the same afterwards."""
        run = self._run
        if self._files is not None:
            self._files.look()
        asked = run.control.taken()
        found = run.strategy.largest(max(float(run.stop.asked), _ASKED if asked else 0.0))
        self.signal = int(found)
        if not found:
            return
        stops, saves, evaluates = (bool(run.strategy.largest(float(kind in asked))) for kind in (STOP, SAVE, EVALUATE))
        if stops and self.stops is None:
            self.stops = asked.get(STOP, "another process of the run has asked for it")
        self.saves |= saves
        self.evaluates |= evaluates
        if self.evaluates and run.dev_data is None:
            self.evaluates = False
            if self._files is not None:
                self._files.obeyed(EVALUATE)
            if not self._told_of_no_data:
                self._told_of_no_data = True
                run.say("note: an evaluation was asked for, and there is no dev data to measure, so none is made")

    def evaluated(self) -> None:
        """An evaluation of this step has been made."""
        self.evaluates = False
        if self._files is not None and self._files.obeyed(EVALUATE):
            self._run.say(f"the dev data has been measured, as the file EVALUATE in {self._run.output_dir} asked")

    def saved(self, folder: Path) -> None:
        """A checkpoint of this step has been written."""
        self.saves = False
        if self._files is not None and self._files.obeyed(SAVE):
            self._run.say(f"{folder.name} has been written, as the file SAVE in {self._run.output_dir} asked")

    def ended(self) -> None:
        """The run has ended early, and its result has been written."""
        if self._files is not None:
            self._files.obeyed(STOP)


class _Files:
    """STOP, SAVE and EVALUATE in the folder of a run. Only what comes or changes while the run trains counts: a file of
    such a name that was there before may be anybody's, and is neither obeyed nor removed."""

    def __init__(self, run: CoreRun) -> None:
        self._run = run
        self._paths = {kind: run.output_dir / kind.upper() for kind in (STOP, SAVE, EVALUATE)}
        self._known = {kind: _mark(path) for kind, path in self._paths.items()}
        self._obeys: dict[str, Mark] = {}
        for kind, mark in self._known.items():
            if mark is not None:
                path = self._paths[kind]
                run.say(f"note: {path} was there before the training began, so it asks nothing; touch it to ask now")

    def look(self) -> None:
        """Ask of the run what files ask that are new."""
        for kind, path in self._paths.items():
            mark = _mark(path)
            if mark is None or mark == self._known[kind]:
                continue
            self._known[kind] = self._obeys[kind] = mark
            if kind == SAVE:
                self._run.control.save()
            elif kind == EVALUATE:
                self._run.control.evaluate()
            else:
                reason = _reason(path)
                self._run.control.stop(f"the file {path} asks for it{f': {reason}' if reason else ''}")

    def obeyed(self, kind: str) -> bool:
        """Remove the file that has been obeyed, if there is one; whether there was. One that has been changed
        meanwhile stays: it asks anew."""
        mark = self._obeys.pop(kind, None)
        if mark is None:
            return False
        path = self._paths[kind]
        if _mark(path) == mark:
            try:
                path.unlink()
            except OSError as error:
                self._run.say(f"note: {path} has been obeyed and cannot be removed ({error.strerror})")
        return True


def _mark(path: Path) -> Mark:
    """By what a plain file is known to be new; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size) if stat.S_ISREG(found.st_mode) else None


def _reason(path: Path) -> str:
    """What a file says, on one line; empty where it says nothing, or cannot be read."""
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as stream:
        return shown(" ".join(stream.read(4 * _LONGEST).split()), _LONGEST)
    return ""

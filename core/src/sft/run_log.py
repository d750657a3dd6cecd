"""``sft.log``: what a run has said, in its folder, whatever became of it in a terminal."""

from __future__ import annotations

import os
from collections import deque
from datetime import datetime
from pathlib import Path

from sft.foreign_text import safe
from sft.progress import Progress

NAME = "sft.log"
_KEPT = 1000
"""Lines that wait for the folder; a process that only starts others never has one."""


class RunLog:
    """Writes down each line that ``progress`` is given to say: the time, then the text, whose further lines are
    indented, so that what looks like a time at the beginning of a line is one.

    What is said before :meth:`begin` is written then. A line is one call of the system, so neither a thread nor a
    signal comes between, and a run that is killed has lost none. Where nothing can be written the run goes on without,
    and says so once."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._waiting: deque[str] | None = deque(maxlen=_KEPT)
        self._path: Path | None = None
        progress.ears.append(self._hear)

    def begin(self, folder: Path) -> None:
        """Write into ``folder`` from now on, behind what an earlier part of the run has left there."""
        waiting, self._waiting = self._waiting or (), None
        self._path = folder / NAME
        self._write("".join(waiting))

    def end(self) -> None:
        """Write nothing more: the folder may be another run's."""
        self._path = self._waiting = None

    def _hear(self, text: str) -> None:
        line = f"{datetime.now().astimezone().isoformat(timespec='seconds')} {_indented(safe(text))}\n"
        if self._waiting is not None:
            self._waiting.append(line)
        else:
            self._write(line)

    def _write(self, text: str) -> None:
        if self._path is None:
            return
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                os.write(handle, text.encode())
            finally:
                os.close(handle)
        except OSError as error:
            path, self._path = self._path, None
            self._progress.say(f"note: {path} cannot be written ({error.strerror}), so it ends here")


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")

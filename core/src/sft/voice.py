"""What is said to whoever runs sft: who prints a line, and which lines of a run are said, and how (``log_level``,
``json_logs``)."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from sft.foreign_text import one_line, without_secrets
from sft.written_numbers import finite

LEVELS = ("info", "warning", "error")
"""From all that is said to nothing but why a run ends."""
NOTE = "note: "
"""What a line begins with that a user should know although nothing has gone wrong."""
_BEGINS = '{"time": '


class Printer:
    """Prints lines to standard output or standard error, each on one line whatever is in it; bars may stand below its
    lines where that is a terminal.

    Where nobody reads them any more (`sft run | head`, a terminal that was closed), work goes on without them."""

    def __init__(self, stream: str) -> None:
        self._stream = stream

    def __call__(self, text: str) -> None:
        self.write(one_line(text))

    def write(self, text: str) -> None:
        """Print what is known to be harmless, as it is, on however many lines."""
        try:
            print(text, file=self.file, flush=True)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self._silence()

    def _silence(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)
        if self._stream == "stdout":
            Printer("stderr")("note: nobody reads the output any more; the work goes on without it")

    @property
    def file(self) -> Any:
        """The stream as it is now: tests and notebooks replace it."""
        return getattr(sys, self._stream)

    @property
    def width(self) -> int | None:
        """The columns of the terminal that it prints to; None where it prints to none, and lines stay whole."""
        if not self.file.isatty():
            return None
        asked = os.environ.get("COLUMNS", "")
        if asked.isdecimal() and int(asked):
            return int(asked)
        try:
            return os.get_terminal_size(self.file.fileno()).columns or 80
        except (OSError, ValueError):
            return 80


def put(say: Callable[[str], None], text: str) -> None:
    """Have ``say`` say what is known to be harmless, on however many lines."""
    if isinstance(say, Printer):
        say.write(text)
    else:
        say(text)


class Voice:
    """Says to ``say`` those lines of a run that its ``level`` lets through, as text or, ``as_json``, as events: one
    JSON object a line, which docs/terminal.md describes."""

    def __init__(self, say: Callable[[str], None], level: str = "info", as_json: bool = False) -> None:
        self.say, self.level, self.as_json = say, level, as_json

    def __call__(self, text: str) -> None:
        """A line: a note, or any other."""
        is_note, text = text.startswith(NOTE), one_line(text)
        self.event("note" if is_note else "line", {"text": text}, text, "warning" if is_note else "info")

    def event(self, name: str, values: Mapping[str, Any], text: str | None, level: str = "info") -> None:
        """What has happened: its ``values``, which are JSON, and what is said of it in words, if anything is, which are
        harmless."""
        if LEVELS.index(level) < LEVELS.index(self.level):
            return
        if self.as_json:
            put(self.say, event_line(name, values, level))
        elif text is not None:
            put(self.say, text)

    def relay(self, line: str) -> None:
        """A line that another process of the same run has made by the same settings: passed on as it is."""
        if self.as_json and not line.startswith(_BEGINS):  # a library's that prints by itself
            self(line)
        else:
            put(self.say, line if self.as_json else one_line(line))


def voice_of(say: Callable[[str], None] | None, level: str, json_logs: bool | str) -> Callable[[str], None]:
    """What says the lines of a run as its settings ask: to ``say``, or by default to the standard output or error."""
    said_to = say or Printer("stderr" if json_logs == "stderr" else "stdout")
    return said_to if level == LEVELS[0] and not json_logs else Voice(said_to, level, bool(json_logs))


def event_line(name: str, values: Mapping[str, Any], level: str) -> str:
    """An event as a line of JSON, in ASCII, without what looks like a secret."""
    time = datetime.now().astimezone().isoformat(timespec="milliseconds")
    record = {"time": time, "event": name, "level": level, **without_secrets(values)}
    return json.dumps(finite(record), allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON does not know: numbers of numpy, and paths."""
    return value.item() if hasattr(value, "item") else str(value)

"""Bars at the bottom of a terminal, drawn by rich: each is one line, of which as much is shown as there is room for."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import Progress, Task
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sft.durations import duration

_SHORTEST, _LONGEST = 8, 40
"""Columns of a bar."""
_UNKNOWN = "-:--:--"
_GAP = 2
"""Columns between two texts."""


class Bars(Progress):
    """The bars of a process; what is printed while they are there appears above them."""

    def __init__(self, file: Any) -> None:
        self._screen = Console(file=file, highlight=False, soft_wrap=True)
        super().__init__(
            console=self._screen,
            transient=True,
            # What goes to a file or a pipe is no line above the bar.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        width = self._screen.width - 1  # some terminals begin a new line when the last column is full
        return [_drawn(task, width) for task in self.tasks]


def _drawn(task: Task, width: int) -> Table:
    took = duration(time.monotonic() - task.fields["began"])
    before, bar, behind = fit(width, task.description, task.fields["texts"], took, _left(task))
    row: list[RenderableType] = [Text(before)] if before else []
    if bar:
        row.append(ProgressBar(task.total, task.completed, bar, animation_time=task.get_time()))
    row.append(Text(behind))
    line = Table.grid(padding=(0, 1, 0, 0))
    for _ in row:
        line.add_column(no_wrap=True)
    line.add_row(*row)
    return line


def _left(task: Task) -> str:
    """When the work is done, counted down from what was last known."""
    if task.total is None or task.completed >= task.total:
        return ""
    ends = task.fields["ends"]
    left = None if ends is None else ends - time.monotonic()
    return f"ETA {_UNKNOWN if left is None or left < 0 else duration(left)}"


def fit(width: int, what: str, texts: Sequence[str], took: str, left: str) -> tuple[str, int, str]:
    """What stands before a bar, the columns of the bar (0: there is no room for one) and what stands behind it, in
    ``width`` columns together.

    The first of ``texts`` says how far ``what`` is, and is there in any case. Then comes, as far as there is room: the
    time that is left, the second text, a bar, the other texts in their order, and the time that it took so far.
    """
    how_far, *figures = texts
    room = width - cell_len(what) - 1 - cell_len(how_far)
    if room < 0:
        return "", 0, how_far

    def takes(text: str) -> bool:
        nonlocal room
        fits = bool(text) and cell_len(text) + _GAP <= room
        room -= (cell_len(text) + _GAP) * fits
        return fits

    ends = [left] if takes(left) else []
    shown = list(takewhile(takes, figures[:1]))
    has_bar = room > _SHORTEST
    room -= (_SHORTEST + 1) * has_bar
    if len(shown) == len(figures[:1]):
        shown += takewhile(takes, figures[1:])
    so_far = [took] if len(shown) == len(figures) and takes(took) else []
    bar = min(_LONGEST, _SHORTEST + room) if has_bar else 0
    return what, bar, (" " * _GAP).join([how_far, *shown, *so_far, *ends])

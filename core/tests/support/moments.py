"""The moments at which Python runs handlers of signals in some of sft's code: what comes there comes whatever the
machine's speed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import sft


def source(module: str) -> str:
    """The file of sft's ``module``, by its path without the ending."""
    return f"{sft.__path__[0]}/{module}.py"


class Moments:
    """Counts the moments in code of ``files``, of this thread, from its function ``begins`` on, and does something at
    one of them. Python looks for signals where a function is entered and where a call of C's has returned."""

    def __init__(self, begins: str, *files: str) -> None:
        self._files, self._begins = frozenset(files), begins
        self.at: list[str] = []
        """Each moment, in words."""

    @contextlib.contextmanager
    def counted(self, moment: int = -1, action: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Count within it, and carry out ``action`` at the moment of that number; what it raises is raised there."""
        self.at, before, has_begun = [], sys.getprofile(), False

        def heard(frame: FrameType, event: str, value: Any) -> None:
            nonlocal has_begun
            if event not in ("call", "c_return") or frame.f_code.co_filename not in self._files:
                return
            has_begun = has_begun or frame.f_code.co_name == self._begins
            if has_begun:
                what = "entered" if event == "call" else f"after {value.__name__}"
                self.at.append(f"{frame.f_code.co_name}:{frame.f_lineno}, {what}")
                if len(self.at) == moment + 1:
                    action()

        sys.setprofile(heard)
        try:
            yield
        finally:
            sys.setprofile(before)

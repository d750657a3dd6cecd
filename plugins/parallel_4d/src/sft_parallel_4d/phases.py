"""The phases in which a process waits for others, told to the watch if there is one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from sft_parallel_4d.watch import Watch

Result = TypeVar("Result")


class Phases:
    """All processes go through the same ones, in the same order. ``meets``: each begins when all processes have come
    to it, as Paddle's gloo waits for a process 30 seconds and no longer."""

    def __init__(self, watch: Watch | None, meets: bool = False) -> None:
        self._watch, self._meets, self._waits = watch, meets, False

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """A phase, unless it is part of another one."""
        if self._watch is None or self._waits:
            yield
            return
        self._watch.enter(name)
        if self._meets:
            self._watch.meet()
        self._waits = True
        yield
        self._waits = False
        self._watch.leave()

    def go_on(self) -> None:
        """This process gets on within its phase."""
        if self._watch is not None:
            self._watch.go_on()


def phase(name: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Marks a method of an object with ``phases`` in which processes wait for each other."""

    def mark(method: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(method)
        def watched(self: Any, *arguments: Any) -> Result:
            with self.phases.within(name):
                return method(self, *arguments)

        return watched

    return mark

"""The phases in which a process waits for others, told to the watch if there is one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from sft_parallel_4d.watch import Watch

Result = TypeVar("Result")


class Phases:
    """All processes go through the same ones, in the same order. ``meets``: each begins when all processes have come
    to it, as Paddle's gloo waits for a process 30 seconds and no longer."""

    def __init__(self, watch: Watch | None, meets: bool = False) -> None:
        self._watch, self._meets = watch, meets
        self._outer: str | None = None
        """The phase that is under way."""

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """A phase, unless it is part of another one."""
        if self._watch is None or self._outer is not None:
            yield
            return
        self._watch.enter(name)
        if self._meets:
            self._watch.meet()
        self._outer = name
        try:
            yield
        finally:  # where it fails this rank is seen in the phase
            self._outer = None
        self._watch.leave()

    def exchange(self, name: str, numbers: Sequence[float], way: str) -> list[float]:
        """What the ``numbers`` of all processes come to, by ``way`` ("sum" or "largest"): their hosts tell each other,
        and no device is asked. It is a phase of its own, within another one too."""
        if self._watch is None:
            return [float(number) for number in numbers]
        self._watch.enter(name)
        found = self._watch.meet(numbers, way)
        if self._outer is None:
            self._watch.leave()
        else:
            self._watch.enter(self._outer)
        return found

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

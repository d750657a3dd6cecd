"""The next item is made while the one before it is in use: batches, while a step runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items in the same order. All but the first are made by a thread, one at a time, while the caller has the
    item before.

    What goes wrong in a thread is raised where its item is asked for. A thread ends with its item, and there is none
    after the last, so that nothing is left behind wherever the caller stops.
    """
    following = _Next(items)
    following.run()  # nothing is in use yet; what it has to say comes from the caller's own thread
    while following.found:
        (item,) = following.found
        following = _Next(items)
        following.start()
        try:
            yield item
        finally:
            following.join()
    if following.error is not None:
        raise following.error


class _Next(threading.Thread, Generic[T]):
    """Takes one item: ``found`` holds it, or nothing where there is none, or an ``error`` in its place."""

    def __init__(self, items: Iterator[T]) -> None:
        super().__init__(name="sft-next-batch")
        self._items = items
        self.found: list[T] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.found += [next(self._items)]
        except StopIteration:
            pass
        except BaseException as error:
            self.error = error

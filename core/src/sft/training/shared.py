"""What the machine refuses to one process of a run ends all of them at the same place, where they can still rescue what
they have learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from sft.seams import ParallelStrategy

Result = TypeVar("Result")


class SharedError(OSError):
    """The machine's fault in one process, raised by all of a run at the same place: they can still work together."""


def shared(strategy: ParallelStrategy, write: Callable[[], Result]) -> Result:
    """What ``write`` gives; all processes call this, and all raise :class:`SharedError` where an OSError is raised in
    one of them."""
    failure, result = None, None
    try:
        result = write()
    except OSError as error:
        failure = error
    if strategy.largest(float(failure is not None)):
        if failure is None:
            raise SharedError("another process could not write its part")
        raise SharedError(*failure.args[:2], *([failure.filename] if failure.filename else [])) from failure
    return cast("Result", result)

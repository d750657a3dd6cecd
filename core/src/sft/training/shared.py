"""An error of the machine in one process is raised in every process of the run, at the same place, where they can still
save together what they have learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from sft.seams import ParallelStrategy

Result = TypeVar("Result")


class SharedError(OSError):
    """An error of the machine in one process, raised in all of them at the same place: they can still work together."""


def shared(strategy: ParallelStrategy, write: Callable[[], Result]) -> Result:
    """Call ``write`` in every process and return its result. If it raises an OSError in one of them, all raise
    :class:`SharedError`."""
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

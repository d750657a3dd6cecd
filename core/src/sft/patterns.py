"""Regular expressions that come with settings and adapters, matched within a limit of time."""

from __future__ import annotations

from sft.errors import UsageError
from sft.foreign_text import quoted

SECONDS = 0.5
"""For one name. Honest expressions take microseconds; some that repeat a repetition would take longer than any run."""


def matches(pattern: str, name: str, whose: str) -> bool:
    """Whether a regular expression, read as Python's ``re`` reads it, matches the whole of ``name``.

    Raises :class:`UsageError`, which begins with ``whose``, for one that is none, or takes too long.
    """
    import regex

    try:
        return regex.fullmatch(pattern, name, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise UsageError(
            f"{whose} {quoted(pattern)} takes too long to match {name}; write it without repetitions in repetitions."
        ) from error
    except (regex.error, RecursionError, OverflowError, TypeError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise UsageError(f"{whose} {quoted(pattern)} is not a valid regular expression ({reason}).") from error

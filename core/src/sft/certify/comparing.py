"""What comes of a case that does not hold, and the comparisons that find it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sft.errors import PluginError, SftError

CLOSE = 1e-5
"""Two ways of computing the same logits in float32 are so near, as a share of the largest."""
NEAR = 1e-3
"""So near are losses after steps of training by two ways of computing the same gradients."""


class FailedError(AssertionError):
    """What must hold does not: a sentence."""


class NotTriedError(Exception):
    """Why a case cannot be tried here: a sentence."""


class RefusedError(Exception):
    """Two that do not go together say so, in one sentence."""


def same(found: Mapping[str, Any] | Sequence[Any], expected: Any, what: str) -> None:
    """Both to the last bit."""
    if found != expected:
        raise FailedError(f"{what}: {_first_difference(found, expected)}")


def close(found: Any, expected: Any, what: str, tolerance: float = CLOSE) -> None:
    """Arrays or lists of numbers, as near as ``tolerance`` times the largest."""
    one, other = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if one.shape != other.shape:
        raise FailedError(f"{what}: {one.shape} where {other.shape} is expected")
    if not np.isfinite(one).all():
        raise FailedError(f"{what}: not finite")
    off, largest = float(np.abs(one - other).max(initial=0.0)), float(np.abs(other).max(initial=0.0))
    if off > tolerance * largest:
        raise FailedError(f"{what}: {off:.2e} apart, where the largest value is {largest:.2e}")


def refused(action: Callable[[], Any], what: str) -> str:
    """The one sentence in which ``action`` is refused."""
    try:
        action()
    except PluginError as error:
        raise FailedError(f"{what} is not refused, but a fault of the plugin's: {error}") from error
    except SftError as error:
        return str(error)
    except Exception as error:
        raise FailedError(f"{what} is no error in a sentence but a {type(error).__name__}: {error}") from error
    raise FailedError(f"{what} is accepted")


def _first_difference(found: Any, expected: Any) -> str:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        keys = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
        return f"{keys[0]} differs"
    for number, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            return f"at place {number}, {_short(one)} where {_short(other)} is expected"
    return f"{len(found)} where {len(expected)} are expected"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "…"

"""Numbers as somebody wrote them, also those that are too small for this process, and those that JSON has.

A thread that takes denormals as zero (``runtime.flush_denormals``) reads 1e-320 as 0, compares it as 0 and shows it as
0.0; another does not. What is said of a number does not depend on that here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

_LONGEST = 40
"""Characters that are shown of one."""


def read_number(text: str) -> float:
    """What ``text`` says. :class:`ValueError` for what is no number."""
    return or_tiny(float(text), text)


def finite(value: Any) -> Any:
    """``value`` with null for the numbers that JSON has not."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def or_tiny(value: float, text: str) -> float:
    """``value``, which was read from ``text``; a :class:`Tiny` where ``text`` says something nearer to 0 than what
    every thread tells from 0."""
    digits = text.lower().partition("e")[0]
    is_zero = not any(digit.isdecimal() and int(digit) for digit in digits)
    return value if is_zero or not abs(value) < sys.float_info.min else Tiny(text)


class Tiny(float):
    """The smallest number that every thread tells from 0, with the sign of what was written, and shown as that was: far
    below what float32 holds, so that whoever needs a number that counts refuses it."""

    _text: str

    def __new__(cls, text: str) -> Tiny:
        made = super().__new__(cls, -sys.float_info.min if text.strip().startswith("-") else sys.float_info.min)
        text = text.strip()
        made._text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
        return made

    def __repr__(self) -> str:
        return self._text

    def __getnewargs__(self) -> Any:
        return (self._text,)

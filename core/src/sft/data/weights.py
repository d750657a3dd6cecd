"""What a record and its messages weigh, and what is wrong with what is no weight."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from sft.seams import Turn

LIGHTEST, HEAVIEST = 1e-6, 1e6
"""Between these sums of weights and of weighted losses are numbers that float32 and float16 hold well."""


def record_weight(record: Mapping[str, Any]) -> float:
    """What a record says that it weighs; a CSV file has it as text, and nothing in it where it is 1."""
    value = record.get("weight")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value) if value.strip() else None
    return weight_of(value, "the record")


def weight_of(value: Any, what: str) -> float:
    """``value`` as a weight, 1 where it is None; ``ValueError``, which begins with ``what``, if it is none."""
    if value is None:
        return 1.0
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not (value == 0 or LIGHTEST <= value <= HEAVIEST):
        raise ValueError(
            f'{what} has the weight {reprlib.repr(value)}; "weight" must be 0, or a number from {LIGHTEST:f} to '
            f"{HEAVIEST:,.0f}."
        )
    return float(value)


def weight_of_turns(turns: Sequence[Turn]) -> float:
    """What a plugin's conversation weighs; ``ValueError`` where it, or a turn of it that trains, weighs nothing."""
    for number, turn in enumerate(turns, start=1):
        if weight_of(turn.weight, f"turn {number}") == 0 and turn.trains:
            raise ValueError(f"turn {number} trains and has the weight 0; give it another, or do not let it train.")
    return weight_of(getattr(turns, "weight", None), "the conversation")

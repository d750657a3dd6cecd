"""What a record and its messages weigh, and what is wrong with what is no weight."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from sft.conversations import Turn
from sft.foreign_text import listed

LIGHTEST, HEAVIEST = 1e-6, 1e6
"""Between these sums of weights and of weighted losses are numbers that float32 and float16 hold well."""
NUMBERS = ("weight", "loss_scale")
"""Under these names a message has what it weighs: OpenAI's and ms-swift's."""
FLAGS = ("train", "training", "loss")
"""Under these, axolotl's and ms-swift's, whether it is learned."""
PARTS = ("train_detail", "training_detail")
"""Under these, axolotl's, which characters of it are learned."""
_NAMES = {*NUMBERS, *FLAGS, *PARTS}


def record_weight(record: Mapping[str, Any]) -> float:
    """What a record says that it weighs; a CSV file has it as text, and nothing in it where it is 1."""
    value = record.get("weight")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value) if value.strip() else None
    return weight_of(value, "the record")


def message_weight(message: Mapping[str, Any], what: str) -> float:
    """What a message says that it weighs, by OpenAI's name for it or by those of other tools."""
    if _NAMES.isdisjoint(message):
        return 1.0
    numbers = {name: weight_of(message[name], what, name) for name in NUMBERS if message.get(name) is not None}
    flags = {name: _flag(message[name], what, name) for name in FLAGS if message.get(name) is not None}
    given = {**numbers, **flags}
    if len(set(numbers.values())) > 1 or len({weight > 0 for weight in given.values()}) > 1:
        raise ValueError(f"{what} has weights that contradict each other ({listed(given)}); keep one.")
    for name in PARTS:
        if message.get(name):
            raise ValueError(
                f'{what} has "{name}", which is for parts of a message, and a message is learned as a whole; take '
                f'"{name}" out, or the record.'
            )
    return next(iter(given.values()), 1.0)


def _flag(value: Any, what: str, name: str) -> float:
    if value not in (0, 1):
        raise ValueError(f'{what} has the {name} {reprlib.repr(value)}; "{name}" must be true or false.')
    return float(value)


def weight_of(value: Any, what: str, name: str = "weight") -> float:
    """``value`` as a weight, 1 where it is None; ``ValueError``, which begins with ``what``, if it is none."""
    if value is None:
        return 1.0
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not (value == 0 or LIGHTEST <= value <= HEAVIEST):
        raise ValueError(
            f'{what} has the {name} {reprlib.repr(value)}; "{name}" must be 0, or a number from {LIGHTEST:f} to '
            f"{HEAVIEST:,.0f}."
        )
    return float(value)


def weight_of_turns(turns: Sequence[Turn]) -> float:
    """What a record weighs of which a plugin made ``turns``; ``ValueError`` for a weight that is none, and for a turn
    that trains and weighs nothing."""
    for number, turn in enumerate(turns, start=1):
        if weight_of(turn.weight, f"turn {number}") == 0 and turn.trains:
            raise ValueError(f"turn {number} trains and has the weight 0; give it another, or do not let it train.")
    return weight_of(getattr(turns, "weight", None), "the record")

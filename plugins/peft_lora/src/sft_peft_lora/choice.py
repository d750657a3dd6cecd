"""Which layers are adapted, and with which rank and α: decided by their names, for a model and for one on paper."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sft
from sft import UsageError
from sft_peft_lora.names import OUTER
from sft_peft_lora.options import LARGEST, SMALLEST, LoraOptions

_BLOCK = re.compile(r"\.(\d+)\.")
"""Blocks are numbered, whatever a family calls them; of a layer of experts the first number is that of the block."""


def chosen(names: Iterable[str], options: LoraOptions) -> dict[str, tuple[int, float | None]]:
    """For each layer that is adapted, its rank, and its α where the settings say one. ``names`` are those of the layers
    that ``lora_target_modules`` gives.

    Raises :class:`UsageError` for a pattern or a block that meets none of them, and where nothing is left.
    """
    given = list(names)
    outer, left = [name for name in given if name in OUTER], [name for name in given if name not in OUTER]
    blocks = block_numbers(options.lora_layers_to_transform)
    if blocks and not left:
        raise UsageError(
            "lora_layers_to_transform numbers blocks, and lora_target_modules names none of their layers; leave one of "
            "them out."
        )
    if blocks:
        there = {_block(name) for name in left}
        if missing := sorted(blocks - there):
            raise UsageError(
                f"lora_layers_to_transform names block {missing[0]}, and the layers that are adapted are in blocks "
                f"{min(there)} to {max(there)}; correct it."
            )
        left = [name for name in left if _block(name) in blocks]
    left = [*left, *outer]
    if options.lora_exclude_modules:
        without = sft.matching(left, options.lora_exclude_modules)
        left = [name for name in left if name not in without]
        if not left:
            raise UsageError(
                "lora_exclude_modules leaves out every layer that would be adapted, so nothing trains; shorten it."
            )
    ranks = _by_pattern("lora_rank_pattern", options.lora_rank_pattern, left, int)
    alphas = _by_pattern("lora_alpha_pattern", options.lora_alpha_pattern, left, float)
    return {name: (int(ranks.get(name, options.lora_rank)), alphas.get(name, options.lora_alpha)) for name in left}


def check(options: LoraOptions) -> None:
    """Refuse patterns and numbers that no model could make right; :class:`UsageError`."""
    block_numbers(options.lora_layers_to_transform)
    for line in options.lora_rank_pattern:
        _pair("lora_rank_pattern", line, int)
    for line in options.lora_alpha_pattern:
        _pair("lora_alpha_pattern", line, float)


def block_numbers(given: Sequence[Any]) -> set[int]:
    """Numbers of blocks, and ranges of them ("4-7", both included), as a set; none: all blocks."""
    found: set[int] = set()
    for item in given:
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", str(item))
        first, last = (int(match[1]), int(match[2] or match[1])) if match is not None else (1, 0)
        if last < first:
            raise UsageError(
                f"lora_layers_to_transform: expected numbers of blocks from 0, or ranges such as 4-7, got {item!r:.60}."
            )
        found.update(range(first, last + 1))
    return found


def _block(name: str) -> int:
    match = _BLOCK.search(name)
    return int(match[1]) if match is not None else -1


def _by_pattern(
    setting: str, lines: Sequence[str], names: Sequence[str], read: Callable[[str], float]
) -> dict[str, float]:
    """The value of each layer that one of the lines meets; of several the first counts, as in PEFT."""
    found: dict[str, float] = {}
    for line in lines:
        pattern, value = _pair(setting, line, read)
        for name in sft.matching(names, [pattern]):
            found.setdefault(name, value)
    return found


def _pair(setting: str, line: str, read: Callable[[str], float]) -> tuple[str, float]:
    pattern, sign, number = (part.strip() for part in line.rpartition("="))
    try:
        value = read(number)
    except (ValueError, OverflowError):
        value = 0
    if not sign or not pattern or not SMALLEST <= value <= LARGEST:
        raise UsageError(
            f"{setting}: expected NAME=NUMBER, such as q_proj=16, where NAME may be a regular expression, got "
            f"{line!r:.100}."
        )
    return pattern, value

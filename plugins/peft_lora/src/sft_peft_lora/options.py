"""The settings of plugin ``lora``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sft

SMALLEST, LARGEST = 1e-9, 1e9
"""Of α and of ranks. Adapters have α up to some thousands; far beyond, float32 products of it overflow."""


@dataclass
class LoraOptions:
    lora_rank: int = sft.option(8, "rank r of the update", minimum=1)
    lora_alpha: float | None = sft.option(
        None, "α; the update is scaled by α/r; unset: 2·r (of each target's own rank)", above=0
    )
    lora_dropout: float = sft.option(0.0, "dropout on the update's input, training only", minimum=0, maximum=0.99)
    lora_target_modules: list[str] = sft.option(
        [], "layer names (q_proj) or regular expressions over whole names; unset: every Linear of the blocks"
    )
    lora_exclude_modules: list[str] = sft.option([], "those of the targets that are not adapted, by the same names")
    lora_layers_to_transform: list[Any] = sft.option(
        [], "numbers of the blocks that are adapted, from 0 (0,1,5-7); unset: all"
    )
    lora_rank_pattern: list[str] = sft.option(
        [], "other ranks of some targets, as NAME=RANK, by the same names; the first that fits counts"
    )
    lora_alpha_pattern: list[str] = sft.option([], "other α of some targets, as NAME=ALPHA, likewise")
    lora_path: str | None = sft.option(
        None, "start from the adapter in this folder (its ranks, scalings and targets count)", is_path=True
    )

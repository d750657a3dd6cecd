"""Plugin ``rslora``: rank-stabilised scaling for LoRA (arXiv 2312.03732)."""

from __future__ import annotations

import math

import sft


class RsLora(sft.Plugin):
    """s = α / √r instead of α / r, so that the update keeps its size as the rank grows."""

    name = "rslora"
    api_version = 1
    summary = "Scale LoRA's update by alpha / sqrt(r)."
    reference = "arXiv 2312.03732"
    requires = ("lora",)

    @sft.hookimpl
    def lora_scaling(self, rank: int, alpha: float) -> float:
        return alpha / math.sqrt(rank)

    @sft.hookimpl
    def lora_default_alpha(self, rank: int) -> float:
        return 4.0

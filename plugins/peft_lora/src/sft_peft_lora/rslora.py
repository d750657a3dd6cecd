"""Plugin ``rslora``: rank-stabilised scaling for LoRA (arXiv 2312.03732)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import sft
from sft import UsageError

if TYPE_CHECKING:
    from sft import Run


class RsLora(sft.Plugin):
    """s = α / √r instead of α / r, so that the update keeps its size as the rank grows."""

    name = "rslora"
    summary = "Scale LoRA's update by alpha / sqrt(r)."
    reference = "arXiv 2312.03732"
    requires = ("lora",)

    @sft.hookimpl
    def sft_check(self, run: Run) -> None:
        if run.settings.options["lora"].lora_path is not None:
            raise UsageError("rslora cannot change the scaling of the adapter in lora_path; leave one of them out.")

    @sft.hookimpl
    def lora_scaling(self, rank: int, alpha: float) -> float:
        return alpha / math.sqrt(rank)

    @sft.hookimpl
    def lora_default_alpha(self, rank: int) -> float:
        return 4.0

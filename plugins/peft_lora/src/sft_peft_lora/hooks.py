"""The hooks that plugin ``lora`` publishes for its refinements. Each has one provider at most."""

from __future__ import annotations

from typing import Any

import sft


@sft.single
def lora_scaling(rank: int, alpha: float) -> float:
    """The factor s of s·A·B. Without a provider: α / r (arXiv 2106.09685, section 4.1)."""


@sft.single
def lora_default_alpha(rank: int) -> float:
    """α where ``lora_alpha`` is unset. Without a provider: 2·r, as PaddleNLP's script has it."""


@sft.single
def lora_initialize(layer: Any, name: str, rng: Any) -> bool:
    """Set ``layer.lora_A`` [in, r] and ``layer.lora_B`` [r, out] (and the base, if it must change); return True.

    ``layer`` is a :class:`sft_peft_lora.layer.LoraLinear` over its base, ``name`` the target's Hugging Face name,
    ``rng`` a numpy Generator that depends on the seed and the name alone. Without a provider: A Kaiming-uniform, B 0.
    """


@sft.single
def lora_export(layer: Any) -> tuple[Any, Any]:
    """The pair (A [in, r'], B [r', out]), float32 numpy, that adds the same to the ORIGINAL base as the trained
    layer does to its own. Without a provider: the layer's A and B."""

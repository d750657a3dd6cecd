"""What a decoder is made of: every way in which the families that ``decoder.py`` computes differ, as plain values.

``families/`` makes one of a ``config.json``. Nothing here imports paddle.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft.models.rotary import Rotary


@dataclass(frozen=True)
class Norms:
    """The names of a block's RMSNorms by their place (None: there is none), as the files have them."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True)
class Experts:
    """The MLP of a block that has experts: each token goes through ``chosen`` of ``count``."""

    count: int
    chosen: int
    inner: int
    normalise: bool
    """Whether the weights of the chosen ones are made to sum to one."""
    shared_inner: int | None = None
    """Intermediate size of an expert that every token goes through, weighted by a gate of its own."""


@dataclass(frozen=True)
class Block:
    """How one block differs from others of its model."""

    rotary: int | None = 0
    """Which of ``Architecture.rotaries`` turns its queries and keys; None: none does."""
    window: int | None = None
    """How many tokens a token sees, itself among them; None: all before it."""
    experts: Experts | None = None


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer. Sizes are numbers of values."""

    vocabulary: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    positions: int
    """The longest document."""
    blocks: tuple[Block, ...]
    rotaries: tuple[Rotary, ...]
    norm_epsilon: float
    tied: bool
    """Whether lm_head is the embedding."""

    norms: Norms = Norms()
    norm_offset: float = 0.0
    """What RMSNorm adds to its weight before it multiplies."""
    head_norm: str | None = None
    """RMSNorm of queries and keys: "head" (of each head), "all" (of all heads together), or None."""
    activation: str = "silu"
    """Of the gate: "silu" or "gelu_tanh"."""
    fused_attention: bool = False
    """Whether q, k and v are one matrix, ``qkv_proj``."""
    fused_mlp: bool = False
    """Whether gate and up are one matrix, ``gate_up_proj``."""
    attention_bias: bool = False
    """Of q, k and v."""
    output_bias: bool = False
    """Of o_proj."""
    mlp_bias: bool = False

    attention_scale: float | None = None
    """What scores are multiplied by; None: 1/√head_size."""
    attention_cap: float | None = None
    """Scores s become cap · tanh(s / cap)."""
    logit_cap: float | None = None
    """Likewise logits."""
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """What a block's attention and MLP are multiplied by before they are added."""

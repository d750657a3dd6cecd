"""What a model is, as plain values: a :class:`ModelShape` of any model, an :class:`Architecture` of what ``decoder.py``
computes.

A family's reader makes one of a ``config.json`` (``families/``). Nothing here imports paddle.
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
    """The MLP of a block that has experts: each token goes through ``chosen`` of ``count``.

    Attributes:
        inner: Intermediate size of each.
        normalise: Whether the weights of the chosen ones are made to sum to one.
        shared_inner: Intermediate size of an expert that every token goes through, weighted by a gate of its own; None:
            there is no such expert.
    """

    count: int
    chosen: int
    inner: int
    normalise: bool
    shared_inner: int | None = None


@dataclass(frozen=True)
class Block:
    """How one block differs from others of its model.

    Attributes:
        rotary: Which of ``rotaries`` of its model turns its queries and keys; None: none does.
        window: How many tokens a token sees, itself among them; None: all before it.
        experts: None: its MLP is a plain one.
    """

    rotary: int | None = 0
    window: int | None = None
    experts: Experts | None = None


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the core must know of any model, its own decoder or a plugin's class. Sizes are numbers of values.

    Attributes:
        vocabulary: The rows of the embedding.
        hidden: Values of a hidden state.
        positions: The longest document, in tokens.
        blocks: One a block: of its window the masks are made, and its place is where keys and values are kept.
        tied: Whether lm_head is the embedding.
        rotaries: By which ``Reading.turn`` turns; a class that turns by itself needs none.
        attention_cap: Scores s become cap · tanh(s / cap).
        block_names: What the names of the blocks' parameters begin with: block 0 is ``model.layers.0``.
    """

    vocabulary: int
    hidden: int
    positions: int
    blocks: tuple[Block, ...]
    tied: bool
    rotaries: tuple[Rotary, ...] = ()
    attention_cap: float | None = None
    block_names: str = "model.layers"


@dataclass(frozen=True, kw_only=True)
class Architecture(ModelShape):
    """A decoder-only transformer of ``decoder.py``.

    Attributes:
        inner: Intermediate size of the MLP.
        heads, kv_heads: Of queries, and of keys and values.
        head_size: Values of each head.
        norm_epsilon: What RMSNorm adds to the mean of squares.
        norms: Where a block has norms, and what they are called.
        norm_offset: What RMSNorm adds to its weight before it multiplies.
        head_norm: RMSNorm of queries and keys: "head" (of each head), "all" (of all heads together), or None.
        activation: Of the gate: "silu" or "gelu_tanh".
        fused_attention: Whether q, k and v are one matrix, ``qkv_proj``.
        fused_mlp: Whether gate and up are one matrix, ``gate_up_proj``.
        attention_bias: Whether q, k and v have a bias.
        output_bias: Whether o_proj has one.
        mlp_bias: Whether the MLP's Linears have one.
        attention_scale: What scores are multiplied by; None: 1/√head_size.
        logit_cap: Logits x become cap · tanh(x / cap).
        logit_scale: What logits are multiplied by, before that.
        embedding_scale: What the embedding is multiplied by.
        residual_scale: What a block's attention and MLP are multiplied by before they are added.
    """

    inner: int
    heads: int
    kv_heads: int
    head_size: int
    norm_epsilon: float

    norms: Norms = Norms()
    norm_offset: float = 0.0
    head_norm: str | None = None
    activation: str = "silu"
    fused_attention: bool = False
    fused_mlp: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    attention_scale: float | None = None
    logit_cap: float | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0

"""A model on paper: the tensors of a ``config.json`` by shape alone, before any of them exists. Imports no paddle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.models.families import Family
from sft.models.layers import matching

_HEADS = {"qwen2": 32, "mistral": 8, "gemma": 16}
"""Key/value heads where config.json does not say: the defaults of PaddleNLP's config classes."""


@dataclass(frozen=True)
class Weight:
    """A tensor on paper. ``sides`` says what each dimension is: "in" or "out" of its Linear, "vocabulary", "all" (of
    a tensor that lies flat and is divided whichever side of its Linear is), or "" (of nothing that is divided); without
    it, nobody says how the tensor is divided. Of an adapter layer they are the ``sides`` of its class: a layer that
    declares none has none on paper.

    Attributes:
        bits: Of one value; None: what the run's precision gives to weights.
    """

    name: str
    shape: tuple[int, ...]
    sides: tuple[str, ...] = ()
    trains: bool = True
    bits: int | None = None

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass
class LinearOutline:
    """A Linear of a transformer block (or what stands for one), by its Hugging Face name.

    Attributes:
        kept: Values a token that a technique keeps for backward, beside what the Linear itself keeps.
        kept_once: Values that it keeps for each micro-batch, whatever its tokens.
    """

    name: str
    in_features: int
    out_features: int
    weights: list[Weight]
    kept: int = 0
    kept_once: int = 0


@dataclass
class Outline:
    """A model on paper, for a plugin to change (``sft_outline``) as it changes the model itself.

    Attributes:
        blocks: The Linears of each transformer block.
        head: None where it is the embedding.
        norm: One RMSNorm; each block has two, and one comes after the last block.
        shared: Tensors that a technique holds once in each process, for all blocks.
        attention_in_blocks: Whether attention keeps its inputs, its output and a sum a row for backward, and no [S, S]
            probabilities.
    """

    family: Family
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    positions: int
    blocks: list[list[LinearOutline]]
    tied: bool
    embedding: Weight
    head: Weight | None
    norm: Weight
    shared: list[Weight] = field(default_factory=list)
    attention_in_blocks: bool = False

    def targets(self, patterns: Sequence[str] | None = None) -> list[LinearOutline]:
        """The Linears that ``patterns`` choose, all without any; as :func:`sft.target_layers` chooses layers."""
        found = {linear.name: linear for block in self.blocks for linear in block}
        if not patterns:
            return list(found.values())
        chosen = matching(list(found), patterns)
        return [linear for name, linear in found.items() if name in chosen]

    def undivided(self) -> str | None:
        """The name of a tensor of a Linear of which nobody says how processes divide it, where there is one."""
        for linear in self.targets():
            for weight in linear.weights:
                if weight.shape and not weight.sides:
                    return f"{weight.name} of {linear.name}"
        return None

    def freeze(self) -> None:
        """Nothing of the base trains; what techniques add afterwards may."""
        for linear in self.targets():
            linear.weights = [_frozen(weight) for weight in linear.weights]
        self.embedding, self.norm = _frozen(self.embedding), _frozen(self.norm)
        self.head = None if self.head is None else _frozen(self.head)

    def weights(self) -> Iterator[Weight]:
        """Every tensor, as often as it is there; a tied matrix once."""
        yield self.embedding
        for block in self.blocks:
            yield from (self.norm, self.norm)
            for linear in block:
                yield from linear.weights
        yield self.norm
        if self.head is not None:
            yield self.head
        yield from self.shared

    def count(self) -> tuple[int, int]:
        """All parameters, and those that train, as numbers of values; a weight held as codes counts as what it was."""
        plain = [weight for weight in self.weights() if "all" not in weight.sides]
        coded = [linear for linear in self.targets() if any("all" in weight.sides for weight in linear.weights)]
        total = sum(weight.size for weight in plain) + sum(one.in_features * one.out_features for one in coded)
        return total, sum(weight.size for weight in plain if weight.trains)


def _frozen(weight: Weight) -> Weight:
    return Weight(weight.name, weight.shape, weight.sides, False, weight.bits)


def of_config(values: Mapping[str, Any], family: Family) -> Outline:
    """The model that PaddleNLP's class of ``family`` builds from a ``config.json`` that has been checked."""
    hidden, inner, vocabulary = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
    heads = values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads", _HEADS.get(family.model_type)) or heads
    size = values.get("head_dim", 256) if family.has_head_dim else hidden // heads
    gives_tie = family.can_tie and family.has_head_dim  # only such a class (Gemma's) ties unless it is told not to
    tied = bool(values.get("tie_word_embeddings", gives_tie))
    biased = ("q_proj", "k_proj", "v_proj") if family.model_type == "qwen2" else ()
    linears = {
        "self_attn.q_proj": (hidden, heads * size),
        "self_attn.k_proj": (hidden, kv_heads * size),
        "self_attn.v_proj": (hidden, kv_heads * size),
        "self_attn.o_proj": (heads * size, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }

    def linear(name: str, shape: tuple[int, int]) -> LinearOutline:
        weights = [Weight("weight", shape, ("in", "out"))]
        if name.endswith(biased):
            weights.append(Weight("bias", shape[1:], ("out",)))
        return LinearOutline(name, *shape, weights)

    return Outline(
        family=family,
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        vocabulary=vocabulary,
        positions=values.get("max_position_embeddings") or 2048,
        blocks=[
            [linear(f"model.layers.{number}.{name}", shape) for name, shape in linears.items()]
            for number in range(values["num_hidden_layers"])
        ],
        tied=tied,
        embedding=Weight("weight", (vocabulary, hidden), ("vocabulary", "")),
        head=None if tied else Weight("weight", (hidden, vocabulary), ("", "vocabulary")),
        norm=Weight("weight", (hidden,), ("",)),
    )

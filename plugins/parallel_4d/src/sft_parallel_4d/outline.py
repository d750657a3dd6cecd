"""A model on paper: the tensors of a ``config.json`` by shape alone, before any of them exists. Imports no paddle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from sft import Architecture, Block, UsageError, matching

Sides = tuple[str | None, ...]
"""What each dimension of a tensor is; see :class:`Weight`."""


_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class Weight:
    """A tensor on paper. ``sides`` says what each dimension is: "in" or "out" of its Linear, "vocabulary", "all" (of
    a tensor that lies flat and is divided whichever side of its Linear is), or None (of nothing that is divided). With
    no sides at all, nobody says how the tensor is divided. For an adapter layer they are what its class declares
    (:class:`sft.AdapterLayer`): a layer that declares none has none on paper.

    Attributes:
        bits: Of one value; None: what the run's precision gives to weights.
        state: Bytes that the optimizer keeps of it where it trains, without a master; None: those of AdamW.
    """

    name: str
    shape: tuple[int, ...]
    sides: Sides = ()
    trains: bool = True
    bits: int | None = None
    state: int | None = None

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
        kept_outputs: Values a token that it keeps and that are divided as the Linear's outputs are.
        summed: Values that tensor ranks add up each time it goes forward, where they divide its inputs.
    """

    name: str
    in_features: int
    out_features: int
    weights: list[Weight]
    kept: int = 0
    kept_once: int = 0
    kept_outputs: int = 0
    summed: int = 0

    def add(self, name: str, shape: tuple[int, ...], sides: Sides, trains: bool = True, bits: int | None = 32) -> None:
        """Add a tensor to this Linear; see :class:`Weight`."""
        self.weights.append(Weight(name, shape, sides, trains, bits))

    def remove(self, name: str) -> None:
        """Take away its tensor ``name``."""
        self.weights = [weight for weight in self.weights if weight.name != name]

    def hold(self, name: str, bits: int) -> None:
        """Let its tensor ``name``, if there is one, have values of ``bits`` whatever the run's precision is."""
        self.weights = [replace(weight, bits=bits) if weight.name == name else weight for weight in self.weights]


@dataclass
class Outline:
    """A model on paper, for a plugin to change (``parallel_outline``) as it changes the model itself.

    Attributes:
        blocks: The Linears of each transformer block.
        head: None where it is the embedding.
        norm: One RMSNorm of the residual stream; each block has ``norms`` of them, and one comes after the last block.
        inside: Of each block what its attention and MLP have beside Linears that techniques work on: norms of queries
            and keys, and what routes tokens to experts. Each process has those whole whose ``sides`` are None.
        shared: Tensors that a technique holds once in each process, for all blocks.
        target_sums: Values of each target that tensor ranks add up, which divide the vocabulary: the maximum, the
            normaliser, the chosen logit, and what losses of plugins need.
        state: What :meth:`steps` was given.
        steps_wholes: Whether the optimizer needs whole parameters, so that processes can divide none.
        excluded: What :meth:`exclude` was given.
    """

    architecture: Architecture
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
    norms: int
    inside: list[list[Weight]]
    shared: list[Weight] = field(default_factory=list)
    target_sums: int = 3
    state: Callable[[tuple[int, ...], str], int] | None = None
    steps_wholes: bool = False
    excluded: dict[str, str] = field(default_factory=dict)

    def targets(self, patterns: Sequence[str] | None = None) -> list[LinearOutline]:
        """The Linears that ``patterns`` choose, all without any; as :func:`sft.target_layers` chooses layers."""
        found = {linear.name: linear for block in self.blocks for linear in block}
        if not patterns:
            return list(found.values())
        chosen = matching(list(found), patterns)
        return [linear for name, linear in found.items() if name in chosen]

    def share(
        self, name: str, shape: tuple[int, ...], sides: Sides, trains: bool = True, bits: int | None = 32
    ) -> None:
        """Add a tensor that each process holds once, for all blocks; see :class:`Weight`."""
        self.shared.append(Weight(name, shape, sides, trains, bits))

    def steps(self, state: Callable[[tuple[int, ...], str], int], wholes: bool = False) -> None:
        """Say what another optimizer than AdamW keeps: the bytes of its ``state`` for a tensor of a shape, which is in
        a "block", the "embedding", the "head" or "shared", without a float32 master; and whether it steps ``wholes``
        alone, as one does that is not ``elementwise`` (:class:`sft.Optimizer`)."""
        self.state, self.steps_wholes = state, wholes

    def exclude(self, why: str, *ways: str) -> None:
        """Say ``why`` (a clause) a run with this plugin refuses ``ways`` of dividing it, each "pipeline" or
        "stage3"."""
        self.excluded.update(dict.fromkeys(ways, why))

    def with_state(self) -> None:
        """Give all tensors, also those that techniques have added, what :meth:`steps` says of them."""
        if self.state is None:
            return
        state = self.state

        def stepped(weight: Weight, where: str) -> Weight:
            return replace(weight, state=state(weight.shape, where))

        for linear in self.targets():
            linear.weights = [stepped(weight, "block") for weight in linear.weights]
        self.inside = [[stepped(weight, "block") for weight in weights] for weights in self.inside]
        self.embedding, self.norm = stepped(self.embedding, "embedding"), stepped(self.norm, "block")
        self.head = None if self.head is None else stepped(self.head, "head")
        self.shared = [stepped(weight, "shared") for weight in self.shared]

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
        self.inside = [[_frozen(weight) for weight in weights] for weights in self.inside]
        self.head = None if self.head is None else _frozen(self.head)

    def let_train(self, names: Sequence[str]) -> None:
        """Let the embedding, the head and Linears train that ``modules_to_save`` names beside an adapter."""
        linears = {linear.name: linear for linear in self.targets()}
        for name in names:
            try:
                met = matching([_EMBEDDING, _HEAD, *linears], [name])
            except UsageError:
                raise UsageError(
                    f"modules_to_save {name}: on paper embed_tokens, lm_head and the blocks' Linears can train beside "
                    "an adapter, and this is none of them; leave it out of the plan."
                ) from None
            for path in met & {*linears}:
                one = linears[path]
                one.weights = [replace(w, trains=w.trains or w.name in ("weight", "bias")) for w in one.weights]
            if _EMBEDDING in met or (self.head is None and _HEAD in met):
                self.embedding = replace(self.embedding, trains=True)
            if self.head is not None and _HEAD in met:
                self.head = replace(self.head, trains=True)

    def weights(self) -> Iterator[Weight]:
        """Every tensor, as often as it is there; a tied matrix once."""
        yield self.embedding
        for block, inside in zip(self.blocks, self.inside, strict=True):
            yield from (self.norm,) * self.norms
            yield from inside
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
    return replace(weight, trains=False)


def of_architecture(architecture: Architecture) -> Outline:
    """The model that ``decoder.py`` builds of an architecture."""
    one = architecture
    hidden, query, key = one.hidden, one.heads * one.head_size, one.kv_heads * one.head_size
    if one.fused_attention:
        attention = {"qkv_proj": (hidden, query + 2 * key, one.attention_bias)}
    else:
        sizes = {"q_proj": query, "k_proj": key, "v_proj": key}
        attention = {name: (hidden, size, one.attention_bias) for name, size in sizes.items()}
    attention["o_proj"] = (query, hidden, one.output_bias)

    def mlp(inner: int) -> dict[str, tuple[int, int, bool]]:
        if one.fused_mlp:
            found = {"gate_up_proj": (hidden, 2 * inner, one.mlp_bias)}
        else:
            found = dict.fromkeys(("gate_proj", "up_proj"), (hidden, inner, one.mlp_bias))
        return {**found, "down_proj": (inner, hidden, one.mlp_bias)}

    def linears(block: Block) -> dict[str, tuple[int, int, bool]]:
        found = {f"self_attn.{name}": shape for name, shape in attention.items()}
        if block.experts is None:
            return {**found, **{f"mlp.{name}": shape for name, shape in mlp(one.inner).items()}}
        for number in range(block.experts.count):
            found.update({f"mlp.experts.{number}.{k}": shape for k, shape in mlp(block.experts.inner).items()})
        if block.experts.shared_inner is not None:
            found.update({f"mlp.shared_expert.{k}": shape for k, shape in mlp(block.experts.shared_inner).items()})
        return found

    def inside(block: Block) -> list[Weight]:
        found = []
        if one.head_norm is not None:
            sizes = (one.head_size, one.head_size) if one.head_norm == "head" else (query, key)
            side = "" if one.head_norm == "head" else "out"
            found = [Weight(f"{name}_norm", (size,), (side,)) for name, size in zip("qk", sizes, strict=True)]
        if block.experts is not None:
            found.append(Weight("gate", (hidden, block.experts.count), (None, None)))
            if block.experts.shared_inner is not None:
                found.append(Weight("shared_expert_gate", (hidden, 1), (None, None)))
        return found

    def linear(name: str, inputs: int, outputs: int, bias: bool) -> LinearOutline:
        weights = [Weight("weight", (inputs, outputs), ("in", "out"))]
        if bias:
            weights.append(Weight("bias", (outputs,), ("out",)))
        return LinearOutline(name, inputs, outputs, weights)

    return Outline(
        architecture=one,
        hidden=hidden,
        inner=one.inner,
        heads=one.heads,
        kv_heads=one.kv_heads,
        head_size=one.head_size,
        vocabulary=one.vocabulary,
        positions=one.positions,
        blocks=[
            [linear(f"model.layers.{number}.{name}", *shape) for name, shape in linears(block).items()]
            for number, block in enumerate(one.blocks)
        ],
        tied=one.tied,
        embedding=Weight("weight", (one.vocabulary, hidden), ("vocabulary", None)),
        head=None if one.tied else Weight("weight", (hidden, one.vocabulary), (None, "vocabulary")),
        norm=Weight("weight", (hidden,), (None,)),
        norms=sum(name is not None for name in vars(one.norms).values()),
        inside=[inside(block) for block in one.blocks],
    )


def operations(outline: Outline, number: int) -> tuple[float, float]:
    """Of a token's forward in a block's Linears that train, and in frozen ones (where an adapter's count as none)."""
    trained = frozen = 0.0
    block = outline.architecture.blocks[number]
    for linear in outline.blocks[number]:
        chosen = block.experts.chosen / block.experts.count if block.experts and ".experts." in linear.name else 1
        size = 2 * linear.in_features * linear.out_features * chosen
        if any(weight.name == "weight" and weight.trains for weight in linear.weights):
            trained += size
        else:
            frozen += size
    return trained, frozen

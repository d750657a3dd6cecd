"""What one rank holds of the model: parameters, pieces, gradients and optimizer state, in bytes, under a division."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from sft_parallel_4d.filling import Gradient, Layer
from sft_parallel_4d.outline import LinearOutline, Outline, Weight

ROW = ("o_proj", "down_proj")
"""Linears that tensor parallelism divides by their inputs; all others by their outputs."""
KEYS = ("k_proj", "v_proj")
"""Of the others, those whose outputs are key/value heads, which several ranks have where they are fewer."""


@dataclass(frozen=True)
class Precision:
    """Bits of the weights that the run's precision decides about, and of the residual stream; of matrix products; and
    of matrices that do not train."""

    weights: int = 32
    products: int = 32
    frozen: int | None = None
    """None: as the other weights."""

    def bits(self, weight: Weight) -> int:
        """Of a value of ``weight``."""
        if weight.bits is not None:
            return weight.bits
        return self.weights if weight.trains or len(weight.shape) == 1 else self.frozen or self.weights

    def casts(self, weight: Weight) -> bool:
        """Whether a product with ``weight`` keeps a copy of it in fewer bits until backward."""
        return len(weight.shape) > 1 and self.bits(weight) > self.products


@dataclass(frozen=True)
class Division:
    """By what a rank's weights are divided: ``tensor`` ranks, of which ``copies`` neighbours have the same key/value
    heads, ``shards`` pieces of what it then has, and ``experts`` ranks that share out those of a block."""

    tensor: int = 1
    shards: int = 1
    copies: int = 1
    experts: int = 1


@dataclass(frozen=True)
class Size:
    """Bytes, but for ``values``, ``trained`` and ``stepped``, which are numbers of values."""

    values: int = 0
    trained: int = 0
    weights: int = 0
    matrices: int = 0
    """Of ``weights``, what stage 3 keeps in pieces alone."""
    whole: int = 0
    """Of ``weights``, what trains."""
    pieces: int = 0
    """Slices of what trains, with what fills it up to where fleet's buffers can be cut. Of one shard: all of it."""
    piece_gradients: int = 0
    """Of these, in float32."""
    frozen_pieces: int = 0
    """Slices of the other ``matrices``."""
    vectors: int = 0
    """Of ``whole``, what is so in stage 3, too."""
    vector_pieces: int = 0
    """Of ``pieces``, those of what is whole in stage 3, too."""
    unit_gradients: int = 0
    """Of ``piece_gradients``, those of matrices."""
    gradients: int = 0
    """Of whole parameters, in float32, in which they add up."""
    partial: int = 0
    """Of ``piece_gradients``, those that tensor ranks add up: of whole parameters that work on a part of a product."""
    norms: int = 0
    """Likewise with sequence parallelism: of RMSNorms."""
    copied: int = 0
    """Of ``piece_gradients``, those that ranks with the same key/value heads add up."""
    optimizer: int = 0
    passing: int = 0
    """Of the largest gradient on its way into a buffer: as backward gives it, and in float32."""
    widening: int = 0
    """The same of 16-bit parameters alone, whose gradients pass into sums that stay whole, too."""
    stepped: int = 0
    """Values of the largest parameter: a slice may have it whole."""
    few: int = 0
    """Values of the gradients that are put together for their norm on a CPU."""

    @property
    def matrix_pieces(self) -> int:
        """Pieces of ``matrices``."""
        return self.pieces - self.vector_pieces + self.frozen_pieces

    def __add__(self, other: Size) -> Size:
        mine, theirs = vars(self), vars(other)  # dataclasses.astuple copies, which thousands of plans would wait for
        return Size(**{k: max(one, theirs[k]) if k in _LARGEST else one + theirs[k] for k, one in mine.items()})


Weights = tuple[tuple[Weight, str], ...]
"""Each with the divided side of its Linear, as :func:`divided` has it: "" of a norm of the residual stream, "out" of
what lies within attention and MLP beside Linears."""
_LARGEST = ("passing", "widening", "stepped")
FEW = 1 << 14
"""Values of a gradient that is put together with others for the norm, as the core has it."""
ALIGNED = 256
"""At multiples of so many bytes parameters begin in fleet's buffers, and slices end."""


def divided_side(linear: str) -> str:
    """The divided side of a Linear: "in" or "out"."""
    return "in" if linear.endswith(ROW) else "out"


def key_copies(outline: Outline, tensor: int) -> int:
    """How many of ``tensor`` ranks have the same key/value heads."""
    return max(1, tensor // outline.kv_heads)


def divided(weight: Weight, side: str, division: Division) -> int:
    """Values of ``weight`` on one rank, the fullest; ``side`` is the divided one of its Linear ("keys": outputs, which
    are key/value heads), "" if it has none."""
    position = _divided_dimension(weight, side)
    if position is None:
        return weight.size
    ways = division.tensor // division.copies if side == "keys" else division.tensor
    return weight.size // weight.shape[position] * math.ceil(weight.shape[position] / ways)


def _divided_dimension(weight: Weight, side: str) -> int | None:
    side = "out" if side == "keys" else side
    for position, kind in enumerate(weight.sides):
        if kind in ("vocabulary", "all") or (side and kind == side):
            return position
    return None


@cache
def size_of(weight: Weight, side: str, division: Division, precision: Precision) -> Size:
    """What ``weight`` takes on one rank.

    AdamW keeps two float32 moments a value and two float32 powers a tensor, other optimizers what their plugins say of
    them; over 16-bit weights there is also a float32 master.
    Gradients add up in float32 whatever the weights are.
    """
    values = divided(weight, side, division)
    bits = precision.bits(weight)
    held, stepped = math.ceil(values * bits / 8), math.ceil(values / division.shards)
    step = ALIGNED * 8 // bits * division.shards
    piece = -(-values // step) * step // division.shards
    # A frozen tensor whose bits a technique decides is no parameter: codes, or a pair beside the base.
    parameter = weight.trains or weight.bits is None
    matrices = held if parameter and len(weight.shape) > 1 else 0
    if not weight.trains:
        return Size(values, 0, held, matrices, frozen_pieces=piece * bits // 8 if matrices else 0)
    is_whole = _divided_dimension(weight, side) is None
    is_partial = side and division.tensor > 1 and is_whole
    is_copied = side == "keys" and division.copies > 1 and not is_whole
    is_norm = not side and weight.sides == (None,)
    return Size(
        values,
        values,
        held,
        matrices,
        whole=held,
        pieces=piece * bits // 8,
        piece_gradients=4 * piece,
        vectors=0 if matrices else held,
        vector_pieces=0 if matrices else piece * bits // 8,
        unit_gradients=4 * piece if matrices else 0,
        gradients=4 * values,
        partial=4 * piece if is_partial else 0,
        copied=4 * piece if is_copied else 0,
        norms=4 * piece if is_norm else 0,
        optimizer=_state(weight, stepped) + (4 * stepped if bits < 32 else 0),
        passing=held + (4 * values if bits < 32 else 0),
        widening=held + 4 * values if bits < 32 else 0,
        stepped=values,
        few=stepped if values <= FEW else 0,
    )


def _state(weight: Weight, piece: int) -> int:
    """Bytes that the optimizer keeps of ``piece`` values of ``weight``, without a master."""
    return 8 * piece + 8 if weight.state is None else math.ceil(weight.state * piece / weight.size)


@cache
def total(weights: Weights, division: Division, precision: Precision) -> Size:
    """Of weights, each with the divided side of its Linear, on one rank."""
    return sum((size_of(weight, side, division, precision) for weight, side in weights), Size())


def of_block(outline: Outline, number: int) -> Weights:
    """The weights of a transformer block."""
    return beside_experts(outline, number) + of_experts(outline, number)


def beside_experts(outline: Outline, number: int) -> Weights:
    """Of a block's weights, all but :func:`of_experts`, as forward meets them."""
    norms, norm = outline.architecture.norms, (outline.norm, "")
    inside = [(weight, "out") for weight in outline.inside[number]]
    of_heads = [pair for pair in inside if pair[0].name.endswith("_norm")]
    routing = [pair for pair in inside if not pair[0].name.endswith("_norm")]
    linears = [linear for linear in outline.blocks[number] if _expert(linear.name) is None]
    attention = (linear for linear in linears if ".self_attn." in linear.name)
    first, last = norms.before_attention is not None, norms.after_mlp is not None
    between = (norm,) * (outline.norms - first - last)
    mlp = (*routing, *_sided(linear for linear in linears if ".self_attn." not in linear.name))
    return (*(norm,) * first, *of_heads, *_sided(attention), *between, *mlp, *(norm,) * last)


def of_experts(outline: Outline, number: int, experts: int = 1) -> Weights:
    """Of a block's weights, those of experts that tokens are led to; of ``experts`` ranks those of the first: the
    others have as many of the same shapes."""
    mixture = outline.architecture.blocks[number].experts
    if mixture is None:
        return ()
    own = range(mixture.count // experts)
    return tuple(_sided(linear for linear in outline.blocks[number] if _expert(linear.name) in own))


def first_alike(outline: Outline) -> list[int]:
    """Of each block the first one that has the same in it, and keeps and computes the same."""
    seen, found = list[tuple[int, object]](), list[int]()
    for number, (block, linears) in enumerate(zip(outline.architecture.blocks, outline.blocks, strict=True)):
        named = [vars(linear) | {"name": linear.name.removeprefix(f"model.layers.{number}.")} for linear in linears]
        kind = block, outline.inside[number], named
        first = next((other for other, known in seen if known == kind), number)
        if first == number:
            seen.append((number, kind))
        found.append(first)
    return found


@cache
def _expert(linear: str) -> int | None:
    """Which of its block's experts a Linear belongs to; None: to none that tokens are led to."""
    _, _, number = linear.partition(".experts.")
    return int(number.partition(".")[0]) if number else None


@cache
def _side(linear: str) -> str:
    return "keys" if linear.endswith(KEYS) else divided_side(linear)


def _sided(linears: Iterable[LinearOutline]) -> Iterator[tuple[Weight, str]]:
    for linear in linears:
        side = _side(linear.name)
        yield from ((weight, side) for weight in linear.weights)


def summed(outline: Outline, number: int) -> int:
    """What tensor ranks add up in a block's Linears each time it goes forward, in values."""
    return sum(linear.summed for linear in outline.blocks[number] if linear.name.endswith(ROW))


@dataclass(frozen=True, eq=False)
class Stage:
    """What one pipeline stage holds on one tensor-parallel rank."""

    blocks: tuple[int, ...]
    size: Size
    """Of everything the stage holds."""
    largest_block: Size
    experts: Size
    """Of ``size``, the experts that tokens are led to, as one rank has them: ranks that share experts out have the same
    ones more seldom than the rest."""
    embedding: Size
    head: Size
    """lm_head, or the embedding where it is one with it; both are of nothing in stages that have none."""
    first: bool
    last: bool


Blocks = list[tuple[Size, Size]]
"""What each block takes on a rank, and of that what experts take that tokens are led to."""


def blocks_of(outline: Outline, division: Division, precision: Precision, alike: Sequence[int] | None = None) -> Blocks:
    """As :func:`stages` takes them; ``alike`` is what :func:`first_alike` says."""
    found: dict[int, tuple[Size, Size]] = {}
    alike = range(len(outline.blocks)) if alike is None else alike
    for number in set(alike):
        experts = total(of_experts(outline, number, division.experts), division, precision)
        found[number] = total(beside_experts(outline, number), division, precision) + experts, experts
    return [found[number] for number in alike]


def stages(
    outline: Outline,
    division: Division,
    pipeline: int,
    precision: Precision,
    virtual: int = 1,
    blocks: Blocks | None = None,
) -> list[Stage]:
    """The stages of ``pipeline``, in order, each of whole blocks; ``virtual`` parts of the model are on each. Whoever
    knows what :func:`blocks_of` says of ``division`` gives it as ``blocks``."""
    blocks = blocks or blocks_of(outline, division, precision)

    def one(weight: Weight) -> Size:
        return size_of(weight, "", division, precision)

    embedding, norm = one(outline.embedding), one(outline.norm)
    head = embedding if outline.head is None else one(outline.head)
    shared = sum(map(one, outline.shared), Size())
    found = []
    parts = list(pairwise(cut(len(blocks), pipeline * virtual)))
    for stage in range(pipeline):
        here = tuple(number for start, stop in parts[stage::pipeline] for number in range(start, stop))
        first, last = stage == 0, stage == pipeline - 1
        mine = [*([embedding] if first else []), *(blocks[number][0] for number in here), *([norm] if last else [])]
        if last and not (first and outline.head is None):  # a tied matrix is on the first stage, and on the last
            mine.append(head)
        largest = max((blocks[number][0] for number in here), key=lambda size: size.matrices)
        experts = sum((blocks[number][1] for number in here), Size())
        ends = (embedding if first else Size()), (head if last else Size())
        found.append(Stage(here, sum(mine, shared), largest, experts, *ends, first, last))
    return found


def cut(blocks: int, pipeline: int) -> list[int]:
    """Where stages begin and end among the blocks; as even as can be, longer ones last."""
    return [blocks * stage // pipeline for stage in range(pipeline + 1)]


@cache
def _gradient(weight: Weight, side: str, division: Division, precision: Precision, sequence: bool) -> Gradient:
    """Of a ``weight`` that trains, on one rank, with ``sequence`` parallelism or without; of like ones one object."""
    size, bits = size_of(weight, side, division, precision), precision.bits(weight)
    kind = bool(size.partial or (sequence and size.norms)), bool(size.copied), bits
    return Gradient(size.gradients, 4 * ALIGNED * 8 // bits, size.passing, len(weight.shape) > 1, kind)


def layers(
    outline: Outline, blocks: Sequence[int], ends: tuple[bool, bool], division: Division, precision: Precision,
    sequence: bool,
) -> list[Layer]:  # fmt: skip
    """The gradients of a stage that has ``blocks``: of the embedding, of each block, and of what comes after these;
    ``ends``: whether it is the first stage, and the last."""
    is_first, is_last = ends

    def of(weights: Weights) -> tuple[Gradient, ...]:
        return tuple(_gradient(*pair, division, precision, sequence) for pair in weights if pair[0].trains)

    found = {
        number: Layer(of(beside_experts(outline, number)), of(of_experts(outline, number, division.experts)))
        for number in set(blocks)
    }
    embedding = of(((outline.embedding, ""),))
    if outline.head is None and not (is_first and is_last):  # what another stage adds to has a buffer of its own
        embedding = tuple(replace(gradient, kind="tied") for gradient in embedding)
    head = () if outline.head is None else ((outline.head, ""),)
    # A tied matrix has the embedding's place in the last stage, too: there its buffer leaves when backward is over.
    first = Layer(embedding if is_first or (is_last and not head) else ())
    last = Layer(of(((outline.norm, ""), *head)) if is_last else ())
    return [first, *(found[number] for number in blocks), last]

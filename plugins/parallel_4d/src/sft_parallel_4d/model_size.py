"""What one rank holds of the model: parameters, gradients and optimizer state, in bytes, under a division."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from sft import LinearOutline, Outline, Weight

ROW = ("o_proj", "down_proj")
"""Linears that tensor parallelism divides by their inputs; all others by their outputs."""


@dataclass(frozen=True)
class Precision:
    """Bits of the weights that the run's precision decides about, of matrix products, and of the residual stream."""

    weights: int = 32
    products: int = 32

    @property
    def casts(self) -> bool:
        """Whether each matrix product keeps a 16-bit copy of its float32 weight until backward (O1)."""
        return self.weights > self.products


@dataclass(frozen=True)
class Size:
    """Bytes, but for ``values`` and ``trained``, which are numbers of values."""

    values: int = 0
    trained: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    largest: int = 0
    """Values of the largest tensor that trains."""

    def __add__(self, other: Size) -> Size:
        return Size(
            self.values + other.values,
            self.trained + other.trained,
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            max(self.largest, other.largest),
        )


def divided(weight: Weight, linear: str, tensor: int) -> int:
    """Values of ``weight`` on one of ``tensor`` ranks; ``linear`` is the name of its Linear, "" of none."""
    side = "in" if linear.endswith(ROW) else "out"
    for position, kind in enumerate(weight.sides):
        if kind in ("vocabulary", "all") or (linear and kind == side):
            return weight.size // weight.shape[position] * math.ceil(weight.shape[position] / tensor)
    return weight.size


def size_of(weight: Weight, values: int, precision: Precision) -> Size:
    """What ``values`` values of ``weight`` take.

    AdamW keeps two float32 moments a value and two float32 powers a tensor; over 16-bit weights also a float32 master
    and, from the first step on, its float32 gradient.
    """
    bits = weight.bits or precision.weights
    held = math.ceil(values * bits / 8)
    if not weight.trains:
        return Size(values, 0, held)
    master = 4 * values if bits < 32 else 0
    return Size(values, values, held, held + master, 8 * values + 8 + master, values)


def total(pairs: Iterable[tuple[Weight, str]], tensor: int, precision: Precision) -> Size:
    """Of weights, each with its Linear's name, on one of ``tensor`` ranks."""
    return sum((size_of(w, divided(w, linear, tensor), precision) for w, linear in pairs), Size())


def of_block(outline: Outline, block: list[LinearOutline]) -> Iterator[tuple[Weight, str]]:
    """The weights of a transformer block, each with its Linear's name."""
    yield from ((outline.norm, ""), (outline.norm, ""))
    for linear in block:
        yield from ((weight, linear.name) for weight in linear.weights)


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage holds on one tensor-parallel rank."""

    blocks: range
    size: Size
    """Of everything the stage holds."""
    largest_block: Size
    """Of its largest part that is used at a time: a block, the embedding or lm_head."""
    first: bool
    last: bool


def stages(outline: Outline, tensor: int, pipeline: int, precision: Precision) -> list[Stage]:
    """The stages of ``pipeline``, in order, each of whole blocks."""
    blocks = [total(of_block(outline, block), tensor, precision) for block in outline.blocks]
    embedding = total([(outline.embedding, "")], tensor, precision)
    norm = total([(outline.norm, "")], tensor, precision)
    # A tied matrix is on the first and on the last stage.
    tied = embedding if pipeline > 1 else Size()
    head = tied if outline.head is None else total([(outline.head, "")], tensor, precision)
    shared = total([(weight, "") for weight in outline.shared], tensor, precision)
    found = []
    for start, stop in pairwise(cut(len(blocks), pipeline)):
        first, last = start == 0, stop == len(blocks)
        mine = [*([embedding] if first else []), *blocks[start:stop], *([norm, head] if last else [])]
        largest = max(mine, key=lambda size: size.values)
        found.append(Stage(range(start, stop), sum(mine, shared), largest, first, last))
    return found


def cut(blocks: int, pipeline: int) -> list[int]:
    """Where stages begin and end among the blocks; as even as can be, longer ones last."""
    return [blocks * stage // pipeline for stage in range(pipeline + 1)]

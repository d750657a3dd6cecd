"""What of a model this process holds, where several share it; on one process every tensor is whole and here.

A strategy marks what it divides: a parameter (and the Linear that it is the weight of) gets ``sft_part``, a parameter
that another process holds gets ``sft_elsewhere`` and is never allocated. Unmarked tensors are whole. A layer in the
place of a divided Linear gets ``sft_sums``: the divided side, and what sums a tensor over the processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """Part ``index`` of ``count`` equal ones, along ``axis``, of a tensor of ``shape``."""

    shape: tuple[int, ...]
    axis: int
    index: int
    count: int

    @property
    def where(self) -> tuple[slice, ...]:
        """The part's place in the whole."""
        size = self.shape[self.axis] // self.count
        here = slice(self.index * size, (self.index + 1) * size)
        return tuple(here if axis == self.axis else slice(0, length) for axis, length in enumerate(self.shape))


def part_of(tensor: Any) -> Part | None:
    """What part of a whole a parameter, or a Linear's weight, is; None: all of it."""
    part: Part | None = getattr(tensor, "sft_part", None)
    return part


def whole_shape(tensor: Any) -> tuple[int, ...]:
    """The shape of the tensor that ``tensor`` is a part of."""
    part = part_of(tensor)
    return part.shape if part is not None else tuple(tensor.shape)


def is_elsewhere(parameter: Any) -> bool:
    """Whether another process holds this parameter."""
    return bool(getattr(parameter, "sft_elsewhere", False))


def sum_over(layer: Any, side: str, values: Any) -> Any:
    """The sum of ``values`` over the processes that divide the ``side`` ("in" or "out") of the Linear in whose place
    ``layer`` stands; each gets it. Where that side is whole, as on one process: ``values`` themselves.

    For a layer whose ``forward`` needs something of a whole dimension that processes share, such as a norm over all
    inputs: ``values`` is a tensor of any shape that each has from its own part. Gradients flow through it. Every
    process that has the layer calls it, and in the same order.
    """
    if side not in ("in", "out"):
        raise ValueError(f'The sides of a Linear are "in" and "out", not {side!r}.')
    total = getattr(layer, "sft_sums", {}).get(side)
    return values if total is None else total(values)


def size_of(parameter: Any) -> int:
    """The number of values of the whole tensor."""
    size = 1
    for length in whole_shape(parameter):
        size *= length
    return size

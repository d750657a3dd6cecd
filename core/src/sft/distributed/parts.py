"""What of a model this process holds, where several share it; on one process every tensor is whole and here.

A strategy marks what it divides: a parameter (and the Linear that it is the weight of) gets ``sft_part``, a parameter
that another process holds gets ``sft_elsewhere`` and is never allocated. Unmarked tensors are whole. A layer in the
place of a divided Linear gets ``sft_sums``: the divided side, and what sums a tensor over the processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Part:
    """Part ``index`` of ``count`` equal ones, along ``axis``, of a tensor of ``shape``.

    Where several matrices lie in one tensor (q, k and v), ``fused`` says how long each is along the axis; the part is
    that of each of them, one after the other.
    """

    shape: tuple[int, ...]
    axis: int
    index: int
    count: int
    fused: tuple[int, ...] = ()

    @property
    def places(self) -> list[tuple[slice, ...]]:
        """Where in the whole its values lie, in their order along the axis."""
        found, start = [], 0
        for length in self.fused or (self.shape[self.axis],):
            size = length // self.count
            here = slice(start + self.index * size, start + (self.index + 1) * size)
            found.append(tuple(here if axis == self.axis else slice(0, n) for axis, n in enumerate(self.shape)))
            start += length
        return found

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The part's own shape."""
        lengths = [place[self.axis].stop - place[self.axis].start for place in self.places]
        return tuple(sum(lengths) if axis == self.axis else n for axis, n in enumerate(self.shape))

    @property
    def order(self) -> np.ndarray | None:
        """For each place along the axis of the whole, where it is among the parts of all ranks, one after the other;
        None: at the same place."""
        if not self.fused:
            return None
        ranks = (Part(self.shape, self.axis, index, self.count, self.fused) for index in range(self.count))
        slices = [place[self.axis] for rank in ranks for place in rank.places]
        return np.argsort(np.concatenate([np.arange(one.start, one.stop) for one in slices]))

    def read(self, read: Callable[[tuple[slice, ...]], np.ndarray]) -> np.ndarray:
        """The part's values, where ``read`` gives what is at a place of the whole."""
        found = [read(place) for place in self.places]
        return found[0] if len(found) == 1 else np.concatenate(found, axis=self.axis)

    def write(self, values: np.ndarray, whole: np.ndarray) -> None:
        """Put the part's ``values`` in their place of ``whole``."""
        start = 0
        for place in self.places:
            stop = start + place[self.axis].stop - place[self.axis].start
            here = slice(start, stop)
            whole[place] = values[tuple(here if axis == self.axis else slice(None) for axis in range(values.ndim))]
            start = stop


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


def whole_size(parameter: Any) -> int:
    """The number of values of the whole tensor."""
    size = 1
    for length in whole_shape(parameter):
        size *= length
    return size

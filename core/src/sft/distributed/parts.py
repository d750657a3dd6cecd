"""Which parts of a model this process holds, where several share it. On one process every tensor is whole and here.

A strategy marks what it divides. A parameter, and the Linear that it is the weight of, may be a :class:`Part` of a
whole (:func:`mark_part`), or be held by other processes (:func:`mark_stage`, :func:`mark_owner`): then it is never
allocated here. A layer in the place of a divided Linear is told how to sum over the processes (:func:`mark_sums`). What
is not marked is whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Part:
    """Part ``index`` of ``count``, along ``axis``, of a tensor of ``shape``. Where ``count`` does not divide the
    length, parts differ by one.

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
        places, start = [], 0
        for length in self.fused or (self.shape[self.axis],):
            first, last = length * self.index // self.count, length * (self.index + 1) // self.count
            here = slice(start + first, start + last)
            places.append(tuple(here if axis == self.axis else slice(0, n) for axis, n in enumerate(self.shape)))
            start += length
        return places

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
        """The part's values, of its shape; ``read`` gives the values at a place of the whole, of any dtype."""
        pieces = [read(place) for place in self.places]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.axis)

    def write(self, values: np.ndarray, whole: np.ndarray) -> None:
        """Copy the part's ``values``, of its shape, to their places in ``whole``."""
        start = 0
        for place in self.places:
            stop = start + place[self.axis].stop - place[self.axis].start
            here = slice(start, stop)
            whole[place] = values[tuple(here if axis == self.axis else slice(None) for axis in range(values.ndim))]
            start = stop


@dataclass(frozen=True)
class _Marks:
    """What a strategy has said of one tensor or layer."""

    part: Part | None = None
    stage: int | None = None
    owner: int | None = None
    elsewhere: bool = False
    sums: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)


_MARKS = "_marks_of_division"
"""The attribute in which a tensor or layer carries its marks: they end with it, and belong to no other."""


def _marks_of(tensor: Any) -> _Marks:
    return getattr(tensor, _MARKS, None) or _Marks()


def _mark(tensor: Any, **marks: Any) -> None:
    setattr(tensor, _MARKS, replace(_marks_of(tensor), **marks))


def mark_part(tensor: Any, part: Part | None) -> None:
    """Say that ``tensor``, a parameter or a Linear, is a ``part`` of a whole. None: it is whole."""
    _mark(tensor, part=part)


def part_of(tensor: Any) -> Part | None:
    """What part of a whole a parameter, or a Linear's weight, is; None: all of it."""
    return _marks_of(tensor).part


def whole_shape(tensor: Any) -> tuple[int, ...]:
    """The shape of the tensor that ``tensor`` is a part of."""
    part = part_of(tensor)
    return part.shape if part is not None else tuple(tensor.shape)


def whole_size(parameter: Any) -> int:
    """The number of values of the whole tensor."""
    return math.prod(whole_shape(parameter))


def mark_stage(tensor: Any, stage: int, *, here: bool) -> None:
    """Say to which ``stage`` of a model whose blocks are shared out a parameter or a layer belongs, and whether this
    process holds it."""
    _mark(tensor, stage=stage, elsewhere=not here)


def stage_of(tensor: Any) -> int | None:
    """The stage that a parameter or a layer belongs to; None where nobody has said."""
    return _marks_of(tensor).stage


def mark_owner(tensor: Any, owner: int, *, here: bool) -> None:
    """Say which ``owner`` has a parameter or a layer, of the processes among which the layers of one block are shared
    out, as its experts may be; and whether it is this one. To be said after its stage."""
    _mark(tensor, owner=owner, elsewhere=_marks_of(tensor).elsewhere or not here)


def owner_of(tensor: Any) -> int | None:
    """Which of the processes that share out the layers of a block has a parameter or a layer; None: each has it."""
    return _marks_of(tensor).owner


def copy_place(old: Any, new: Any) -> None:
    """Let the parameter or layer ``new`` be where ``old`` is."""
    marks = _marks_of(old)
    _mark(new, stage=marks.stage, owner=marks.owner, elsewhere=marks.elsewhere)


def is_elsewhere(parameter: Any) -> bool:
    """Whether another process holds this parameter, or this layer."""
    return _marks_of(parameter).elsewhere


def mark_sums(layer: Any, side: str, total: Callable[[Any], Any]) -> None:
    """Say that processes divide the ``side`` ("in" or "out") of the Linear in whose place ``layer`` stands, and that
    ``total`` sums a tensor over them."""
    _mark(layer, sums={side: total})


def sum_over(layer: Any, side: str, values: Any) -> Any:
    """The sum of ``values`` over the processes that divide the ``side`` ("in" or "out") of the Linear in whose place
    ``layer`` stands; each gets it. Where that side is whole, as on one process: ``values`` themselves.

    For a layer whose ``forward`` needs a value that depends on a whole dimension, such as a norm over all inputs, where
    processes share that dimension. Each process passes the ``values`` of its own part, a tensor of any shape. Gradients
    flow through the sum. Every process that has the layer must call this, and in the same order.
    """
    if side not in ("in", "out"):
        raise ValueError(f'The sides of a Linear are "in" and "out", not {side!r}.')
    total = _marks_of(layer).sums.get(side)
    return values if total is None else total(values)


def copy_marks(old: Any, new: Any) -> None:
    """Give the layer ``new``, which takes the place of ``old``, the marks of that."""
    setattr(new, _MARKS, _marks_of(old))

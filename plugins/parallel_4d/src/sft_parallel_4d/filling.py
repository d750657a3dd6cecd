"""Which gradients share a buffer, when it leaves, and how much of all buffers is whole at a time in sharding's stages 2
and 3: what ``Buckets`` does, on paper.

A buffer is whole from the first gradient that comes into it until the one behind it has been sent. Buffers leave in one
order, each when it is full; those of experts when backward is through with the last block of theirs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

Place = tuple[int, bool, int]
"""A layer, counted from the last one; whether it is an expert's; and a number there, from the last one, too."""


@dataclass(frozen=True)
class Gradient:
    """What a parameter that trains has: bytes by themselves in float32; in its buffer, with what fills that up; and of
    the gradient on its way there."""

    own: int
    size: int
    passing: int
    is_matrix: bool
    kind: Hashable = None
    """Those of one kind alone share buffers."""


@dataclass(frozen=True)
class Layer:
    """The embedding, a block, or what comes after the blocks: its gradients as forward meets the parameters."""

    gradients: tuple[Gradient, ...] = ()
    experts: tuple[Gradient, ...] = ()


@dataclass(frozen=True)
class Whole:
    """Bytes of whole buffers, with what is on its way into them."""

    most: int
    """Beside the slices of all sums."""
    growing: int
    """The same in a first micro-batch, with those slices that are there by then."""
    begun: int
    """Beside slices, when the first gradient of the last block is there."""
    inside: int
    """The most beside slices while backward is in the last block, but for what is on its way."""
    left: int
    """Beside slices, until the next micro-batch goes back."""


def whole(layers: Sequence[Layer], bucket: int, shards: int, in_units: bool) -> Whole:
    """What is whole while backward goes through ``layers``: the embedding, blocks, and what comes after them. Buffers
    have ``bucket`` bytes or just more; ``in_units``: those of a layer's matrices are one. Each of ``shards`` processes
    keeps a slice of each."""
    gradients = dict(_places(layers))
    backward, begun, inside = _Backward(gradients, bucket, shards, in_units), 0, 0
    for turn, some in groupby(gradients, key=lambda place: place[0]):
        here = list(some)
        for place in sorted(here, key=lambda place: not place[1]):
            backward.come(place)
            if turn == 1:
                begun, inside = begun or backward.now + gradients[place].passing, max(inside, backward.now)
            if not place[1]:
                backward.is_through(place)
        for place in here:
            if place[1]:
                backward.is_through(place)
    backward.cut_last()
    return Whole(backward.most, backward.growing, begun, inside, backward.left)


@dataclass(frozen=True)
class Bucket:
    """A buffer of gradients: full when backward is through with so many ``layers``, of the last one in part, and its
    bytes. (Backward is taken to go through a layer as evenly as through its gradients' bytes.)"""

    layers: float
    size: int
    of_experts: bool


def leaving(layers: Sequence[Layer], bucket: int) -> list[Bucket]:
    """Stages 0 to 2: all buffers of ``layers``, in the order in which they leave; ``bucket`` as for :func:`whole`."""
    gradients, through = dict(_places(layers)), dict[Place, float]()
    for _, some in groupby(gradients, key=lambda place: place[:2]):
        here = list(some)
        sums = list(accumulate(gradients[place].own for place in here))
        through |= {
            place: place[0] + (1.0 if place[1] else part / sums[-1]) for place, part in zip(here, sums, strict=True)
        }
    order = {place: number for number, place in enumerate(gradients)}
    buckets = sorted(_together(gradients, bucket, in_units=False), key=lambda places: order[places[-1]])
    latest = accumulate((through[places[-1]] for places in buckets), max)  # they leave one after the other
    return [
        Bucket(layers, sum(gradients[place].size for place in places), places[0][1])
        for layers, places in zip(latest, buckets, strict=True)
    ]


def _places(layers: Sequence[Layer]) -> Iterator[tuple[Place, Gradient]]:
    """All gradients, in the order in which backward is through with them."""
    for turn, layer in enumerate(reversed(layers)):
        for is_expert, some in enumerate((layer.gradients, layer.experts)):
            yield from (((turn, bool(is_expert), n), gradient) for n, gradient in enumerate(reversed(some)))


class _Buffer:
    def __init__(self, gradients: Sequence[Gradient]) -> None:
        self.size, self.due, self.is_begun = sum(one.size for one in gradients), len(gradients), False


class _Backward:
    def __init__(self, gradients: Mapping[Place, Gradient], bucket: int, shards: int, in_units: bool) -> None:
        self._gradients, self._shards = gradients, shards
        self._of: dict[Place, _Buffer] = {}
        for places in _together(gradients, bucket, in_units):
            self._of.update(dict.fromkeys(places, _Buffer([gradients[place] for place in places])))
        last = {buffer: number for number, buffer in enumerate(self._of[place] for place in gradients)}
        self._waiting = sorted(last, key=lambda buffer: -last[buffer])
        self._leaving: _Buffer | None = None
        self.now = self._sums = self.most = self.growing = 0

    @property
    def left(self) -> int:
        """What was sent last."""
        return 0 if self._leaving is None else self._leaving.size

    def come(self, place: Place) -> None:
        """A gradient is there."""
        buffer = self._of[place]
        self.now += 0 if buffer.is_begun else buffer.size
        buffer.is_begun = True
        self._note(self._gradients[place].passing)

    def _note(self, beside: int) -> None:
        self.most, self.growing = max(self.most, self.now + beside), max(self.growing, self.now + self._sums + beside)

    def is_through(self, place: Place) -> None:
        """No more comes to its parameter: what is full leaves."""
        self._of[place].due -= 1
        while self._waiting and not self._waiting[-1].due:
            if self._leaving is not None:
                slice_ = self.cut_last()
                self.now, self._sums = self.now - self._leaving.size, self._sums + slice_
            self._leaving = self._waiting.pop()

    def cut_last(self) -> int:
        """The slice of what was sent last, beside the whole."""
        slice_ = self.left // self._shards
        self._note(slice_)
        return slice_


def _together(gradients: Mapping[Place, Gradient], bucket: int, in_units: bool) -> Iterator[list[Place]]:
    """Which gradients are in one buffer."""
    kinds: dict[tuple[int | None, bool, Hashable], list[Place]] = {}
    for place, gradient in gradients.items():
        unit = place[0] if in_units and gradient.is_matrix else None
        kinds.setdefault((unit, place[1], gradient.kind), []).append(place)
    for (unit, *_), places in kinds.items():
        some, size = list[Place](), 0
        for place in places:
            some.append(place)
            size += gradients[place].own
            if unit is None and size >= bucket:
                yield some
                some, size = [], 0
        if some:
            yield some

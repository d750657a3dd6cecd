"""Which gradients share a buffer, when it leaves, and how much of all buffers is whole at a time in sharding's stages 2
and 3: what ``Buckets`` does, on paper.

A buffer is whole from the first gradient that comes into it until the one behind it has been sent. Buffers leave in one
order, each when it is full; those of experts when backward is through with the last block of theirs. How many processes
share slices decides about none of that, so a :class:`Course` is followed once for all of their numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

Place = tuple[int, bool, int]
"""A layer, counted from the last one; whether it is an expert's; and a number there, from the last one, too."""


@dataclass(frozen=True)
class Gradient:
    """What a parameter that trains has: bytes by themselves in float32; those to a multiple of which it is filled up in
    its buffer, for each process that has a slice; and those of the gradient on its way there."""

    own: int
    step: int
    passing: int
    is_matrix: bool
    kind: Hashable = None
    """Those of one kind alone share buffers."""

    def size(self, shards: int) -> int:
        """In its buffer, of which each of ``shards`` processes has a slice."""
        step = self.step * shards
        return -(-self.own // step) * step


@dataclass(frozen=True)
class Layer:
    """The embedding, a block, or what comes after the blocks: its gradients as forward meets the parameters."""

    gradients: tuple[Gradient, ...] = ()
    experts: tuple[Gradient, ...] = ()


@dataclass(frozen=True)
class Bucket:
    """A buffer of gradients: full when backward is through with so many ``layers``, of the last one in part.
    (Backward is taken to go through a layer as evenly as through its gradients' bytes.)"""

    layers: float
    of_experts: bool
    contents: tuple[tuple[Gradient, int], ...]
    """Gradients that are not alike, with how many there are of each."""

    def size(self, shards: int) -> int:
        """Bytes, of which each of ``shards`` processes has a slice."""
        return sum(gradient.size(shards) * count for gradient, count in self.contents)


@dataclass(frozen=True, eq=False)
class Course:
    """A micro-batch's backward through layers. Attributes:

    buckets: All buffers, in the order in which they leave.
    steps: What happens, by the number of a buffer: a gradient comes, which is so large on its way; or the buffer is
        full (None). With the layer, counted from the last one.
    """

    buckets: tuple[Bucket, ...]
    steps: tuple[tuple[int, int | None, int], ...]


@dataclass(frozen=True)
class Departure:
    """Buckets of one layer that leave when backward is through with so many ``layers``: their bytes, and how many they
    are; of experts, and of the rest."""

    layers: float
    size: int
    count: int
    expert_size: int
    expert_count: int


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


def course(layers: Sequence[Layer], bucket: int, in_units: bool) -> Course:
    """Backward through ``layers``: the embedding, blocks, and what comes after them. Buffers have ``bucket`` bytes or
    just more; ``in_units``: those of a layer's matrices are one."""
    gradients, through = dict(_places(layers)), dict[Place, float]()
    together = sorted(_together(gradients, bucket, in_units), key=lambda places: places[-1])
    of = {place: number for number, places in enumerate(together) for place in places}
    for turn, layer in enumerate(reversed(layers)):
        sums = list(accumulate(gradient.own for gradient in reversed(layer.gradients)))
        through |= {(turn, False, number): turn + part / sums[-1] for number, part in enumerate(sums)}
    ends = (through.get(places[-1], places[-1][0] + 1.0) for places in together)  # of experts with their layer
    latest = accumulate(ends, max)  # they leave one after the other
    buckets = tuple(
        Bucket(layers, places[0][1], _counted([gradients[place] for place in places]))
        for layers, places in zip(latest, together, strict=True)
    )
    return Course(buckets, tuple(_steps(gradients, of)))


def _counted(gradients: Sequence[Gradient]) -> tuple[tuple[Gradient, int], ...]:
    """By identity: of thousands of them, values would take seconds to compare."""
    counts, objects = Counter(map(id, gradients)), {id(gradient): gradient for gradient in gradients}
    return tuple((objects[one], count) for one, count in counts.items())


def _steps(gradients: dict[Place, Gradient], of: dict[Place, int]) -> Iterator[tuple[int, int | None, int]]:
    """Without those that change nothing: of what comes in a layer into buffers that are there, what is smaller."""
    due, there = Counter(of.values()), set[int]()
    for turn, some in groupby(gradients, key=lambda place: place[0]):
        ends, most = list[int](), -1
        for place in sorted(some, key=lambda place: not place[1]):
            number, passing = of[place], gradients[place].passing
            if number not in there or passing > most:
                most = passing
                there.add(number)
                yield number, passing, turn
            if place[1]:
                ends.append(number)
                continue
            due[number] -= 1
            if not due[number]:
                yield number, None, turn
                most = -1
        for number in ends:
            due[number] -= 1
            if not due[number]:
                yield number, None, turn


def departures(course: Course, shards: int) -> Iterator[Departure]:
    """The buckets of a ``course``, of which each of ``shards`` processes has slices. Of a layer's all but the last one
    are taken to leave as one, when the first is full: thousands of plans have hundreds of buckets."""
    for _, some in groupby(course.buckets, key=lambda bucket: math.ceil(bucket.layers)):
        *others, last = some
        for together in ([others] if others else []) + [[last]]:
            sizes = [[one.size(shards) for one in together if one.of_experts is experts] for experts in (False, True)]
            rest, of_experts = sizes
            yield Departure(together[0].layers, sum(rest), len(rest), sum(of_experts), len(of_experts))


def whole(course: Course, shards: int) -> Whole:
    """What is whole in the ``course`` of backward, where each of ``shards`` processes keeps a slice of each buffer."""
    backward, begun, inside = _Backward([bucket.size(shards) for bucket in course.buckets], shards), 0, 0
    for number, passing, turn in course.steps:
        if passing is None:
            backward.is_full(number)
            continue
        backward.come(number, passing)
        if turn == 1:
            begun, inside = begun or backward.now + passing, max(inside, backward.now)
    backward.cut_last()
    return Whole(backward.most, backward.growing, begun, inside, backward.left)


class _Backward:
    def __init__(self, sizes: Sequence[int], shards: int) -> None:
        self._sizes, self._shards = sizes, shards
        self._is_begun, self._is_full = ([False] * len(sizes) for _ in range(2))
        self._next = self.left = self.now = self._sums = self.most = self.growing = 0
        """``left``: what was sent last."""

    def come(self, number: int, passing: int) -> None:
        """A gradient is there."""
        if not self._is_begun[number]:
            self._is_begun[number] = True
            self.now += self._sizes[number]
        self._note(passing)

    def _note(self, beside: int) -> None:
        self.most, self.growing = max(self.most, self.now + beside), max(self.growing, self.now + self._sums + beside)

    def is_full(self, number: int) -> None:
        """No more comes into the buffer: what is full leaves."""
        self._is_full[number] = True
        while self._next < len(self._sizes) and self._is_full[self._next]:
            if self._next:
                slice_ = self.cut_last()
                self.now, self._sums = self.now - self.left, self._sums + slice_
            self.left = self._sizes[self._next]
            self._next += 1

    def cut_last(self) -> int:
        """The slice of what was sent last, beside the whole."""
        slice_ = self.left // self._shards
        self._note(slice_)
        return slice_


def _places(layers: Sequence[Layer]) -> Iterator[tuple[Place, Gradient]]:
    """All gradients, in the order in which backward is through with them."""
    for turn, layer in enumerate(reversed(layers)):
        for is_expert, some in enumerate((layer.gradients, layer.experts)):
            yield from (((turn, bool(is_expert), n), gradient) for n, gradient in enumerate(reversed(some)))


def _together(gradients: dict[Place, Gradient], bucket: int, in_units: bool) -> Iterator[list[Place]]:
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

"""Gradients travel in buckets of a stated size while backward goes on, and what is stepped gets its slices of them.

Collectives of all processes must match, and gradients come in an order that nothing promises. So buckets leave in one
fixed order, that of a usual backward pass: each as soon as it and all before it are full, and what is not full when
backward has ended (nothing has reached a parameter) then. A slice of a bucket is a flat range of a parameter, which is
what a checkpoint calls a piece.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import paddle

from sft import Norms, SftError
from sft_parallel_4d.fleet import Bucket, together
from sft_parallel_4d.internals import give, piece_over, put_back, taken, when_reached
from sft_parallel_4d.offload import Host
from sft_parallel_4d.topology import Axis, Topology

_IN_BLOCK = re.compile(r"model\.layers\.(\d+)\.(\w+)\.(\w+)")


@dataclass(frozen=True)
class Kinds:
    """What decides which gradients travel together: the axes, beside that of sharding, ``over`` which that of a
    parameter is summed; blocks with their ``experts``' parameters, which a micro-batch may never reach; and by identity
    what it may reach several times (``late``: they leave last), and what needs a bucket of its own (``alone``)."""

    over: Callable[[Any], tuple[Axis, ...]]
    experts: Sequence[tuple[Any, list[Any]]] = ()
    late: Set[int] = frozenset()
    alone: Set[int] = frozenset()

    @cached_property
    def with_block(self) -> set[int]:
        """The identities of parameters of which the end of their block says that backward is through with them."""
        return {id(parameter) for _, some in self.experts for parameter in some}

    def of(self, parameter: Any) -> Hashable:
        """What is equal of all that may share a bucket."""
        one = id(parameter)
        return self.over(parameter), one in self.late, one in self.with_block, one if one in self.alone else None


@dataclass
class _Way:
    """A bucket, the axes over which its sums are summed further, and which gradients it still waits for."""

    bucket: Bucket
    further: list[Axis]
    is_late: bool
    due: dict[int, int] = field(default_factory=dict)
    """How often backward will yet reach each parameter, by its identity; without those that it has been through."""


class Buckets:
    """The gradients of this process. ``stage`` is that of sharding (0: none), ``size`` of a bucket is in bytes, and
    ``host`` is where slices rest, if not on the device."""

    def __init__(self, at: Topology, stage: int, size: int, host: Host | None) -> None:
        self._at, self._stage, self._size, self._host = at, stage, size, host
        self._ways: list[_Way] = []
        self._of: dict[int, Bucket] = {}
        self._pieces: dict[int, Any] = {}
        self._next = self._count = self._micro = 0
        self._under_way: list[Iterator[None]] = []
        """What was sent, by :meth:`_legs`, each of which begins when the one before must have come."""
        self._open = False
        """Whether a step is under way: other gradients are none of ours."""
        self._wrong = ""
        """What was wrong in backward, which no error may leave."""

    def build(self, parameters: Sequence[Any], kinds: Kinds, units: Sequence[Bucket] = ()) -> None:
        """Put what trains into buckets, as far as it is in none of ``units`` yet. ``parameters`` are in the order of
        :func:`as_met`."""
        self._kinds = kinds
        groups: dict[Any, list[Any]] = {}
        there = {id(parameter) for unit in units for parameter in unit.params}
        place = {id(parameter): number for number, parameter in enumerate(reversed(parameters))}
        for parameter in reversed(parameters):  # as backward reaches them
            if id(parameter) not in there:
                groups.setdefault((kinds.of(parameter), str(parameter.dtype)), []).append(parameter)
        ways = [self._way(unit) for unit in units]
        for of_kind in groups.values():
            for first in self._axes(of_kind[0])[:1]:
                for some in together(of_kind, self._size):
                    bucket = Bucket(some, first.group, cut=self._stage > 0, adds=self._stage < 2, host=self._host)
                    ways.append(self._way(bucket))
        ways.sort(key=lambda way: (way.is_late, max(place[id(parameter)] for parameter in way.bucket.params)))
        for way in ways:
            self._take(way)
        for block, some in kinds.experts:
            self._tell_when_through(block, some)

    def _tell_when_through(self, block: Any, parameters: Sequence[Any]) -> None:
        ways = {id(parameter): way for way in self._ways for parameter in way.bucket.params}
        here = [(ways[id(parameter)], parameter) for parameter in parameters if id(parameter) in ways]

        def through(_: Any) -> None:
            for way, parameter in here if self._open else ():
                self._count_down(way, parameter)

        def after(layer: Any, inputs: tuple[Any, ...], result: Any) -> None:
            if here and paddle.is_grad_enabled() and not inputs[0].stop_gradient:
                inputs[0].register_hook(through)  # its gradient is the last of a block's

        block.register_forward_post_hook(after)

    def _way(self, bucket: Bucket) -> _Way:
        one = bucket.params[0]  # all are alike in this
        return _Way(bucket, self._axes(one)[1:], id(one) in self._kinds.late)

    def _axes(self, parameter: Any) -> list[Axis]:
        """Those over which a gradient is summed: the first one while backward goes on. None: it does not travel."""
        return [*([self._at.sharding] if self._stage else []), *self._kinds.over(parameter)]

    def _take(self, way: _Way) -> None:
        self._ways.append(way)
        for parameter in way.bucket.params:
            self._of[id(parameter)] = way.bucket
            when_reached(parameter, partial(self._arrived, way, parameter))
            if way.bucket.cut and self.holds(parameter):
                self._pieces[id(parameter)] = piece_over(way.bucket.within(way.bucket.kept, parameter))

    # --- what is stepped here ---

    def has(self, parameter: Any) -> bool:
        """Whether its gradient travels."""
        return id(parameter) in self._of

    def holds(self, parameter: Any) -> bool:
        """Whether any of its values are stepped here."""
        first, last = self.bounds(parameter)
        return first < last

    def bounds(self, parameter: Any) -> tuple[int, int]:
        """Which of its values are, in memory order."""
        bucket = self._of.get(id(parameter))
        return bucket.bounds(parameter) if bucket is not None else (0, math.prod(parameter.shape))

    def piece(self, parameter: Any) -> Any:
        """What is stepped for a parameter: itself, or flat what this process holds of it."""
        return self._pieces.get(id(parameter), parameter)

    def put(self, parameter: Any) -> None:
        """The parameter has a new value."""
        bucket = self._of.get(id(parameter))
        if bucket is not None and bucket.host is not None:
            bucket.put(parameter, parameter)

    # --- a step ---

    def begin(self, count: int) -> None:
        """A step begins in which backward will be gone through ``count`` times."""
        self._open, self._count, self._micro = True, count if self._stage < 2 else 1, count
        self._wrong, self._under_way = "", []  # an error may have ended the last one halfway
        for way in self._ways:
            way.bucket.forget()
        self._arm()

    def _arm(self) -> None:
        self._next = 0
        for way in self._ways:
            way.due = dict.fromkeys(map(id, way.bucket.params), self._count)

    @paddle.no_grad()
    def _arrived(self, way: _Way, parameter: Any) -> None:
        gradient = taken(parameter) if self._open else None
        if gradient is None:
            return
        if self._stage >= 2 and not self._next:  # the previous micro-batch's
            self._go_on()
        way.bucket.add(parameter, gradient)
        del gradient  # before buckets are sent, and others settled
        if id(parameter) not in self._kinds.with_block:
            self._count_down(way, parameter)
        elif id(parameter) not in way.due:
            self._wrong = _words(parameter)

    @paddle.no_grad()
    def _count_down(self, way: _Way, parameter: Any) -> None:
        """Backward has been through ``parameter`` once more: what is full now leaves."""
        if way.is_late:
            return
        left = way.due.pop(id(parameter), 0)
        if left > 1:
            way.due[id(parameter)] = left - 1
        elif not left:
            self._wrong = _words(parameter)
        while self._next < len(self._ways) and not (self._ways[self._next].due or self._ways[self._next].is_late):
            self._send()

    def _send(self) -> None:
        """Of all that is under way the next leg begins: what was sent last time is taken to have come."""
        way = self._ways[self._next]
        own = self._legs(way, is_whole=self._stage < 2 or self._micro == 1)
        next(own)
        # From stage 2 on there is, of all sums but this one's, no more than the slice. What goes no further may come
        # when it comes.
        if self._stage >= 2 or self._host is not None or way.further:
            self._go_on()
        self._under_way.append(own)
        self._next += 1

    def _legs(self, way: _Way, is_whole: bool) -> Iterator[None]:
        """A bucket's way: over the first axis, and if the sum of the step ``is_whole`` then, over the others, and to
        where it rests."""
        way.bucket.send()
        yield
        way.bucket.settle()
        for axis in way.further if is_whole else ():
            task = axis.begin_sum(way.bucket.sums)
            yield
            task.wait()
        if is_whole:
            way.bucket.rest_gradients()

    def _go_on(self) -> None:
        self._under_way = [legs for legs in self._under_way if next(legs, "come") != "come"]

    def _check(self) -> None:
        if self._wrong:
            raise SftError(
                f"Backward has reached the parameter {self._wrong} more than once in a micro-batch, or when it had "
                "left its block, and the sum of its gradients was on its way; leave out recompute, or the plugin whose "
                "layers share a parameter, or compute what an expert multiplies with."
            )

    @paddle.no_grad()
    def passed(self) -> None:
        """Backward of a micro-batch is through: from stage 2 on all that is left goes off."""
        self._check()
        if self._stage >= 2:
            self._send_all()
            self._micro -= 1
            self._arm()

    def _send_all(self) -> None:
        while self._next < len(self._ways):
            self._send()

    @paddle.no_grad()
    def finish(self) -> None:
        """All micro-batches are through: what is stepped has its gradient, summed over all processes."""
        self._check()
        if self._stage < 2:
            self._send_all()
        self._open = False
        while self._under_way:
            self._go_on()
        for way in self._ways:
            for parameter in way.bucket.params:
                self._give(way.bucket, parameter)

    def _give(self, bucket: Bucket, parameter: Any) -> None:
        if not bucket.cut:
            give(parameter, bucket.gradient(parameter).reshape(parameter.shape))
        elif self.holds(parameter):
            give(self._pieces[id(parameter)], bucket.gradient(parameter))

    @paddle.no_grad()
    def spread(self) -> None:
        """After a step: all processes get all new values."""
        cut = [way.bucket for way in self._ways if way.bucket.cut]
        for way in self._ways:
            way.bucket.forget()
        for bucket in cut:
            for parameter in filter(self.holds, bucket.params):
                put_back(self._pieces[id(parameter)], bucket.within(bucket.kept, parameter))
            bucket.renew()
        for task in [bucket.spread() for bucket in cut]:
            if task is not None:
                task.wait()


def as_met(parameters: Mapping[str, Any], norms: Norms) -> list[Any]:
    """``parameters``, as a model names them in turn, in the order in which forward meets them: a block has its
    ``norms`` behind its matrices, which would wait for them in backward. Experts lead, as backward is through with them
    when it is with their block."""
    order = (norms.before_attention, "self_attn", norms.after_attention, norms.before_mlp, "mlp", norms.after_mlp)
    turns = {part: turn for turn, part in enumerate(order)}

    def block_of(name: str) -> str:
        found = _IN_BLOCK.match(name)
        return found[1] if found else ""

    def turn(name: str) -> int:
        found = _IN_BLOCK.match(name)
        return turns.get(found[2], -1) if found and found[3] != "experts" else -1

    runs = [sorted(run, key=turn) for _, run in groupby(parameters, key=block_of)]
    return [parameters[name] for run in runs for name in run]


def shared_by(blocks: Iterable[Any]) -> set[int]:
    """The identities of parameters that several of ``blocks`` share, which recomputation goes back through one by
    one."""
    times = Counter(id(parameter) for block in blocks for parameter in block.parameters())
    return {one for one, count in times.items() if count > 1}


def of_experts(blocks: Iterable[Any]) -> list[tuple[Any, list[Any]]]:
    """The blocks that have experts, with all parameters of these."""
    mixtures = [block for block in blocks if hasattr(block.mlp, "experts")]
    return [(block, block.mlp.experts.parameters()) for block in mixtures]  # each once, also where experts share it


def _words(parameter: Any) -> str:
    return f"{parameter.name} {list(parameter.shape)}"

"""How long a step's gradients travel when its last backward is through: each bucket over the first axis, then what this
rank has of its sum over the data ranks beside sharding, then to the host, as ``buckets.py`` sends them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from sft_parallel_4d.filling import Departure
from sft_parallel_4d.machines import Machine, Way
from sft_parallel_4d.plans import Plan


@dataclass(frozen=True)
class Lane:
    """What buckets travel by: an axis, or "host", and the seconds of each of them."""

    axis: str
    seconds: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.seconds)


@dataclass(frozen=True)
class Travel:
    """Buckets, in the order in which they leave."""

    full: tuple[float, ...] = ()
    """The share of backward behind which each is full."""
    lanes: tuple[Lane, ...] = ()
    """By which each goes, one after the other. On a lane they queue."""
    holds: bool = False
    """Whether backward goes on, when a bucket leaves, only once those before it have come from the device's lane that
    they were on: where slices are all that stays of sums, or sums go on."""

    def spans(self, backward: float, lanes: int | None = None) -> tuple[list[list[tuple[float, float]]], float]:
        """Of each of the first ``lanes`` (all) when each bucket begins and ends there, in seconds from where the last
        backward begins, which takes ``backward`` by itself; and when it is over. A rank looks after what it has sent
        whenever another bucket leaves, and at the end."""
        own, count = self.lanes[:lanes], len(self.full)
        of_device = [leg for leg, lane in enumerate(own) if lane.axis != "host"] if self.holds else []
        spans: list[list[tuple[float, float]]] = [[] for _ in own]
        now, over, through = 0.0, 0.0, backward
        for turn, share in enumerate([*self.full, *[1.0] * len(own)]):
            now, over = now + (share - over) * backward, share
            if turn == count:
                through = now
            for leg, lane in enumerate(own):
                bucket = turn - leg
                if 0 <= bucket < count:
                    free, came = spans[leg][-1:], spans[leg - 1][bucket : bucket + 1] if leg else []
                    begin = max(now, *(end for _, end in (*free, *came)), 0.0)
                    spans[leg].append((begin, begin + lane.seconds[bucket]))
            if turn < count:
                now = max(now, *(spans[leg][turn - 1 - leg][1] for leg in of_device if leg < turn), 0.0)
        return spans, through

    def tails(self, backward: float) -> list[float]:
        """Of each lane how much longer than ``backward`` it and those before it are busy, or backward is held up."""
        spans, through = self.spans(backward)
        return list(accumulate((max(through, own[-1][1]) - backward for own in spans), max))


def travel(
    plan: Plan, machine: Machine, leaving: Sequence[Departure], through: list[float], ways: dict[str, Way]
) -> Travel:
    """Of a rank whose buckets are ``leaving``; ``through``: the share of backward that is over behind so many layers;
    ``ways`` of the axes "sharding" and "data". In stage 3 the first lane is empty: slices come by what brings weights
    (``timing.py``)."""
    lanes = [Lane("sharding" if plan.stage else "data", tuple(_first(plan, one, ways) for one in leaving))]
    if plan.stage and plan.copies > 1:
        lanes.append(Lane("data", tuple(_sums(plan, one, ways["data"]) for one in leaving)))
    if plan.offload:
        speed = machine.links * machine.host
        host = ((one.size + one.expert_size) / plan.pieces / speed for one in leaving)
        lanes.append(Lane("host", tuple(host)))
    if plan.stage == 3:
        lanes[0] = Lane("sharding", (0.0,) * len(leaving))
    holds = plan.stage >= 2 or plan.offload or len(lanes) > 1
    return Travel(tuple(_share(one, through) for one in leaving), tuple(lanes), holds)


def _first(plan: Plan, one: Departure, ways: dict[str, Way]) -> float:
    """Slices come together, or of ranks with the same parameters the sums of all."""
    if not plan.stage:
        return _sums(plan, one, ways["data"])
    sent = (plan.pieces - 1) / plan.pieces * (one.size + one.expert_size)
    return ways["sharding"].seconds(sent, one.count + one.expert_count) if plan.pieces > 1 else 0.0


def _sums(plan: Plan, one: Departure, way: Way) -> float:
    """Over ranks that have the same."""
    found = 0.0
    of_all = (one.size, one.count, plan.copies)
    of_experts = (one.expert_size, one.expert_count, plan.copies // plan.experts)
    for size, count, ranks in (of_all, of_experts):
        if count and ranks > 1:
            found += way.seconds(2 * (ranks - 1) / ranks * size / plan.pieces, count)
    return found


def _share(one: Departure, through: list[float]) -> float:
    whole = math.ceil(one.layers)
    return through[whole] - (through[whole] - through[whole - 1]) * (whole - one.layers)

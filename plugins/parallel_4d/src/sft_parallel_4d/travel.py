"""How long a step's gradients travel when its last backward is through: each bucket over the first axis, then what this
rank has of its sum over the data ranks beside sharding, then to the host, as ``buckets.py`` sends them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from sft_parallel_4d.filling import Bucket
from sft_parallel_4d.machines import Machine, Way
from sft_parallel_4d.model_size import Stage
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

    def spans(self, backward: float) -> list[list[tuple[float, float]]]:
        """Of each lane when each bucket begins and ends there, in seconds from where the last backward begins, which
        takes ``backward``. A rank looks after what it has sent whenever another bucket leaves, and at the end."""
        leaves = [share * backward for share in self.full] + [backward] * len(self.lanes)
        came, found = list(leaves), list[list[tuple[float, float]]]()
        for leg, lane in enumerate(self.lanes):
            free, own = 0.0, list[tuple[float, float]]()
            for number, seconds in enumerate(lane.seconds):
                begin = max(free, came[number], leaves[number + leg])
                free = came[number] = begin + seconds
                own.append((begin, free))
            found.append(own)
        return found

    def tails(self, backward: float) -> list[float]:
        """Of each lane how much longer than ``backward`` it and those before it are busy."""
        ends = (own[-1][1] for own in self.spans(backward))
        return list(accumulate((max(0.0, end - backward) for end in ends), max))


def travel(
    plan: Plan, machine: Machine, stage: Stage, buckets: Sequence[Bucket], through: list[float], ways: dict[str, Way]
) -> Travel:
    """Of a rank's ``buckets``; ``through``: the share of backward that is over behind so many layers; ``ways`` of the
    axes "sharding" and "data". In stage 3 the first lane is empty: slices come by what brings weights (``timing.py``).

    Of a layer's buckets all but the last one leave as one, when the first is full: thousands of plans have hundreds of
    buckets."""
    runs = list[tuple[float, list[Bucket]]]()
    for _, some in groupby(buckets, key=lambda bucket: math.ceil(bucket.layers)):
        *others, last = some
        runs += [(_share(run[0], through), run) for run in (others, [last]) if run]
    lanes = [Lane("sharding" if plan.stage else "data", tuple(_first(plan, run, ways) for _, run in runs))]
    if plan.stage and plan.copies > 1:
        lanes.append(Lane("data", tuple(sum(_sum(plan, bucket, ways["data"]) for bucket in run) for _, run in runs)))
    if plan.offload:
        speed = machine.links * machine.host
        lanes.append(Lane("host", tuple(sum(bucket.size for bucket in run) / plan.pieces / speed for _, run in runs)))
    if plan.stage == 3:
        lanes[0] = Lane("sharding", (0.0,) * len(runs))
    return Travel(tuple(share for share, _ in runs), tuple(lanes))


def _first(plan: Plan, run: Sequence[Bucket], ways: dict[str, Way]) -> float:
    """Slices come together, or of ranks with the same parameters the sums of all."""
    if plan.stage:
        ranks, way = plan.pieces, ways["sharding"]
        return sum(way.seconds((ranks - 1) / ranks * bucket.size) for bucket in run) if ranks > 1 else 0.0
    return sum(_sum(plan, bucket, ways["data"]) for bucket in run)


def _sum(plan: Plan, bucket: Bucket, way: Way) -> float:
    """Over ranks that have the same of it."""
    ranks = plan.copies // (plan.experts if bucket.of_experts else 1)
    return way.seconds(2 * (ranks - 1) / ranks * bucket.size / plan.pieces) if ranks > 1 else 0.0


def _share(bucket: Bucket, through: list[float]) -> float:
    whole = math.ceil(bucket.layers)
    return through[whole] - (through[whole] - through[whole - 1]) * (whole - bucket.layers)

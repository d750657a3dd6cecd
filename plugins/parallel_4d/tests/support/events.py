"""A step as events: what each rank does one after the other, what it waits for, and the wire that is busy meanwhile.

Written beside the planner's formulas, of which it knows nothing: a queue of events in time (float64), operations that
begin when their lane is free and all that they need is there.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Operation:
    """Takes ``seconds`` on a ``lane``, after all that it ``needs``, and after what stands before it on the lane."""

    name: Hashable
    lane: Hashable
    seconds: np.float64
    needs: list[Hashable] = field(default_factory=list)
    lags: dict[Hashable, float] = field(default_factory=dict)
    """Seconds on the way from what is needed."""


def simulate(operations: Iterable[Operation]) -> dict[Hashable, tuple[float, float]]:
    """When each operation begins and ends; operations of a lane in the order in which they are given. Raises
    RuntimeError where they wait for each other for ever."""
    lanes: dict[Hashable, list[Operation]] = {}
    for one in operations:
        lanes.setdefault(one.lane, []).append(one)
    waiting = dict.fromkeys(lanes, 0)
    done: dict[Hashable, tuple[float, float]] = {}
    free = dict.fromkeys(lanes, np.float64(0.0))
    queue: list[tuple[float, int, Hashable]] = []
    count = sum(map(len, lanes.values()))

    def start(lane: Hashable) -> None:
        while waiting[lane] < len(lanes[lane]):
            one = lanes[lane][waiting[lane]]
            if any(need not in done for need in one.needs):
                return
            ready = [np.float64(done[need][1]) + one.lags.get(need, 0.0) for need in one.needs]
            begin = max([free[lane], *ready])
            end = begin + np.float64(one.seconds)
            done[one.name] = (float(begin), float(end))
            free[lane] = end
            waiting[lane] += 1
            heapq.heappush(queue, (float(end), len(done), lane))

    for lane in lanes:
        start(lane)
    while queue:
        heapq.heappop(queue)
        for lane in lanes:
            start(lane)
    if len(done) < count:
        raise RuntimeError("operations wait for each other")
    return done


def one_forward_one_backward(
    forward: Sequence[float], backward: Sequence[float], hop: Sequence[float], micro: int
) -> list[Operation]:
    """1F1B (arXiv 2104.04473, section 2.2): stage j goes p - 1 - j micro-batches ahead, then one forward and one
    backward in turns, then backward through what is left."""
    stages, found = len(forward), []
    for stage in range(stages):
        ahead = min(stages - 1 - stage, micro)
        order = [("F", number) for number in range(ahead)]
        for number in range(ahead, micro):
            order += [("F", number), ("B", number - ahead)]
        order += [("B", number) for number in range(micro - ahead, micro)]
        for kind, number in order:
            needs: list[Hashable] = []
            lags: dict[Hashable, float] = {}
            if kind == "F" and stage:
                needs, lags = [("F", stage - 1, number)], {("F", stage - 1, number): hop[stage - 1]}
            if kind == "B" and stage < stages - 1:
                needs, lags = [("B", stage + 1, number)], {("B", stage + 1, number): hop[stage]}
            time = forward[stage] if kind == "F" else backward[stage]
            found.append(Operation((kind, stage, number), ("stage", stage), np.float64(time), needs, lags))
    return found


def interleaved(
    forward: Sequence[float], backward: Sequence[float], hop: float, micro: int, parts: int
) -> list[Operation]:
    """1F1B of stages that have ``parts`` of the model each (arXiv 2104.04473, section 2.2), in the order of Paddle's
    PipelineParallelWithInterleave: p micro-batches go through one part of a stage before they go through its next one,
    in the first turn those besides that fill no turn of their own. Up to 2p, idle ones follow, which take no time.
    ``forward`` and ``backward`` are of all parts of a stage together."""
    stages, found = len(forward), list[Operation]()
    whole = max(micro, 2 * stages)
    turn, total = whole % stages + stages, whole * parts
    for stage in range(stages):
        ahead = min((stages - stage - 1) * 2 + (parts - 1) * turn, total)
        order = [("F", step) for step in range(ahead)]
        for step in range(ahead, total):
            order += [("F", step), ("B", step - ahead)]
        order += [("B", step) for step in range(total - ahead, total)]
        for kind, step in order:
            if step < turn * parts:
                chunk, number = step // turn, step % turn
            else:
                step -= turn * parts
                chunk = step % (stages * parts) // stages
                number = turn + step // (stages * parts) * stages + step % stages
            if kind == "B":
                chunk = parts - 1 - chunk
            place, way = chunk * stages + stage, 1 if kind == "F" else -1
            before = place - way
            needs: list[Hashable] = [(kind, before, number)] if 0 <= before < stages * parts else []
            if kind == "B" and not needs:
                needs = [("F", place, number)]
            idle = number >= micro
            lags: dict[Hashable, float] = {} if idle else {n: hop for n in needs if n != ("F", place, number)}
            time = 0.0 if idle else (forward if kind == "F" else backward)[stage] / parts
            found.append(Operation((kind, place, number), ("stage", stage), np.float64(time), needs, lags))
    return found

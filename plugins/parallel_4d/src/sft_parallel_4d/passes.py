"""Micro-batches through the stages of a pipeline: in which order a stage takes them, and when each pass begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Pass = tuple[str, int, int]
"""Of a micro-batch through a part of the model: "forward" or "backward", part, number."""
IDLE = 1, 2
"""Rows and tokens of an idle micro-batch."""


def passes(
    forward: Sequence[float], backward: Sequence[float], hop: Sequence[float], micro: int, virtual: int
) -> dict[Pass, tuple[float, float]]:
    """When each pass begins and ends; a stage takes them in its order, as soon as the part before has its result.

    ``forward`` and ``backward`` are the seconds of a micro-batch through all ``virtual`` parts of each stage, ``hop``
    those from each stage to the next one. Idle micro-batches, with which the schedule is filled up, take no time.
    """
    stages, parts = len(forward), len(forward) * virtual
    due = [list(_order(stage, stages, filled(micro, stages, virtual), virtual)) for stage in range(stages)]
    free, found = [0.0] * stages, dict[Pass, tuple[float, float]]()
    while any(due):
        for stage, left in enumerate(due):
            while left:
                kind, part, number = left[0]
                other = (kind, part + (-1 if kind == "forward" else 1), number)
                is_end = not 0 <= other[1] < parts
                if not is_end and other not in found:
                    break
                is_idle = number >= micro
                sent = 0.0 if is_end or is_idle else hop[min(stage, other[1] % stages)]
                begin = max(free[stage], 0.0 if is_end else found[other][1] + sent)
                takes = 0.0 if is_idle else (forward if kind == "forward" else backward)[stage]
                free[stage] = begin + takes / virtual
                found[kind, part, number] = begin, free[stage]
                left.pop(0)
    return {one: when for one, when in found.items() if one[2] < micro}


def filled(micro: int, stages: int, virtual: int) -> int:
    """How many micro-batches the schedule has with idle ones: of several parts a stage, fleet's takes no fewer."""
    return max(micro, 2 * stages) if virtual > 1 else micro


def _order(stage: int, stages: int, micro: int, virtual: int) -> Iterator[Pass]:
    """Forward as often as there are stages behind, then one forward and one backward in turns. Of stages of several
    parts, as many micro-batches as there are stages go through one part before they go through the next; in the first
    of these groups also those that make no whole group (fleet's order)."""
    group = micro % stages + stages if virtual > 1 else 1
    count, first = micro * virtual, group * virtual
    ahead = min(2 * (stages - 1 - stage) + (virtual - 1) * group if virtual > 1 else stages - 1 - stage, count)

    def one(kind: str, step: int) -> Pass:
        if virtual == 1:
            own, number = 0, step
        elif step < first:
            own, number = divmod(step, group)
        else:
            later, place = divmod(step - first, stages * virtual)
            own, number = place // stages, group + later * stages + place % stages
        return kind, stage + stages * (own if kind == "forward" else virtual - 1 - own), number

    yield from (one("forward", step) for step in range(ahead))
    for step in range(ahead, count):
        yield from (one("forward", step), one("backward", step - ahead))
    yield from (one("backward", step) for step in range(count - ahead, count))

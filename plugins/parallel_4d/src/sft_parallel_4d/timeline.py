"""When each stage of a plan does what in a step: its operations one after the other, as they are to be drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sft_parallel_4d.passes import Pass, passes
from sft_parallel_4d.plans import Plan
from sft_parallel_4d.timing import Load


@dataclass(frozen=True)
class Span:
    """Something that a rank does from ``begin`` to ``end``, in seconds.

    ``kind``: "forward" or "backward" of micro-batch ``micro``, "step" of the optimizer; or what is sent: "hidden"
    behind those, or "waited" for. ``axis`` is that of what is sent.
    """

    kind: str
    begin: float
    end: float
    micro: int | None = None
    axis: str = ""


def schedule(plan: Plan, of: list[Load], micro: int) -> list[list[Span]]:
    """What one rank of each stage does in a step of ``micro`` micro-batches (1F1B), in the order of its beginnings."""
    forward, backward = [load.goes_forward for load in of], [load.goes_backward + load.queue for load in of]
    times = passes(forward, backward, [load.hop for load in of], micro, plan.virtual)
    return [list(_spans(load, times, stage, micro, plan.virtual)) for stage, load in enumerate(of)]


def _spans(load: Load, times: dict[Pass, tuple[float, float]], stage: int, micro: int, virtual: int) -> Iterator[Span]:
    stages, part = max(part for _, part, _ in times) // virtual + 1, _part_of(load, virtual)
    own = sorted((span, kind, number) for (kind, where, number), span in times.items() if where % stages == stage)
    for (begin, end), kind, number in own:
        yield from _of_pass(part, kind, number, begin, end)
    through = own[-1][0][1]
    filling = [span for span, kind, number in own if kind == "backward" and (load.each or number == micro - 1)]
    if virtual > 1:  # buckets are filled in several passes: drawn as if nothing came between these
        filling = [(through - load.goes_backward, through)]
    for begin, end in filling:
        yield from _of_buckets(load, begin, end, is_last=end == filling[-1][1])
    at = through + max(0.0, (load.tails or [0.0])[-1] - load.queue)
    for axis, seconds in (("", load.step), ("host", load.host), ("sharding", load.spread)):
        if seconds:
            yield Span("waited" if axis else "step", at, at + seconds, axis=axis)
            at += seconds


def _part_of(load: Load, virtual: int) -> Load:
    """Of a stage's parts one (sharding's stage 3, which gathers blocks, goes with no pipeline)."""
    inline = [
        {axis: seconds / virtual for axis, seconds in one.items()}
        for one in (load.inline_forward, load.inline_backward)
    ]
    forward, backward = load.forward / virtual, load.backward / virtual
    return replace(load, forward=forward, backward=backward, inline_forward=inline[0], inline_backward=inline[1])


def _of_pass(load: Load, kind: str, number: int, begin: float, end: float) -> Iterator[Span]:
    """A pass with what it waits for, which in truth lies between its blocks: here all of it comes behind."""
    inline = load.inline_forward if kind == "forward" else load.inline_backward
    waits = load.waits_forward if kind == "forward" else load.waits_backward
    at = begin + (load.forward if kind == "forward" else load.backward)
    yield Span(kind, begin, at, number)
    if load.gather:
        sent = load.blocks * (load.gather + (load.scatter if kind == "backward" else 0.0))
        if sent > waits:
            yield Span("hidden", begin, min(end, begin + sent - waits), number, "sharding")
    for axis, seconds in (
        *inline.items(),
        ("sharding", waits),
        (load.by_axis, end - at - sum(inline.values()) - waits),
    ):
        if seconds > 1e-12:
            yield Span("waited", at, at + seconds, number, axis)
            at += seconds


def _of_buckets(load: Load, begin: float, end: float, is_last: bool) -> Iterator[Span]:
    """Buckets leave one after the other, each when backward has filled it; what travels when it is through is waited
    for, or goes on behind the next micro-batch. The last ones of a step go further."""
    spans, _ = load.buckets.spans(load.goes_backward)
    for lane, own in zip(load.buckets.lanes, spans if is_last else spans[:1], strict=False):
        for start, free in own:
            if free > start and begin + start < end:
                yield Span("hidden", begin + start, min(begin + free, end), axis=lane.axis)
            if free > start and begin + free > end:
                yield Span("waited", max(begin + start, end), begin + free, axis=lane.axis)

"""The seconds of a step on one rank of each pipeline stage: what computes, what is sent behind it, and what waits.

docs/plan.md has the formulas. Bytes are those of :mod:`communication`, which are held against real ranks; the time is
what they and the operations take at stated speeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from sft_parallel_4d import activations, communication
from sft_parallel_4d.machines import Machine, Way
from sft_parallel_4d.memory import Calculator
from sft_parallel_4d.model_size import Stage
from sft_parallel_4d.passes import passes
from sft_parallel_4d.plans import Plan
from sft_parallel_4d.travel import Travel, travel

PLACES = ("tensor", "context", "sharding", "pipeline", "data")
"""The axes of a plan, as ranks are numbered: those of the first one stand side by side. Fleet's order."""


@dataclass(frozen=True)
class Inline:
    """An axis whose collectives stand in the midst of a block, which waits for them: so many ``calls`` forward in each,
    as many backward, and with recomputation those forward once more."""

    axis: str
    calls: Callable[[Plan], int]


INLINE = (
    Inline("tensor", lambda plan: 4 if plan.sequence else 2),
    Inline("context", lambda plan: 2),
    Inline("experts", lambda plan: 2),
)
"""A dimension that exchanges data within blocks is one line here."""


BEHIND = {"data": "backward", "host": "backward", "sharding": "backward (stage 3: and forward)"}
"""Behind what an axis's data travel where they need not be waited for."""


@dataclass(frozen=True)
class Load:
    """What a rank of a pipeline stage does in a step, in seconds; of a micro-batch where nothing else is said."""

    forward: float
    """Computing alone."""
    backward: float
    inline_forward: dict[str, float]
    """Collectives within blocks, by axis."""
    inline_backward: dict[str, float]
    blocks: int
    gather: float
    """Of stage 3: the collective that brings the weights of one block."""
    scatter: float
    """Of stage 3: the collective that takes a block's gradients."""
    buckets: Travel
    """Of gradients, behind the last backward of a step."""
    each: bool
    """Whether buckets leave after each micro-batch, by their first lane, or after all."""
    step: float
    """Of a step: the optimizer."""
    host: float
    """Of a step: copies from the host, of what rests there."""
    spread: float
    """Of a step: new values for all."""
    hop: float
    """The residual stream to the next stage."""

    @property
    def goes_forward(self) -> float:
        """Until a micro-batch's forward is through, with what it waits for."""
        return self.forward + sum(self.inline_forward.values()) + self.waits_forward

    @property
    def goes_backward(self) -> float:
        """Likewise backward, without the buckets that come after it."""
        return self.backward + sum(self.inline_backward.values()) + self.waits_backward

    @property
    def waits_forward(self) -> float:
        """For the first block's weights, and for those that come later than the block before is through."""
        own = (self.forward + sum(self.inline_forward.values())) / self.blocks
        return self.gather + (self.blocks - 1) * max(0.0, self.gather - own) if self.gather else 0.0

    @property
    def waits_backward(self) -> float:
        """Likewise; the group that brings weights also takes the gradients of the block before, and the last ones."""
        if not self.gather:
            return 0.0
        own = (self.backward + sum(self.inline_backward.values())) / self.blocks
        return self.gather + (self.blocks - 1) * max(0.0, self.gather + self.scatter - own) + self.scatter

    @property
    def by_axis(self) -> str:
        """Of the first lane."""
        return self.buckets.lanes[0].axis if self.buckets.lanes else ""

    @property
    def bucket_seconds(self) -> float:
        """Of all buckets, by the first lane."""
        return self.buckets.lanes[0].total if self.buckets.lanes else 0.0

    @cached_property
    def tails(self) -> list[float]:
        """How much longer each lane is busy than the last backward, and those before it: buckets queue, and the last
        ones (the embedding's) may be full only then."""
        return self.buckets.tails(self.goes_backward)

    @cached_property
    def _alone(self) -> tuple[float, float]:
        """Of a micro-batch whose buckets leave with it: by how much it holds backward up, and how much longer the last
        one travels than the next forward takes."""
        if not (self.each and self.buckets.lanes):
            return 0.0, 0.0
        (own,), through = self.buckets.spans(self.goes_backward, 1)
        return through - self.goes_backward, max(0.0, own[-1][1] - through - self.goes_forward)

    @property
    def queue(self) -> float:
        """By how much a micro-batch's buckets make it take longer, where they leave with each."""
        return sum(self._alone)

    @property
    def end(self) -> float:
        """What follows the last backward of the rank, without what :attr:`queue` has of it."""
        return max(0.0, (self.tails or [0.0])[-1] - self.queue) + self.step + self.host + self.spread


@dataclass(frozen=True)
class Time:
    """Seconds of a step; ``hidden`` and ``exposed`` are what the busiest stage sends, by axis, behind computation or
    not; ``idle`` is what it waits for other stages."""

    total: float
    compute: float
    exposed: dict[str, float]
    hidden: dict[str, float]
    idle: float
    step: float


def loads(calculator: Calculator, plan: Plan, machine: Machine) -> list[Load]:
    """Of one rank of each pipeline stage, in order; stages that are alike are reckoned once."""
    stages, found = calculator.stages(plan), dict[int, Load]()
    for numbers in calculator.alike(plan):
        found |= dict.fromkeys(numbers, _load(calculator, plan, machine, numbers[0], stages[numbers[0]]))
    return [found[number] for number in range(len(stages))]


def time_of(plan: Plan, of: list[Load]) -> Time:
    """The step: micro-batches through the stages (1F1B), then what each stage does alone."""
    total, busiest = seconds(plan, of), _busiest(of)
    micro = plan.accumulation
    exposed = {
        axis: micro * (busiest.inline_forward[axis] + busiest.inline_backward[axis]) for axis in busiest.inline_forward
    }
    hidden = dict[str, float]()

    def sent(axis: str, all_of_it: float, waits: float) -> None:
        exposed[axis] = exposed.get(axis, 0.0) + waits
        hidden[axis] = hidden.get(axis, 0.0) + all_of_it - waits

    if busiest.gather:
        blocks = micro * busiest.blocks * (2 * busiest.gather + busiest.scatter)
        sent("sharding", blocks, micro * (busiest.waits_forward + busiest.waits_backward))
    before = 0.0
    for number, (lane, tail) in enumerate(zip(busiest.buckets.lanes, busiest.tails, strict=True)):
        again = micro - 1 if busiest.each and not number else 0
        if lane.total:
            sent(lane.axis, (1 + again) * lane.total, tail - before + again * busiest.queue)
        before = tail
    if busiest.host:
        sent("host", busiest.host, busiest.host)
    if busiest.spread:
        sent("sharding", busiest.spread, busiest.spread)
    compute = micro * (busiest.forward + busiest.backward)
    idle = max(0.0, total - compute - busiest.step - sum(exposed.values())) if plan.pipeline > 1 else 0.0
    return Time(total, compute, exposed, hidden, idle, busiest.step)


def seconds(plan: Plan, of: list[Load]) -> float:
    """Of a step: the first micro-batch goes through all stages and back, and each one after it comes later by the
    slowest cycle that it meets.

    A stage with r stages from it to the end has r micro-batches under way (1F1B). From the r-th on, a new one begins
    when one has come back: it takes the stage's own passes, or (there and back) / r. Those before it are one pass
    apart. At the end each stage does what is left, the first one last of all.
    """
    micro, stages = plan.accumulation, len(of)
    forward = [load.goes_forward for load in of]
    backward = [load.goes_backward + load.queue for load in of]
    if plan.virtual > 1:
        through = _interleaved(plan, forward, backward, [load.hop for load in of])
        return _ended(plan, of, through)
    there = hops = 0.0
    cycles = list[float]()
    """By how many stages there are from one to the end."""
    for stage in reversed(range(stages)):
        both = forward[stage] + backward[stage]
        there += both
        cycles.append(max(both, (there + 2 * hops) / (stages - stage)))
        hops += of[stage - 1].hop if stage else 0.0
    passes = [max(pair) for pair in zip(reversed(forward), reversed(backward), strict=True)]
    later = [max(cycles[:count] + passes[count:]) for count in range(1, stages + 1)]
    through = there + 2 * hops + sum(later[: micro - 1]) + max(0, micro - 1 - stages) * later[-1]
    return _ended(plan, of, through)


def _interleaved(plan: Plan, forward: list[float], backward: list[float], hops: list[float]) -> float:
    """Of stages that have several parts of the model each: the slowest one works all the time, but for what the others'
    parts take once before and after it. Fewer micro-batches than stages follow each other through all parts. Between
    once and twice as many the order has holes of many sizes, and is gone through.

    Hops are in the way of the first and last micro-batches alone."""
    both, micro, stages = [sum(pair) for pair in zip(forward, backward, strict=True)], plan.accumulation, len(forward)
    if stages < micro < 2 * stages:
        return max(end for _, end in passes(forward, backward, hops, micro, plan.virtual).values())
    slowest = max(both)
    if micro < stages:
        through = sum(both) + (micro - 1) * slowest / plan.virtual
    else:
        through = micro * slowest + (sum(both) - slowest) / plan.virtual
    return through + 2 * (stages * plan.virtual - 1) * hops[0]


def _ended(plan: Plan, of: list[Load], through: float) -> float:
    """When all stages have done what follows their last backward; the first stage is the last to be ``through``."""
    ends, gone = [], 0.0
    for load in of:
        ends.append(through - gone + load.end)
        gone += load.goes_backward / plan.virtual + load.hop
    return max(ends)


def _load(calculator: Calculator, plan: Plan, machine: Machine, number: int, stage: Stage) -> Load:
    outline, shape, size = calculator.outline, calculator.shape(plan), stage.size
    volume, micro, blocks = communication.rank(calculator, plan, number, stage), plan.accumulation, len(stage.blocks)
    forward, backward = _computing(calculator, plan, machine, stage)
    goes_back = sum(backward)
    inline_forward, inline_backward = dict[str, float](), dict[str, float]()
    for one in INLINE:
        way = way_of(plan, machine, one.axis)
        calls, again = one.calls(plan) * blocks, 2 if plan.recompute else 1
        if math.isfinite(way.speed):
            sent = getattr(volume, one.axis) / micro / way.speed
            inline_forward[one.axis] = sent / (1 + again) + calls * way.latency
            inline_backward[one.axis] = sent * again / (1 + again) + again * calls * way.latency
    sharding, data = way_of(plan, machine, "sharding"), way_of(plan, machine, "data")
    ring, gather, scatter, spread = plan.pieces - 1, 0.0, 0.0, 0.0
    buckets, leave = Travel(), calculator.leaving(plan, stage) if plan.copies * plan.pieces > 1 or plan.offload else ()
    if leave:
        through = [0.0, *(after / goes_back for after in accumulate(backward))]
        buckets = travel(plan, machine, leave, through, {"sharding": sharding, "data": data})
    if plan.stage and plan.stage < 3 and ring:
        spread = sharding.seconds(ring * size.pieces, sum(one.count + one.expert_count for one in leave))
    elif ring:
        spread = sharding.seconds(ring * size.vector_pieces)
        gather = sharding.seconds(ring * size.matrix_pieces / blocks)
        scatter = sharding.seconds(ring * size.piece_gradients / blocks)
    stepped = 2 * size.optimizer + size.piece_gradients + size.pieces
    return Load(
        forward=sum(forward),
        backward=goes_back,
        inline_forward=inline_forward,
        inline_backward=inline_backward,
        blocks=blocks,
        gather=gather,
        scatter=scatter,
        buckets=buckets,
        each=plan.stage == 2,
        host=(volume.host - plan.offload * size.piece_gradients) / (machine.links * machine.host),
        step=stepped / (machine.links * (machine.host if plan.offload else machine.stream)),
        spread=spread,
        hop=_hop(plan, machine).seconds(activations.boundary(outline, shape, calculator.precision)),
    )


def way_of(plan: Plan, machine: Machine, axis: str) -> Way:
    """How the ranks along an axis exchange data. Those that share rows share pieces, too, or have copies of all, and
    are the first among these."""
    if axis == "sharding":
        return machine.way(plan.pieces, _stride(plan, "context"))
    if axis in ("data", "experts"):
        ranks, near = plan.copies if axis == "data" else plan.experts, 1 if plan.stage else plan.context
        return machine.way(ranks, _stride(plan, "context") if ranks <= near else _stride(plan, "data") // near)
    return machine.way(getattr(plan, axis), _stride(plan, axis))


def _stride(plan: Plan, axis: str) -> int:
    """How far apart neighbours along an axis stand."""
    return math.prod(getattr(plan, place) for place in PLACES[: PLACES.index(axis)])


def _hop(plan: Plan, machine: Machine) -> Way:
    """From a stage to the next one, of those that are farthest apart."""
    if plan.pipeline == 1:
        return Way(math.inf, 0.0)
    if _stride(plan, "pipeline") * plan.pipeline <= machine.devices:
        return Way(machine.links * machine.within, machine.latency)
    return Way(machine.links * machine.between, machine.far_latency)


def _busiest(of: list[Load]) -> Load:
    return max(of, key=lambda load: load.goes_forward + load.goes_backward)


def _computing(calculator: Calculator, plan: Plan, machine: Machine, stage: Stage) -> tuple[list[float], list[float]]:
    """Seconds of a micro-batch forward and backward on a rank, of each layer from the last one (what comes after the
    blocks, these, the embedding): two operations a weight of a matrix and token, causal attention's two products over
    half a row; backward again for gradients of inputs, and of weights that train."""
    outline, shape = calculator.outline, calculator.shape(plan)
    matrix, head = 2 * outline.vocabulary * outline.hidden if stage.last else 0, outline.head or outline.embedding
    own = 2 * outline.heads * outline.head_size * shape.length
    layers: list[tuple[float, float, float]] = [(matrix, 0, 0) if head.trains else (0, matrix, 0)]
    layers += [(*calculator.operations(number), own) for number in reversed(stage.blocks)]
    each = shape.tokens / plan.tensor / (machine.efficiency * machine.peak(calculator.precision.products))
    forward, backward = [], []
    for trained, frozen, attention in layers:
        once = trained + frozen + attention
        forward.append(once * each)
        backward.append((2 * trained + frozen + 2 * attention + (once if plan.recompute else 0)) * each)
    return [*forward, 0.0], [*backward, 0.0]

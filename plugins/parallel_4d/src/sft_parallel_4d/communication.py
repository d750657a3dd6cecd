"""What a plan's busiest rank sends in a step, in bytes, with ring algorithms; docs/plan.md has the formulas."""

from __future__ import annotations

from dataclasses import dataclass

from sft_parallel_4d import activations
from sft_parallel_4d.activations import Shape
from sft_parallel_4d.memory import Calculator
from sft_parallel_4d.model_size import Stage, key_copies
from sft_parallel_4d.passes import filled
from sft_parallel_4d.plans import Plan


@dataclass(frozen=True)
class Volume:
    """Bytes that one rank sends in a step, by what for."""

    data: int = 0
    sharding: int = 0
    tensor: int = 0
    pipeline: int = 0
    context: int = 0
    experts: int = 0
    """Tokens to experts of other ranks, and back."""
    host: int = 0
    """Between device and host, with offload."""

    @property
    def total(self) -> int:
        parts = (self.data, self.sharding, self.tensor, self.pipeline, self.context, self.experts, self.host)
        return sum(parts)


def busiest(calculator: Calculator, plan: Plan) -> Volume:
    """The rank of ``plan`` that sends most."""
    stages = calculator.stages(plan)
    found = (rank(calculator, plan, numbers[0], stages[numbers[0]]) for numbers in calculator.alike(plan))
    return max(found, key=lambda volume: volume.total)


def rank(calculator: Calculator, plan: Plan, number: int, stage: Stage) -> Volume:
    """A rank of pipeline stage ``number``; the few bytes of a step's loss and gradient norm are left out."""
    outline, size = calculator.outline, stage.size
    own = size.piece_gradients - stage.experts.piece_gradients
    data = 2 * _part(plan.copies) * own + 2 * _part(plan.copies // plan.experts) * stage.experts.piece_gradients
    idle = filled(plan.accumulation, plan.pipeline, plan.virtual) - plan.accumulation
    pipeline = context = tensor = experts = 0.0
    for shape, times in ((calculator.shape(plan), plan.accumulation), (calculator.idle_shape(plan), idle)):
        if times:
            neighbours = 2 * plan.virtual - (number == 0) - (number == plan.pipeline - 1)  # each part there and back
            pipeline += times * neighbours * activations.boundary(outline, shape, calculator.precision)
            context += times * _context(calculator, plan, stage, shape)
            tensor += times * _tensor(calculator, plan, stage, shape)
            experts += times * _experts(calculator, plan, stage, shape)
    if plan.pipeline > 1 and outline.tied and (stage.first or stage.last) and outline.embedding.trains:
        # The two copies' gradient, or slices of it, without what fills their buffer up.
        tied = stage.embedding if stage.first else stage.head
        pipeline += min(tied.gradients, tied.piece_gradients)
    summed = _part(plan.tensor) * (size.partial + (size.norms if plan.sequence else 0))
    summed += _part(key_copies(outline, plan.tensor)) * size.copied
    values, gradients = _values(plan, stage, outline.tied), _gradients(plan, stage)
    sharding = plan.pieces * _part(plan.pieces) * (values + gradients)
    host = values + size.piece_gradients if plan.offload else 0
    return Volume(*map(round, (data, sharding, tensor + 2 * summed, pipeline, context, experts, host)))


def _context(calculator: Calculator, plan: Plan, stage: Stage, shape: Shape) -> float:
    """Of a micro-batch: in each block queries, keys and values go there and results come back, and the gradients of all
    of them."""
    swapped = activations.swapped(calculator.outline.architecture, shape) * shape.tokens
    ways = 3 if plan.recompute else 2
    return len(stage.blocks) * ways * _part(plan.context) * swapped * calculator.precision.products / 8


def _experts(calculator: Calculator, plan: Plan, stage: Stage, shape: Shape) -> float:
    """Of a micro-batch: each chosen expert's input there and its output back, and their gradients; where tokens go to
    all experts alike."""
    outline = calculator.outline
    mixtures = [outline.architecture.blocks[number].experts for number in stage.blocks]
    chosen = sum(mixture.chosen for mixture in mixtures if mixture is not None)
    ways = 6 if plan.recompute else 4
    width = calculator.precision.products // 8
    return ways * _part(plan.experts) * shape.tokens * chosen * outline.hidden * width


def _gradients(plan: Plan, stage: Stage) -> int:
    """Bytes of slices of gradients that come to their owners: of all micro-batches together, or of each."""
    return 0 if not plan.stage else stage.size.piece_gradients * (plan.accumulation if plan.stage >= 2 else 1)


def _values(plan: Plan, stage: Stage, tied: bool) -> int:
    """Bytes of slices of values that go: after a step, in stage 3 those of matrices wherever they are used instead."""
    size = stage.size
    if plan.stage < 3:
        return size.pieces if plan.stage else 0
    embedding, head = stage.embedding.matrix_pieces, stage.head.matrix_pieces
    blocks = size.matrix_pieces - embedding - (0 if tied else head)
    # Blocks are gathered forward and backward, the embedding and lm_head once.
    return plan.accumulation * (2 * blocks + embedding + head) + size.vector_pieces


def _tensor(calculator: Calculator, plan: Plan, stage: Stage, shape: Shape) -> float:
    """Of a micro-batch: what enters and leaves attention and MLP, embedding and loss."""
    outline, precision = calculator.outline, calculator.precision
    part, width, trains = _part(plan.tensor), precision.products // 8, outline.embedding.trains
    # Of an all-reduce, half is a reduce-scatter and half an all-gather; sequence parallelism has one here, one there.
    half = part * shape.tokens * outline.hidden * width
    enter_forward, enter_backward = (half, half) if plan.sequence else (0, 2 * half)
    leave_forward, leave_backward = (half, half) if plan.sequence else (2 * half, 0)
    forward, backward = 2 * (enter_forward + leave_forward), 2 * (enter_backward + leave_backward)
    count = len(stage.blocks)
    again = count if plan.recompute else 0
    micro = count * (forward + backward) + again * forward
    if stage.first and not trains and not plan.recompute:
        micro -= enter_backward  # nothing goes back to a frozen embedding
    if outline.architecture.head_norm == "all":  # sums of squares of queries and of keys, and their gradients
        micro += (2 * count + again) * 2 * 2 * part * shape.tokens * 4
    micro += (2 if plan.recompute else 1) * 2 * part * 4 * sum(calculator.summed(number) for number in stage.blocks)
    if stage.first:
        micro += 2 * half + (half if plan.sequence and trains else 0)
    if stage.last:
        micro += half if plan.sequence else 0
        # Of each target what the loss needs of all logits, and the gradient of its hidden state.
        micro += 2 * part * shape.targets * (outline.target_sums * 4 + outline.hidden * width)
    return micro


def _part(ranks: int) -> float:
    """What a rank sends of a tensor in a ring's reduce-scatter or all-gather."""
    return (ranks - 1) / ranks

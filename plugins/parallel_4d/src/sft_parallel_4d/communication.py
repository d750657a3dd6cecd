"""What a plan's busiest rank sends in a step, in bytes, with ring algorithms; docs/plan.md has the formulas."""

from __future__ import annotations

from dataclasses import dataclass

from sft_parallel_4d import activations
from sft_parallel_4d.memory import Calculator
from sft_parallel_4d.model_size import Stage
from sft_parallel_4d.plans import Plan


@dataclass(frozen=True)
class Volume:
    """Bytes that one rank sends in a step, by what for."""

    data: int = 0
    sharding: int = 0
    tensor: int = 0
    pipeline: int = 0
    context: int = 0
    host: int = 0
    """Between device and host, with offload."""

    @property
    def total(self) -> int:
        return self.data + self.sharding + self.tensor + self.pipeline + self.context + self.host


def busiest(calculator: Calculator, plan: Plan) -> Volume:
    """The rank of ``plan`` that sends most."""
    found = (rank(calculator, plan, number, stage) for number, stage in enumerate(calculator.stages(plan)))
    return max(found, key=lambda volume: volume.total)


def rank(calculator: Calculator, plan: Plan, number: int, stage: Stage) -> Volume:
    """A rank of pipeline stage ``number``; the few bytes of a step's loss and gradient norm are left out."""
    outline, precision, shape = calculator.outline, calculator.precision, calculator.shape(plan)
    size, micro = stage.size, plan.accumulation
    data = 2 * _part(plan.copies) * size.piece_gradients
    neighbours = 2 * plan.virtual - (number == 0) - (number == plan.pipeline - 1)  # each part there and back
    pipeline = micro * neighbours * activations.boundary(outline, shape, precision)
    if plan.pipeline > 1 and outline.tied and (stage.first or stage.last) and outline.embedding.trains:
        # The two copies' gradient, or slices of it.
        pipeline += (stage.head.gradients + stage.embedding.gradients) // plan.pieces
    values, gradients = _values(plan, stage, outline.tied), _gradients(plan, stage)
    sharding = plan.pieces * _part(plan.pieces) * (values + gradients)
    host = values + size.piece_gradients if plan.offload else 0
    # In each block queries, keys and values go there and results come back, and the gradients of all of them.
    swapped = activations.swapped(outline.architecture, shape) * shape.tokens * precision.products / 8
    context = micro * len(stage.blocks) * (3 if plan.recompute else 2) * _part(plan.context) * swapped
    return Volume(round(data), round(sharding), round(_tensor(calculator, plan, stage)), pipeline, round(context), host)


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


def _tensor(calculator: Calculator, plan: Plan, stage: Stage) -> float:
    """Of a step: what enters and leaves attention and MLP, embedding and loss, and gradients of what is not divided."""
    outline, precision, shape = calculator.outline, calculator.precision, calculator.shape(plan)
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
    if stage.first:
        micro += 2 * half + (half if plan.sequence and trains else 0)
    if stage.last:
        micro += half if plan.sequence else 0
        # Of each target: the maximum, the normaliser and the chosen logit, and the gradient of its hidden state.
        micro += 2 * part * shape.targets * (3 * 4 + outline.hidden * width)
    summed = stage.size.partial + (stage.size.norms if plan.sequence else 0)
    return plan.accumulation * micro + 2 * part * summed


def _part(ranks: int) -> float:
    """What a rank sends of a tensor in a ring's reduce-scatter or all-gather."""
    return (ranks - 1) / ranks

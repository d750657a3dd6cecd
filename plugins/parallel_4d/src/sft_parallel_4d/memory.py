"""The memory of a plan's fullest rank, in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from sft_parallel_4d import activations
from sft_parallel_4d.activations import Shape
from sft_parallel_4d.lots import BUCKET
from sft_parallel_4d.model_size import Division, Precision, Stage, stages
from sft_parallel_4d.outline import Outline
from sft_parallel_4d.plans import Plan


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank; ``activations`` are those of all micro-batches in flight."""

    weights: int
    """Parameters, pieces beside them, and what of stage 3's is whole at a time."""
    gradients: int
    optimizer: int
    activations: int
    logits: int
    peak: int
    """The most of the device at a time; less than the sum where parts follow each other."""
    host: int = 0
    """What offload keeps in the host's memory instead."""


@dataclass(frozen=True)
class Held:
    """What a rank holds of model and optimizer, at rest and while it works, in bytes."""

    parameters: int
    """Whole ones."""
    pieces: int
    optimizer: int
    gradients: int
    """Of what is stepped, when backward has ended."""
    passing: int
    """Beside them in backward: gradients on their way into sums."""
    waiting: int = 0
    """Of these, at most, small ones that wait to become pieces together."""


class Calculator:
    """Memory of plans for one model and micro-batch; what plans share is computed once."""

    def __init__(
        self,
        outline: Outline,
        precision: Precision,
        rows: int,
        length: int,
        targets: int | None = None,
        device_memory: int | None = None,
    ) -> None:
        """``device_memory`` of a GPU in bytes; None: a CPU."""
        self.outline, self.precision = outline, precision
        self._chunk = activations.chunk_bytes(device_memory)
        self._batch = (rows, length, rows * length if targets is None else targets)
        self._stages = cache(lambda division, pipeline: stages(outline, division, pipeline, precision))
        self._kept = cache(self._kept_of_blocks)

    def stages(self, plan: Plan) -> list[Stage]:
        """The pipeline stages of ``plan``."""
        found: list[Stage] = self._stages(Division(plan.tensor, plan.sharding if plan.stage else 1), plan.pipeline)
        return found

    def shape(self, plan: Plan) -> Shape:
        """A micro-batch on a rank of ``plan``."""
        rows, length, targets = self._batch
        if plan.sequence:  # rows get padding until they can be divided
            length = -(-length // plan.tensor) * plan.tensor
        return Shape(rows, length, targets, plan.tensor, plan.sequence)

    def fullest(self, plan: Plan) -> Memory:
        """The rank of ``plan`` that needs most: all ranks of a stage need the same."""
        found = (self.rank(plan, number, stage) for number, stage in enumerate(self.stages(plan)))
        return max(found, key=lambda memory: memory.peak)

    def held(self, plan: Plan, stage: Stage) -> Held:
        """What a rank of ``stage`` holds whatever it computes."""
        size = stage.size
        parameters, pieces, gradients, passing, waiting = size.weights, 0, size.gradients, size.widening, 0
        if plan.stage:
            pieces = size.pieces
        if plan.stage == 3:
            parameters, pieces = parameters - size.matrices, pieces + size.frozen_pieces
        if plan.stage >= 2:
            late = stage.late
            waiting = min(BUCKET, size.gradients - late.gradients)
            gradients = size.piece_gradients - late.piece_gradients + late.gradients
            # A full buffer is copied, or meets a gradient that does not wait, in the midst of backward.
            passing = waiting if waiting < BUCKET else waiting + max(waiting, size.passing)
        return Held(parameters, pieces, size.optimizer, gradients, passing, waiting)

    def rank(self, plan: Plan, number: int, stage: Stage) -> Memory:
        """A rank of pipeline stage ``number``."""
        outline, precision, shape, size = self.outline, self.precision, self.shape(plan), stage.size
        held = self.held(plan, stage)
        whole_block, whole_head = (stage.largest_block.matrices, stage.head.matrices) if plan.stage == 3 else (0, 0)
        # One forward, one backward: a stage works ahead as far as there are stages behind it.
        flying = min(plan.pipeline - number, plan.accumulation)
        kept, block = self._kept(stage.blocks, shape, plan.recompute)
        reading = activations.reading_kept(outline, shape)
        kept += activations.at_borders(outline, shape, precision, plan.recompute, stage.first, stage.last)
        extra = activations.backward_extra(outline, shape, precision)
        attending = activations.attending(outline, shape, precision)
        upstream = activations.boundary(outline, shape, precision)
        beyond = extra
        if plan.recompute:  # a block goes forward when the gradient of its output is there
            beyond = max(block + extra, attending + upstream)
        beyond = max(beyond, min(BUCKET, whole_block))  # matrices of a block come in a buffer
        if not stage.last:  # that gradient has been received, and paddle's backward begins with a copy
            beyond += upstream
        last = activations.last_kept(outline, shape, precision) if stage.last else 0
        loss = activations.logits(outline, shape, precision, self._chunk) if stage.last else 0
        norm = activations.norm_kept(outline, shape) if stage.last else 0
        on_device = not plan.offload
        # Gradients of earlier micro-batches are there if there are any while all that may be in flight is.
        before = held.gradients if plan.accumulation > flying and (on_device or plan.stage < 2) else 0
        after = (held.gradients if on_device or plan.stage < 2 else 0) + held.passing
        # lm_head's gradient has then been added to that of earlier micro-batches.
        added = activations.head_gradient(outline, shape, precision.weights) if stage.last and before else 0
        behind = last - added
        one_block = (kept // len(stage.blocks) if not plan.recompute else 0) + beyond + whole_block
        moments = {
            "loss": before + (kept + reading) * flying + norm + loss + whole_head,
            "last block backward": before + (kept + reading) * flying + behind + beyond + whole_block,
            "first block backward": after + kept * (flying - 1) + reading * flying + one_block,
        }
        if not plan.recompute:
            moments["last block forward"] = before + (kept + reading) * flying - block + attending + whole_block
        stepping = 4 * size.stepped  # squared for the norm, or given to the master
        stepped = size.gradients if not plan.stage else size.piece_gradients
        if plan.stage == 1:
            moments["pieces of gradients"] = size.gradients + max(min(BUCKET, size.gradients), 4 * size.stepped)
        elif plan.stage:
            moments["pieces of gradients"] = (before and held.gradients) + 2 * held.waiting
        if on_device:
            moments["step"] = stepped + stepping
        if plan.stage in (1, 2):
            moments["spread"] = 2 * max(size.largest, min(BUCKET, size.pieces * plan.sharding))
        aside = held.pieces + held.optimizer
        return Memory(
            held.parameters + (held.pieces if on_device else 0) + max(whole_block, whole_head),
            max(after, size.gradients if plan.stage == 1 else 0),
            held.optimizer if on_device else 0,
            (kept + reading) * flying + last + beyond,
            loss,
            held.parameters + (aside if on_device else 0) + max(moments.values()),
            0 if on_device else aside + stepped + stepping,
        )

    def _kept_of_blocks(self, blocks: range, shape: Shape, recompute: bool) -> tuple[int, int]:
        """What ``blocks`` keep of a micro-batch, and what the largest of them keeps without recomputation."""
        full = [activations.block_kept(self.outline, number, shape, self.precision) for number in blocks]
        if not recompute:
            return sum(full), max(full)
        return activations.boundary(self.outline, shape, self.precision) * len(full), max(full)

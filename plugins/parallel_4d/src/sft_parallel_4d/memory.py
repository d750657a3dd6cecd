"""The memory of a plan's fullest rank, in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from sft import Outline
from sft_parallel_4d import activations
from sft_parallel_4d.activations import Shape
from sft_parallel_4d.model_size import Precision, Stage, stages
from sft_parallel_4d.plans import Plan


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank; ``activations`` are those of all micro-batches in flight."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    peak: int
    """The most at a time; less than the sum where parts follow each other."""


class Calculator:
    """Memory of plans for one model and micro-batch; what plans share is computed once."""

    def __init__(
        self, outline: Outline, precision: Precision, rows: int, length: int, targets: int | None = None
    ) -> None:
        self.outline, self.precision = outline, precision
        self._batch = (rows, length, rows * length if targets is None else targets)
        self.stages = cache(self._stages)
        self._kept = cache(self._kept_of_blocks)

    def shape(self, plan: Plan) -> Shape:
        """A micro-batch on a rank of ``plan``."""
        return Shape(*self._batch, plan.tensor, plan.sequence)

    def fullest(self, plan: Plan) -> Memory:
        """The rank of ``plan`` that needs most: all ranks of a stage need the same."""
        found = self.stages(plan.tensor, plan.pipeline)
        return max((self.rank(plan, number, stage) for number, stage in enumerate(found)), key=lambda m: m.peak)

    def rank(self, plan: Plan, number: int, stage: Stage) -> Memory:
        """A rank of pipeline stage ``number``."""
        outline, precision, shape = self.outline, self.precision, self.shape(plan)
        size, share = stage.size, plan.sharding
        held = _share(size.weights, share if plan.stage == 3 else 1)
        gradients = _share(size.gradients, share if plan.stage >= 2 else 1)
        optimizer = _share(size.optimizer, share)
        if plan.stage == 3:
            held += stage.largest_block.weights  # whole while it is used
        if plan.stage >= 2:
            gradients += stage.largest_block.gradients  # whole until it has been summed
        weights = held + (activations.tables(outline) if stage.blocks else 0)
        # One forward, one backward: a stage works ahead as far as there are stages behind it.
        flying = min(plan.pipeline - number, plan.accumulation)
        kept_blocks, at_once = self._kept(stage.blocks, shape, plan.recompute, stage.first)
        kept = kept_blocks * flying
        if stage.last:
            kept += activations.last_kept(outline, shape, precision)
        extra = at_once + (activations.backward_extra(outline, shape, precision) if stage.blocks else 0)
        loss = activations.logits(outline, shape, precision) if stage.last else 0
        before_loss = kept - (activations.last_kept(outline, shape, precision) if stage.last else 0)
        norm = shape.tokens // shape.spread * (outline.hidden + 1) * 4 if stage.last else 0
        working = max(kept + extra, before_loss + norm + loss)
        stepping = size.largest * 4 * (1 if precision.weights == 32 else 2)
        peak = weights + gradients + optimizer + max(working, stepping)
        return Memory(weights, gradients, optimizer, kept + extra, loss, peak)

    def _stages(self, tensor: int, pipeline: int) -> list[Stage]:
        return stages(self.outline, tensor, pipeline, self.precision)

    def _kept_of_blocks(self, blocks: range, shape: Shape, recompute: bool, first: bool) -> tuple[int, int]:
        """What ``blocks`` keep of a micro-batch, and what the one that is recomputed holds beside it."""
        full = [activations.block_kept(self.outline, number, shape, self.precision) for number in blocks]
        if not recompute or not full:
            return sum(full), 0
        thin = activations.boundary(self.outline, shape, self.precision)
        # PaddleNLP recomputes a block only if its input has a gradient, and a frozen embedding's output has none.
        whole = full[0] if first and not self.outline.embedding.trains else thin
        return whole + thin * (len(full) - 1), max(full)


def _share(size: int, ranks: int) -> int:
    return math.ceil(size / ranks)

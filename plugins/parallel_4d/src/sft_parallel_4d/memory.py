"""The memory of a plan's fullest rank, in bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from sft_parallel_4d import activations
from sft_parallel_4d.activations import Shape
from sft_parallel_4d.filling import Bucket, Course, Departure, course, departures, whole
from sft_parallel_4d.model_size import (
    Division,
    Precision,
    Stage,
    blocks_of,
    first_alike,
    key_copies,
    layers,
    stages,
    summed,
)
from sft_parallel_4d.options import BUCKET
from sft_parallel_4d.outline import Outline, operations
from sft_parallel_4d.passes import IDLE
from sft_parallel_4d.plans import Plan

LOT = 1 << 20
"""Values of small gradients that are squared together, on a CPU in float64, as the core has it."""


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
    """Beside them in backward: buckets that are sent by themselves, and gradients on their way into buckets."""
    filled: int = 0
    """Of both, what is there as soon as backward begins: the first bucket."""
    left: int = 0
    """Of ``passing``, what is there until the next micro-batch goes back: the last bucket."""
    growing: int | None = None
    """Of gradients and what is beside them, the most in a first micro-batch, if not all of both."""
    coming: int = 0
    """What is there more than ``filled`` when backward is in the last block's attention."""


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
        bucket: int = BUCKET,
    ) -> None:
        """``device_memory`` of a GPU in bytes; None: a CPU. ``bucket``: bytes of gradients that travel together."""
        self.bucket = bucket
        self.outline, self.precision = outline, precision
        self._is_cpu = device_memory is None
        self._chunk = activations.chunk_bytes(device_memory)
        self._batch = (rows, length, rows * length if targets is None else targets)
        self._like = first_alike(outline)
        self._blocks = cache(lambda division: blocks_of(outline, division, precision, self._like))
        self._stages = cache(self._stages_of)
        self.operations = cache(lambda number: operations(outline, number))
        self.summed = cache(lambda number: summed(outline, number))
        self._alike = cache(self._alike_of_stages)
        self._kept = cache(self._kept_of_blocks)
        self._course = cache(self._course_of)
        self._whole = cache(whole)
        self._departures = cache(lambda course, shards: tuple(departures(course, shards)))
        # Thousands of plans have a few shapes.
        self._extra = cache(lambda shape: activations.backward_extra(outline, shape, precision, set(self._like)))
        self._block = cache(lambda number, shape: activations.block_kept(outline, number, shape, precision))

    def stages(self, plan: Plan) -> list[Stage]:
        """The pipeline stages of ``plan``."""
        found: list[Stage] = self._stages(*self._division(plan))
        return found

    def _stages_of(self, division: Division, pipeline: int, virtual: int) -> list[Stage]:
        return stages(self.outline, division, pipeline, self.precision, virtual, self._blocks(division))

    def alike(self, plan: Plan) -> list[list[int]]:
        """The numbers of the pipeline stages of ``plan``, those together that hold and compute the same."""
        found: list[list[int]] = self._alike(*self._division(plan))
        return found

    def _division(self, plan: Plan) -> tuple[Division, int, int]:
        copies = key_copies(self.outline, plan.tensor)
        return Division(plan.tensor, plan.pieces, copies, plan.experts), plan.pipeline, plan.virtual

    def _alike_of_stages(self, division: Division, pipeline: int, virtual: int) -> list[list[int]]:
        kinds = dict[object, list[int]]()
        for number, stage in enumerate(self._stages(division, pipeline, virtual)):
            of_blocks = tuple(self.outline.architecture.blocks[block] for block in stage.blocks)
            kind = stage.first, stage.last, stage.size, stage.largest_block, of_blocks
            kinds.setdefault(kind, []).append(number)
        return list(kinds.values())

    def shape(self, plan: Plan) -> Shape:
        """A micro-batch on a rank of ``plan``."""
        return self._shape(plan, *self._batch)

    def idle_shape(self, plan: Plan) -> Shape:
        """One with which the schedule is filled up."""
        rows, length = IDLE
        return self._shape(plan, rows, length, rows * length)

    def _shape(self, plan: Plan, rows: int, length: int, targets: int) -> Shape:
        parts = plan.context * plan.stream_parts  # rows get padding until they can be divided
        length = -(-length // parts) * parts
        return Shape(rows, length, -(-targets // plan.context), plan.tensor, plan.sequence, plan.context)

    def fullest(self, plan: Plan) -> Memory:
        """The rank of ``plan`` that needs most: all ranks of a stage need the same."""
        stages = self.stages(plan)
        found = (self.rank(plan, number, stages[number]) for number in self._fullest_of(plan))
        return max(found, key=lambda memory: memory.peak)

    def _fullest_of(self, plan: Plan) -> Iterator[int]:
        """Of stages that are alike the first has most micro-batches under way; but where these are all of a step, no
        gradients of others are there meanwhile, which the first of those has that do not have all."""
        for numbers in self.alike(plan):
            yield numbers[0]
            yield from [n for n in numbers[1:] if self._under_way(plan, n)[1] < plan.accumulation][:1]

    def _under_way(self, plan: Plan, number: int) -> tuple[int, int]:
        """Passes through parts of pipeline stage ``number`` that have not come back, and micro-batches of these: one
        forward, one backward, and a stage works ahead as far as there are stages behind it."""
        passes = plan.pipeline - number
        if plan.virtual > 1:  # of which each keeps a share
            passes += plan.pipeline - number - 1 + (plan.virtual - 1) * plan.pipeline
        passes = min(passes, plan.accumulation * plan.virtual)
        return passes, math.ceil(passes / plan.virtual)

    def held(self, plan: Plan, stage: Stage) -> Held:
        """What a rank of ``stage`` holds whatever it computes."""
        size, gradients = stage.size, tuple[int, ...]()
        if plan.stage >= 2:
            now = self._whole(self._course(*self._structure(plan, stage), plan.stage == 3), plan.pieces)
            gradients = (size.piece_gradients, now.most, now.begun, now.left, now.growing, now.inside - now.begun)
        if plan.stage == 3:
            parameters = size.weights - size.matrices + size.vector_pieces * plan.pieces - size.vectors
            return Held(parameters, size.matrix_pieces, size.optimizer, *gradients)
        bucket = min(self.bucket, size.piece_gradients * plan.pieces)
        if plan.stage:
            parameters = size.weights - size.whole + size.pieces * plan.pieces
            if plan.stage == 1:
                gradients = (size.piece_gradients * plan.pieces, size.passing, bucket)
            return Held(parameters, size.pieces if plan.offload else 0, size.optimizer, *gradients)
        if plan.copies > 1:
            return Held(size.weights, 0, size.optimizer, size.piece_gradients, size.passing, bucket)
        return Held(size.weights, 0, size.optimizer, size.gradients, size.widening)

    def buckets(self, plan: Plan, stage: Stage) -> tuple[Bucket, ...]:
        """Of sharding's stages 0 to 2: the buckets of gradients of ``stage``, in the order in which they leave."""
        found: Course = self._course(*self._structure(plan, stage), False)
        return found.buckets

    def leaving(self, plan: Plan, stage: Stage) -> tuple[Departure, ...]:
        """The same, as far as they leave together."""
        found: tuple[Departure, ...] = self._departures(self._course(*self._structure(plan, stage), False), plan.pieces)
        return found

    def _structure(self, plan: Plan, stage: Stage) -> tuple[tuple[int, ...], tuple[bool, bool], Division, bool]:
        """What decides about the course of backward: thousands of stages have a few."""
        division = replace(self._division(plan)[0], shards=1)
        return tuple(self._like[number] for number in stage.blocks), (stage.first, stage.last), division, plan.sequence

    def _course_of(
        self, blocks: tuple[int, ...], ends: tuple[bool, bool], division: Division, sequence: bool, in_units: bool
    ) -> Course:
        of_stage = layers(self.outline, blocks, ends, division, self.precision, sequence)
        return course(of_stage, self.bucket, in_units)

    def rank(self, plan: Plan, number: int, stage: Stage) -> Memory:
        """A rank of pipeline stage ``number``."""
        outline, precision, shape, size = self.outline, self.precision, self.shape(plan), stage.size
        held = self.held(plan, stage)
        whole_block = whole_head = whole_first = 0
        if plan.stage == 3:  # beside what computes there is what computes next, but for the end of backward
            whole_first, head = (plan.pieces * one.matrix_pieces for one in (stage.largest_block, stage.head))
            whole_block, whole_head = min(len(stage.blocks), 2) * whole_first, head + whole_first
        passes, flying = self._under_way(plan, number)
        kept, block = self._kept(stage.blocks, shape, plan.recompute)
        reading = activations.reading_kept(outline, shape)
        if stage.first:
            kept += activations.embedding_kept(outline, shape, precision)
        upstream = activations.boundary(outline, shape, precision)
        # What a part has received, until its gradient is sent back (recomputation keeps that anyway). What it has sent
        # is gone, but in the order of several parts.
        received = 0 if plan.recompute else plan.virtual - stage.first
        sent = plan.virtual - stage.last if plan.virtual > 1 else 0
        kept += (received + sent) * upstream
        flown = kept * passes // plan.virtual
        last = activations.last_kept(outline, shape, precision) if stage.last else 0
        loss = activations.logits(outline, shape, precision, self._chunk) if stage.last else 0
        norm = activations.norm_kept(outline, shape) if stage.last else 0
        on_device = not plan.offload
        # Gradients of earlier micro-batches are there if there are any while all that may be in flight is.
        before = held.gradients if plan.accumulation > flying else 0
        after = held.gradients + held.passing if before or held.growing is None else held.growing
        waiting = before + held.left if before else 0
        # What the loss leaves for the blocks' backward: lm_head's gradient, unless it is in a bucket, or in the sum.
        waits = outline.tied and stage.first and stage.last  # for the embedding's
        is_added = before or (held.filled and not outline.tied)
        behind = 0
        if stage.last and (waits or not is_added):
            behind = activations.head_gradient(outline, shape, precision.weights)
        begun = before + held.filled if plan.stage >= 2 else max(before, held.filled)
        coming, passing, sums = held.coming, 0, after
        if plan.stage < 2:  # in the others what is on its way is counted with buckets
            coming, passing, sums = 0, stage.largest_block.passing, held.gradients + (behind if waits else 0)
            if not before and not held.filled:  # each gradient is there from its own moment on
                coming = stage.largest_block.gradients
                sums -= coming + stage.embedding.gradients
        last_block = self._beyond(plan, stage, shape, block, passing, coming)
        first_block = self._beyond(plan, stage, shape, block, passing, coming if plan.stage < 2 else 0)
        one_block = (upstream if plan.recompute else kept // len(stage.blocks)) + first_block + whole_first
        moments = {
            "loss": waiting + flown + reading * passes + norm + loss + whole_head,
            "last block backward": begun + flown + reading * passes + behind + last_block + whole_block,
            "first block backward": sums + flown - kept // plan.virtual + reading * passes + one_block,
            "end of backward": after + flown - kept // plan.virtual + reading * passes + upstream,
        }
        if not plan.recompute:
            attending = activations.attending(outline, shape, precision)
            moments["last block forward"] = waiting + flown + reading * passes - block + attending + whole_block
        # The largest is squared for the norm, or given to the master; small ones are squared together.
        stepping = max(4 * size.stepped, 12 * min(size.few, LOT) if self._is_cpu else 0)
        if on_device:
            moments["step"] = held.gradients + stepping
        aside = held.pieces + held.optimizer
        return Memory(
            held.parameters + (held.pieces if on_device else 0) + max(whole_block, whole_head),
            after,
            held.optimizer if on_device else 0,
            flown + reading * passes + last + last_block,
            loss,
            held.parameters + (aside if on_device else 0) + max(moments.values()),
            0 if on_device else aside + size.piece_gradients + stepping,
        )

    def _beyond(self, plan: Plan, stage: Stage, shape: Shape, block: int, passing: int, coming: int) -> int:
        """What backward of a block, the largest, that keeps ``block`` needs beyond what is kept: beside a gradient that
        is ``passing`` in its MLP, and beside those that are ``coming`` until it is in attention."""
        mlp, beside, attention = self._extra(shape)
        found = max(mlp, beside + passing, attention + coming)
        upstream = activations.boundary(self.outline, shape, self.precision)
        if plan.recompute:  # it goes forward when the gradient of its output is there; backward has both, and a copy
            attending = activations.attending(self.outline, shape, self.precision)
            found = max(block + found + 2 * upstream, attending + upstream)
        # That of a stage's output has been received, and paddle's backward begins with a copy.
        return found if stage.last else found + upstream

    def _kept_of_blocks(self, blocks: tuple[int, ...], shape: Shape, recompute: bool) -> tuple[int, int]:
        """What ``blocks`` keep of a micro-batch, and what the largest of them keeps without recomputation."""
        full = [self._block(self._like[number], shape) for number in blocks]
        if not recompute:
            return sum(full), max(full)
        return activations.boundary(self.outline, shape, self.precision) * len(full), max(full)

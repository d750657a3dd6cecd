"""What a plan's busiest rank sends in a step, in bytes, with ring algorithms; docs/plan.md has the formulas."""

from __future__ import annotations

from dataclasses import dataclass

from sft_parallel_4d import activations
from sft_parallel_4d.memory import Calculator
from sft_parallel_4d.model_size import Stage
from sft_parallel_4d.plans import Plan

COLUMN = 5
"""Column-parallel Linears of a block (q, k, v, gate, up), which are not fused and communicate one by one."""
ROWS = 2
"""Row-parallel ones (o, down)."""


@dataclass(frozen=True)
class Volume:
    """Bytes that one rank sends in a step, by what for."""

    data: int = 0
    sharding: int = 0
    tensor: int = 0
    pipeline: int = 0

    @property
    def total(self) -> int:
        return self.data + self.sharding + self.tensor + self.pipeline


def busiest(calculator: Calculator, plan: Plan) -> Volume:
    """The rank of ``plan`` that sends most."""
    found = calculator.stages(plan.tensor, plan.pipeline)
    return max((_rank(calculator, plan, number, stage) for number, stage in enumerate(found)), key=lambda v: v.total)


def _rank(calculator: Calculator, plan: Plan, number: int, stage: Stage) -> Volume:
    outline, precision, shape = calculator.outline, calculator.precision, calculator.shape(plan)
    size, micro = stage.size, plan.accumulation
    # Gradients and weights travel in the weights' type.
    trained = size.trained * precision.weights // 8
    gradients = trained // plan.sharding if plan.stage else trained
    data = 2 * _part(plan.data) * gradients
    scatter = _part(plan.sharding) * trained
    sharding = {
        0: 0.0,
        1: 2 * scatter,  # gradients to their owners, stepped weights back
        2: micro * scatter + scatter,
        3: micro * (2 * _part(plan.sharding) * size.weights + scatter),
    }[plan.stage]
    width = precision.products // 8
    hidden = shape.tokens * outline.hidden * width
    # An all-reduce is a reduce-scatter and an all-gather; sequence parallelism has the one here and the other there.
    half = _part(plan.tensor) * hidden
    if plan.sequence:
        forward, backward = (COLUMN + ROWS) * half, (COLUMN + ROWS) * half
    else:
        forward, backward = 2 * ROWS * half, 2 * COLUMN * half
    tensor = len(stage.blocks) * (backward + forward * (2 if plan.recompute else 1))
    if stage.first:
        tensor += 2 * half  # the embedding's output
    if stage.last:
        tensor += 2 * _part(plan.tensor) * shape.targets * outline.hidden * width  # lm_head's input gradient
    neighbours = (number > 0) + (number < plan.pipeline - 1)
    pipeline = micro * neighbours * activations.boundary(outline, shape, precision)
    if plan.pipeline > 1 and outline.tied and (stage.first or stage.last) and outline.embedding.trains:
        pipeline += outline.embedding.size // plan.tensor * precision.weights // 8  # the two copies' gradient
    return Volume(round(data), round(sharding), round(micro * tensor), pipeline)


def _part(ranks: int) -> float:
    """What a rank sends of a tensor in a ring's reduce-scatter or all-gather."""
    return (ranks - 1) / ranks

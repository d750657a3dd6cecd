"""Plans in order: those that fit first, the quickest of them first, by a rough time that says what it assumes."""

from __future__ import annotations

from dataclasses import dataclass

from sft_parallel_4d.communication import Volume, busiest
from sft_parallel_4d.memory import Calculator, Memory
from sft_parallel_4d.outline import Outline
from sft_parallel_4d.plans import Plan


@dataclass(frozen=True)
class Device:
    """``memory`` bytes; ``flops`` a second that training sustains; ``bandwidth`` bytes a second that it sends."""

    memory: int
    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Answer:
    """A plan and what it needs; ``seconds`` is the estimate for a step that the order follows."""

    plan: Plan
    memory: Memory
    volume: Volume
    seconds: float
    fits: bool


def ranked(calculator: Calculator, plans: list[Plan], device: Device) -> list[Answer]:
    """All ``plans``, best first; those that do not fit come last, the smallest of them first."""
    answers = []
    for plan in plans:
        memory, volume = calculator.fullest(plan), busiest(calculator, plan)
        seconds = _seconds(calculator, plan, volume, device)
        answers.append(Answer(plan, memory, volume, seconds, memory.peak <= device.memory))
    return sorted(answers, key=lambda a: (not a.fits, a.seconds if a.fits else a.memory.peak, a.memory.peak))


def _seconds(calculator: Calculator, plan: Plan, volume: Volume, device: Device) -> float:
    """Operations over all devices, the pipeline's idle share, and what is sent, one after the other."""
    shape = calculator.shape(plan)
    tokens = shape.tokens * plan.accumulation * plan.data_world * plan.context
    forward = _operations(calculator.outline, shape.length)
    # Backward computes gradients of inputs, and of weights where these train.
    passes = 1 + 1 + (1 if calculator.outline.embedding.trains else 0) + (1 if plan.recompute else 0)
    idle = (plan.accumulation + plan.pipeline - 1) / plan.accumulation
    return passes * forward * tokens / plan.devices / device.flops * idle + volume.total / device.bandwidth


def _operations(outline: Outline, length: int) -> float:
    """Of a token's forward: two a weight of a matrix, and causal attention's two products over half a row."""
    matrices = 0.0
    for block, linears in zip(outline.architecture.blocks, outline.blocks, strict=True):
        for linear in linears:
            chosen = block.experts.chosen / block.experts.count if block.experts and ".experts." in linear.name else 1
            matrices += linear.in_features * linear.out_features * chosen
    attention = 2 * outline.heads * outline.head_size * length * len(outline.blocks)
    return 2 * (matrices + outline.vocabulary * outline.hidden) + attention

"""AdamW as its paper has it, in float64, by numpy; and parameters and gradients to try an optimizer with."""

from __future__ import annotations

from typing import Any

import numpy as np

from sft.settings.arguments import TrainingArguments

SHAPES = {"block.weight": (4, 3), "block.bias": (3,), "head.weight": (3, 5)}


def adamw(
    value: np.ndarray, gradients: list[np.ndarray], rates: list[float], decay: float, training: TrainingArguments
) -> np.ndarray:
    """Decoupled weight decay (arXiv 1711.05101, algorithm 2) in float64, η_t α given as one rate a step."""
    beta1, beta2 = training.adam_beta1, training.adam_beta2
    value = value.astype(np.float64)
    first, second = np.zeros_like(value), np.zeros_like(value)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        gradient = gradient.astype(np.float64)
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        corrected, spread = first / (1 - beta1**step), second / (1 - beta2**step)
        value = value - rate * (corrected / (np.sqrt(spread) + training.adam_epsilon) + decay * value)
    return value


def parameters_of(paddle: Any, seed: int = 0) -> dict[str, Any]:
    """New parameters of the same values; paddle gives them names that have not been used before."""
    generator = np.random.default_rng(seed)
    made = {}
    for name, shape in SHAPES.items():
        made[name] = paddle.create_parameter(shape, "float32")
        made[name].set_value(generator.standard_normal(shape).astype(np.float32))
    return made


def gradients_of(steps: int, seed: int = 1) -> dict[str, list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    return {
        name: [generator.standard_normal(shape).astype(np.float32) for _ in range(steps)]
        for name, shape in SHAPES.items()
    }


def apply(
    paddle: Any, optimizer: Any, gradients: dict[str, list[np.ndarray]], steps: range, rates: list[float]
) -> None:
    """Steps whose gradients are given: that of Σ p·g is g."""
    for step in steps:
        loss = paddle.add_n(
            [(p * paddle.to_tensor(gradients[name][step])).sum() for name, p in optimizer.parameters.items()]
        )
        loss.backward()
        optimizer.step(rates[step])

"""AdamW over named parameter groups, the learning-rate schedule, and optimizer state by structured names."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle

from sft.errors import SftError, UsageError
from sft.seams import ParameterGroup
from sft.settings import TrainingArguments


def default_groups(parameters: dict[str, Any], weight_decay: float) -> list[ParameterGroup]:
    """Matrices decay; vectors (biases, norms) do not, as the field does it."""
    decay = {name: p for name, p in parameters.items() if p.ndim > 1}
    rest = {name: p for name, p in parameters.items() if p.ndim <= 1}
    groups = [ParameterGroup("decay", decay, 1.0, weight_decay), ParameterGroup("no_decay", rest, 1.0, 0.0)]
    return [group for group in groups if group.parameters]


def check_groups(groups: list[ParameterGroup], parameters: dict[str, Any]) -> None:
    """Every trainable parameter is in exactly one group, or :class:`UsageError` names the first that is not."""
    seen = [name for group in groups for name in group.parameters]
    for name in parameters:
        if seen.count(name) != 1:
            raise UsageError(
                f"Parameter {name} is in {seen.count(name)} optimizer groups and must be in one; "
                "a plugin that changes parameter groups is at fault."
            )


def learning_rate(step: int, total: int, training: TrainingArguments) -> float:
    """The rate of optimizer step ``step`` (from 1) of ``total``: linear warm-up, then the schedule's decay.

    As in Hugging Face's schedules: the factor is (step-1)/warmup while warming up; "linear" and "cosine" reach 0
    after the last step; "constant" stays.
    """
    done = step - 1
    warmup = training.warmup_steps or math.ceil(total * training.warmup_ratio)
    if done < warmup:
        return training.learning_rate * done / warmup
    progress = (done - warmup) / max(1, total - warmup)
    shape = {
        "constant": 1.0,
        "linear": max(0.0, 1.0 - progress),
        "cosine": 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))),
    }
    return training.learning_rate * shape[training.lr_scheduler_type]


class Optimizer:
    """paddle's AdamW; knows its parameters by structured name."""

    def __init__(self, groups: list[ParameterGroup], training: TrainingArguments) -> None:
        self.parameters = {name: p for group in groups for name, p in group.parameters.items()}
        self._adamw = paddle.optimizer.AdamW(
            learning_rate=training.learning_rate,
            beta1=training.adam_beta1,
            beta2=training.adam_beta2,
            epsilon=training.adam_epsilon,
            parameters=[
                {
                    "params": list(group.parameters.values()),
                    "learning_rate": group.learning_rate,
                    "weight_decay": group.weight_decay,
                }
                for group in groups
            ],
        )

    def step(self, rate: float) -> None:
        """Apply the gradients at learning rate ``rate`` and clear them."""
        self._adamw.set_lr(rate)
        self._adamw.step()
        self._adamw.clear_grad()

    def state(self) -> dict[str, np.ndarray]:
        """``NAME.moment1`` and so on for every parameter, by structured name."""
        return {
            f"{name}.{kind}": tensors[parameter.name].numpy()
            for kind, tensors in self._adamw._accumulators.items()
            for name, parameter in self.parameters.items()
            if parameter.name in tensors
        }

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Take back what :meth:`state` gave, for the same parameters."""
        # paddle makes its state at the first step; here it must exist before it.
        block = paddle.base.framework.default_main_program().global_block()
        self._adamw._create_accumulators(block, list(self.parameters.values()))
        expected = self.state()
        if set(expected) != set(state):
            odd = sorted(set(expected) ^ set(state))[0]
            raise SftError(f"The checkpoint's optimizer state does not fit this run (first difference: {odd}).")
        for kind, tensors in self._adamw._accumulators.items():
            for name, parameter in self.parameters.items():
                tensors[parameter.name].set_value(state[f"{name}.{kind}"])

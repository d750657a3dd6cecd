"""AdamW, the optimizer of a run for which no plugin brings another, in few calls of paddle's fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import paddle

from sft.optimizer import Optimizer
from sft.seams import ParameterGroup
from sft.settings.arguments import TrainingArguments


class AdamW(Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2), with the settings ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` of
    ``training``. Each parameter is corrected for the number of its own steps.

    A subclass may keep something else of some parameters: it calls this class's :meth:`new_state` and :meth:`update`
    for the others.

    Kept of each: ``moment1`` and ``moment2``, float32 of its shape, and the powers of β, float32 [1].

    Attributes:
        training: The settings of the run.
    """

    elementwise = True
    grains: ClassVar[dict[str, int]] = {"beta1_pow_acc": 0, "beta2_pow_acc": 0}

    def __init__(self, groups: Sequence[ParameterGroup], training: TrainingArguments) -> None:
        super().__init__(groups)
        self.training = training
        # Of each name the β₁ᵗ that it began with, and its steps since then: what is of one age is stepped together.
        self._ages: dict[str, tuple[float, int]] = {}

    def new_state(self, name: str, value: Any) -> dict[str, Any]:
        self._ages[name] = (self.training.adam_beta1, 0)
        return {"moment1": paddle.zeros_like(value), "moment2": paddle.zeros_like(value), **self.powers()}

    def powers(self) -> dict[str, Any]:
        """β₁ and β₂ before the first step, float32 [1], on the host, which passes them to the kernel."""
        betas = {"beta1_pow_acc": self.training.adam_beta1, "beta2_pow_acc": self.training.adam_beta2}
        place = paddle.CPUPlace()
        return {kind: paddle.to_tensor(np.array([beta], np.float32), place=place) for kind, beta in betas.items()}

    def update(self, gradients: dict[str, Any], rate: float, decay: float) -> None:
        together: dict[tuple[float, int], list[str]] = {}
        for name in gradients:
            together.setdefault(self._ages[name], []).append(name)
        for (began, steps), names in together.items():
            kept = [self.kept[name] for name in names]
            self.adam([self.values[name] for name in names], [gradients[name] for name in names], kept, rate, decay)
            self._ages.update(dict.fromkeys(names, (began, steps + 1)))

    def adam(
        self, values: list[Any], gradients: list[Any], kept: list[dict[str, Any]], rate: float, decay: float
    ) -> None:
        """One step of float32 ``values`` that have been stepped equally often, in place, with the state of each, at
        learning rate ``rate`` with weight decay ``decay``."""
        training = self.training
        paddle._C_ops.fused_adam_(
            values,
            gradients,
            paddle.full([1], rate),
            *([one["moment1"] for one in kept], [one["moment2"] for one in kept], None),
            *([one["beta1_pow_acc"] for one in kept], [one["beta2_pow_acc"] for one in kept]),
            *(None, None),  # master copies of its own, and whether to skip
            *(training.adam_beta1, training.adam_beta2, training.adam_epsilon),
            CHUNK,
            decay,
            *(True, False, False, False),  # decoupled decay; no masters, no shared powers of β, no AMSGrad
        )

    def load(self, state: dict[str, np.ndarray]) -> None:
        super().load(state)
        for name, kept in self.kept.items():
            if "beta1_pow_acc" in kept:
                self._ages[name] = (float(kept["beta1_pow_acc"].reshape([-1])[0]), 0)


CHUNK = 1 << 16
"""Values that a block of a GPU steps at a time, as paddle's own default is."""

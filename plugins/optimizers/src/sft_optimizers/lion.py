"""Lion (arXiv 2302.06675, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import paddle

import sft

if TYPE_CHECKING:
    from sft import ParameterGroup


class Lion(sft.Optimizer):
    """w ← (1 - η λ) w - η sign(β₁ m + (1 - β₁) g), then m ← β₂ m + (1 - β₂) g. Kept of each parameter: ``moment``."""

    elementwise = True

    def __init__(self, groups: Sequence[ParameterGroup], beta1: float, beta2: float) -> None:
        super().__init__(groups)
        self._beta1, self._beta2 = beta1, beta2

    def new_state(self, name: str, value: Any) -> dict[str, Any]:
        return {"moment": paddle.zeros_like(value)}

    def update(self, gradients: dict[str, Any], rate: float, decay: float) -> None:
        for name, gradient in gradients.items():
            value, moment = self.values[name], self.kept[name]["moment"]
            direction = paddle.sign(self._beta1 * moment + (1 - self._beta1) * gradient)
            value.scale_(1 - rate * decay).subtract_(rate * direction)
            moment.scale_(self._beta2).add_(gradient.scale_(1 - self._beta2))

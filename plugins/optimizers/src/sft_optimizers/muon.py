"""Muon: momentum whose matrices are orthogonalised (Keller Jordan's), with the step sizes of arXiv 2502.16982."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any

import paddle

import sft

if TYPE_CHECKING:
    from sft import ParameterGroup

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Newton-Schulz: chosen so that small singular values grow fastest; all end between 0.7 and 1.2."""


class Muon(sft.AdamW):
    """Of the ``matrices`` (names): m ← μ m + (1 - μ) g; w ← (1 - η λ) w - η 0.2 √max(rows, columns) O, where O is
    (1 - μ) g + μ m (Nesterov's), orthogonalised. All else is stepped by AdamW.

    A step has about the root mean square 0.2 of one of AdamW, so that learning rate and weight decay mean the same for
    both. Kept of a matrix: ``momentum``. It is stepped as a whole, so that none can be divided.
    """

    elementwise = False

    def __init__(
        self, groups: Sequence[ParameterGroup], training: Any, matrices: Set[str], momentum: float, steps: int
    ) -> None:
        super().__init__(groups, training)
        self._matrices, self._momentum, self._steps = matrices, momentum, steps

    def new_state(self, name: str, value: Any) -> dict[str, Any]:
        return {"momentum": paddle.zeros_like(value)} if name in self._matrices else super().new_state(name, value)

    def update(self, gradients: dict[str, Any], rate: float, decay: float) -> None:
        rest = {name: gradient for name, gradient in gradients.items() if name not in self._matrices}
        if rest:
            super().update(rest, rate, decay)
        share = 1 - self._momentum
        for name, gradient in gradients.items():
            if name in self._matrices:
                value, momentum = self.values[name], self.kept[name]["momentum"]
                fresh = share * gradient
                momentum.scale_(self._momentum).add_(fresh)
                ahead = fresh + self._momentum * momentum
                step = rate * 0.2 * math.sqrt(max(value.shape)) * orthogonalised(ahead, self._steps)
                value.scale_(1 - rate * decay).subtract_(step)


def orthogonalised(matrix: Any, steps: int) -> Any:
    """float32 [rows, columns] → U V^T of its singular value decomposition, but for singular values from 0.7 to 1.2, by
    ``steps`` of Newton-Schulz in float32."""
    a, b, c = COEFFICIENTS
    lies = matrix.shape[0] <= matrix.shape[1]
    x = matrix if lies else matrix.t()
    norm = (sft.row_sums(x.square().reshape([1, -1]))).sqrt().reshape([])
    x = x / norm.clip(min=1e-7)
    for _ in range(steps):
        square = paddle.matmul(x, x, transpose_y=True)
        x = a * x + paddle.matmul(b * square + c * paddle.matmul(square, square), x)
    return x if lies else x.t()

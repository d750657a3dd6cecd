"""The LoRA layer: y = x·W + b + s·dropout(x)·A·B (arXiv 2106.09685, equation 3), in Paddle's [in, out] layout."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import paddle

import sft


class LoraLinear(paddle.nn.Layer):
    """A frozen Linear (or the layer that stands for one) and a trainable low-rank update beside it.

    ``lora_A`` float32 [in, r], ``lora_B`` float32 [r, out]. Input [..., in] → output [..., out]. A refinement may
    :meth:`subtract` a frozen pair from the base.
    """

    kernels = sft.PLAIN

    sides: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "lora_A": ("in", None),
        "lora_B": (None, "out"),
        "frozen_A": ("in", None),
        "frozen_B": (None, "out"),
    }

    def __init__(self, base: Any, in_features: int, out_features: int, rank: int, scaling: float, dropout: float):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.scaling = rank, scaling
        zero = paddle.nn.initializer.Constant(0.0)
        self.lora_A = self.create_parameter([in_features, rank], dtype="float32", default_initializer=zero)
        self.lora_B = self.create_parameter([rank, out_features], dtype="float32", default_initializer=zero)
        self.dropout = paddle.nn.Dropout(dropout) if dropout else None
        self.frozen_A: Any = None
        self.frozen_B: Any = None

    def subtract(self, a: np.ndarray, b: np.ndarray) -> None:
        """From now on the base is W − s·a·b; float32 [in, r] and [r, out]."""
        self.frozen_A, self.frozen_B = paddle.to_tensor(a), paddle.to_tensor(b)

    def subtracted(self) -> tuple[np.ndarray, np.ndarray]:
        """The pair given to :meth:`subtract`."""
        return self.frozen_A.numpy(), self.frozen_B.numpy()

    def forward(self, x: Any) -> Any:
        # With dropout gradients come in one order, whether it draws or not: other processes may wait for each of them.
        drops = self.dropout is not None and (self.training or paddle.is_grad_enabled())
        if type(self.base) is sft.Linear and not drops:
            pair = self.lora_A, self.lora_B, self.scaling
            y = self.kernels.low_rank_linear(x, self.base.weight, self.base.bias, *pair)
        else:
            update = x if self.dropout is None else self.dropout(x)
            y = self.base(x) + self._product(update, self.lora_A, self.lora_B)
        return y if self.frozen_A is None else y - self._product(x, self.frozen_A, self.frozen_B)

    def _product(self, x: Any, a: Any, b: Any) -> Any:
        # Scaled where it is smallest: [..., r].
        return paddle.matmul(paddle.matmul(x, a) * self.scaling, b)

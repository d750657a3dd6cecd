"""The LoRA layer: y = x·W + b + s·dropout(x)·A·B (arXiv 2106.09685, equation 3), in Paddle's [in, out] layout."""

from __future__ import annotations

from typing import Any

import paddle


class LoraLinear(paddle.nn.Layer):
    """A frozen Linear (or the layer that stands for one) and a trainable low-rank update beside it.

    ``lora_A`` float32 [in, r], ``lora_B`` float32 [r, out]. Input [..., in] → output [..., out].
    """

    def __init__(self, base: Any, in_features: int, out_features: int, rank: int, scaling: float, dropout: float):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.scaling = rank, scaling
        zero = paddle.nn.initializer.Constant(0.0)
        self.lora_A = self.create_parameter([in_features, rank], dtype="float32", default_initializer=zero)
        self.lora_B = self.create_parameter([rank, out_features], dtype="float32", default_initializer=zero)
        self.dropout = paddle.nn.Dropout(dropout) if dropout else None

    def forward(self, x: Any) -> Any:
        update = x if self.dropout is None else self.dropout(x)
        # Scaled where it is smallest: [..., r].
        return self.base(x) + paddle.matmul(paddle.matmul(update, self.lora_A) * self.scaling, self.lora_B)

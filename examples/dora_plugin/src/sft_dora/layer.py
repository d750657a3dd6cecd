"""The DoRA layer (arXiv 2402.09353, equation 5), in Paddle's [in, out] layout; imports paddle, so the plugin imports it
inside its hooks."""

from __future__ import annotations

from typing import Any, ClassVar

import paddle

import sft


class DoraLinear(paddle.nn.Layer):
    """y = x·V ⊙ m/‖V‖ + bias with V = W + s·A·B: input [..., in] → output [..., out].

    W is frozen. What trains: ``lora_A`` float32 [in, r], ``lora_B`` float32 [r, out], and ``magnitude`` float32 [out],
    m. ‖V‖ [out] is the norm of each output's weights, over all inputs.
    """

    sides: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "lora_A": ("in", None),
        "lora_B": (None, "out"),
        "magnitude": ("out",),
    }

    def __init__(self, base: Any, in_features: int, out_features: int, rank: int, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        zero = paddle.nn.initializer.Constant(0.0)
        self.lora_A = self.create_parameter([in_features, rank], dtype="float32", default_initializer=zero)
        self.lora_B = self.create_parameter([rank, out_features], dtype="float32", default_initializer=zero)
        self.magnitude = self.create_parameter([out_features], dtype="float32", default_initializer=zero)

    @paddle.no_grad()
    def norm(self) -> Any:
        """‖V‖, float32 [out]; a constant in the gradient (section 4.3 of the paper)."""
        with paddle.amp.auto_cast(enable=False):
            v = sft.linear_weight(self.base) + self.scaling * paddle.matmul(self.lora_A, self.lora_B)
            # Where processes share the inputs, each has the squares of its own.
            return sft.sum_over(self, "in", v.square().sum(axis=0)).sqrt()

    def forward(self, x: Any) -> Any:
        y, bias = self.base(x), getattr(self.base, "bias", None)
        if bias is not None:
            y = y - bias
        y = y + paddle.matmul(paddle.matmul(x, self.lora_A) * self.scaling, self.lora_B)
        y = y * (self.magnitude / self.norm()).astype(y.dtype)
        return y if bias is None else y + bias

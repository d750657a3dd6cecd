"""DoRA's layer (arXiv 2402.09353, equation 5), made of the class that it is given."""

from __future__ import annotations

from typing import Any

import paddle

import sft

SMALLEST = 1e-30
"""Of a squared norm: an output all of whose weights are zero stays zero."""


def dora_linear(base_class: Any) -> type:
    """A subclass of LoRA's layers with ``magnitude`` float32 [out], m."""

    class DoraLinear(base_class):
        """y = x·V ⊙ m/‖V‖ + b: input [..., in] → output [..., out]."""

        def begin(self, weight: Any) -> None:
            """m becomes the norm of each output's weights. (What a refinement subtracts from W it has put into A·B.)"""
            self.magnitude.set_value(sft.row_sums(weight.T.square()).squeeze(-1).sqrt())

        def forward(self, x: Any) -> Any:
            gain, bias = self.magnitude / self.norm(), sft.linear_bias(self.base)
            if not self.drops():
                y = super().forward(x)
                gain = gain.astype(y.dtype)
                return y * gain if bias is None else (y - bias) * gain + bias
            # As PEFT does: the base is reached undropped, and what the magnitude changes is of what was dropped.
            dropped = self.dropout(x)
            y, again = self.residual(x), self.residual(dropped)
            gain = gain.astype(y.dtype)
            return y + (gain - 1.0) * (again if bias is None else again - bias) + gain * self.update(dropped)

        @paddle.no_grad()
        def norm(self) -> Any:
            """‖W + s·A·B‖, float32 [out]; a constant in the gradient (section 4.3 of the paper).

            ‖W‖² + 2s·Σ B⊙(AᵀW) + s²·Σ B⊙(AᵀA·B), each summed over the rank: no second matrix of W's size is made.
            """
            with paddle.amp.auto_cast(enable=False):
                weight, (a, b) = sft.linear_weight(self.base), self.pair()
                mixed = paddle.matmul(a, weight, transpose_x=True) * 2.0
                mixed += paddle.matmul(paddle.matmul(a, a, transpose_x=True) * self.scaling, b)
                squares = self._base_squares(weight) + (b * mixed).sum(axis=0) * self.scaling
                # Where processes share the inputs, each has the squares of its own.
                return sft.sum_over(self, "in", squares).clip(min=SMALLEST).sqrt()

        def _base_squares(self, weight: Any) -> Any:
            """‖W‖² of what is here of the base, which is frozen: computed once for it."""
            held = getattr(self, "_squares", None)
            if held is None or held[0] is not self.base:
                held = (self.base, sft.row_sums(weight.T.square()).squeeze(-1))
                object.__setattr__(self, "_squares", held)
            return held[1]

    return DoraLinear

"""A model computed in 16 bits on a CPU.

Products have bfloat16 factors and float32 sums, everything else is float32. The matrices of Linears, of the embedding
and of lm_head may be held in bfloat16 (half the memory); what trains is float32, and rounded for each product. Of a
Linear's input backward keeps the rounded form, which layers that read the same tensor share; or nothing, where what is
kept anyway makes it again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import paddle
from paddle.nn import functional as F

from sft.models.kernels import Kernels
from sft.models.onednn import OneDNN
from sft.models.packed import Packs
from sft.models.sums import column_sums

_BFLOAT16 = paddle.bfloat16  # paddle looks for its types anew each time


class SixteenBits(Kernels):
    """Linears, low-rank updates and products of the loss through ``onednn``; norms, rotation and gates are paddle's.

    The update of :meth:`low_rank_linear` is computed in float32: it is what trains, and a hundredth of the work.
    """

    narrow = True

    def __init__(self, onednn: OneDNN) -> None:
        self._onednn = onednn
        # Weak, as a tensor would keep its whole graph.
        self._last: tuple[weakref.ref[Any], int, Any] | None = None
        self._packs: Packs | None = None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """As :meth:`sft.Kernels.answering`: frozen matrices are held in oneDNN's own layout, too."""
        packs = self._packs = self._onednn.packs()
        try:
            yield
        finally:
            if self._packs is packs:  # answers may be computed side by side
                self._packs = None
            packs.close()

    def linear(self, x: Any, weight: Any, bias: Any | None = None, transposed: bool = False) -> Any:
        """As :meth:`sft.Kernels.linear`: x float32, W and b of either type → float32."""
        if paddle.is_grad_enabled():
            return _Linear.apply(x, weight, bias, transposed, self)
        return self._linear(self._rounded(x), weight, bias, transposed)

    def low_rank_linear(self, x: Any, weight: Any, bias: Any | None, a: Any, b: Any, scaling: float) -> Any:
        """As :meth:`sft.Kernels.low_rank_linear`; x, A and B float32 → float32."""
        if paddle.is_grad_enabled():
            return _LowRankLinear.apply(x, weight, bias, a, b, scaling, self)
        y = self._linear(self._rounded(x), weight, bias)
        low = paddle.matmul(_rows(x), a).scale_(scaling)
        return self._onednn.product(low, b, out=y)

    def swiglu(self, gate: Any, up: Any) -> Any:
        """As :meth:`sft.Kernels.swiglu`; backward keeps both in bfloat16."""
        if paddle.is_grad_enabled() and not (gate.stop_gradient and up.stop_gradient):
            return _SwiGLU.apply(gate, up, self)
        return super().swiglu(gate, up)

    def kept(self, x: Any) -> Any:
        return self._onednn.rounded(x) if x.dtype == paddle.float32 else x

    def restored(self, kept: Any) -> Any:
        return self._onednn.widened(kept) if kept.dtype == paddle.bfloat16 else kept

    def product(self, x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False) -> Any:
        """As :meth:`sft.Kernels.product`, of two matrices of either type → float32."""
        return self._onednn.product(self._narrow(x), self._narrow(y), transpose_x, transpose_y)

    def _linear(self, rounded: Any, weight: Any, bias: Any | None, transposed: bool = False) -> Any:
        """The rounded x [..., in] → x · W + b, float32 [..., out]."""
        y = None
        if self._packs is not None and weight.dtype == _BFLOAT16:
            y = self._packs.product(rounded, weight, transposed)
        if y is None:
            y = self._onednn.product(rounded, self._narrow(weight), transpose_y=transposed)
        return y if bias is None else y.add_(bias.astype("float32"))

    def _narrow(self, matrix: Any) -> Any:
        return matrix if matrix.dtype == _BFLOAT16 else self._onednn.rounded(matrix)

    def _rounded(self, x: Any) -> Any:
        """x in bfloat16. The last one is kept: queries, keys and values, gate and up read one x."""
        last = self._last
        if last is not None and last[1] == x.inplace_version and last[0]() is x:
            return last[2]
        rounded = self._narrow(x)
        self._last = (weakref.ref(x), x.inplace_version, rounded)
        return rounded


class _SwiGLU(paddle.autograd.PyLayer):
    """silu(gate) · up; keeps both rounded."""

    @staticmethod
    def forward(ctx: Any, gate: Any, up: Any, kernels: SixteenBits) -> Any:
        ctx.wants, ctx.kernels = _wants(gate, up), kernels
        ctx.save_for_backward(kernels.kept(gate), kernels.kept(up))
        return F.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        gate, up = (ctx.kernels.restored(kept) for kept in ctx.saved_tensor())
        sigmoid = F.sigmoid(gate)
        silu = gate * sigmoid
        gate_grad = upstream * up * (sigmoid + silu - silu * sigmoid) if ctx.wants[0] else None
        return gate_grad, upstream * silu if ctx.wants[1] else None


class _Linear(paddle.autograd.PyLayer):
    """x [..., in], W, b → [..., out]. Of W that does not train nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any | None, transposed: bool, kernels: SixteenBits) -> Any:
        ctx.shape, ctx.transposed, ctx.kernels = x.shape, transposed, kernels
        ctx.wants, rounded = _wants(x, weight, bias), kernels._rounded(x)
        ctx.save_for_backward(weight, rounded if ctx.wants[1] else None)
        return kernels._linear(rounded, weight, bias, transposed)

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        weight, rounded = ctx.saved_tensor()
        product, gradient = ctx.kernels.product, ctx.kernels._narrow(_rows(upstream))
        x_grad = weight_grad = bias_grad = None
        if ctx.wants[0]:
            x_grad = product(gradient, weight, transpose_y=not ctx.transposed).reshape(ctx.shape)
        if ctx.wants[1]:
            entered = _rows(rounded)
            left, right = (gradient, entered) if ctx.transposed else (entered, gradient)
            weight_grad = product(left, right, transpose_x=True).astype(weight.dtype)
        if ctx.wants[2]:
            bias_grad = column_sums(_rows(upstream))
        return _gradients(ctx, x_grad, weight_grad, bias_grad)


class _LowRankLinear(paddle.autograd.PyLayer):
    """x · W + b + s · (x · A) · B, of which backward keeps s · x · A [n, r], and x in bfloat16, or what x can be made
    of again."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, bias: Any | None, a: Any, b: Any, scaling: float, kernels: SixteenBits
    ) -> Any:
        ctx.shape, ctx.scaling, ctx.kernels = x.shape, scaling, kernels
        ctx.wants, rounded = _wants(x, weight, bias, a, b), kernels._rounded(x)
        low = paddle.matmul(_rows(x), a).scale_(scaling)
        ctx.again, kept = kernels.remembered(x) or (kernels.restored, (rounded,))
        ctx.save_for_backward(weight, a, b, low, *kept)
        y = kernels._linear(rounded, weight, bias)
        return kernels._onednn.product(low, b, out=y)

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        weight, a, b, low, *kept = ctx.saved_tensor()
        onednn, upstream = ctx.kernels._onednn, _rows(upstream)
        narrow = paddle.matmul(upstream, b, transpose_y=True).scale_(ctx.scaling)  # [n, r]
        x_grad = weight_grad = bias_grad = a_grad = b_grad = None
        if ctx.wants[0] or ctx.wants[1]:
            gradient = ctx.kernels._narrow(upstream)
        if ctx.wants[0]:
            x_grad = ctx.kernels.product(gradient, weight, transpose_y=True)
            x_grad = onednn.product(narrow, a, transpose_y=True, out=x_grad).reshape(ctx.shape)
        if ctx.wants[1] or ctx.wants[3]:
            x = _rows(ctx.again(*kept))
        if ctx.wants[1]:
            weight_grad = ctx.kernels.product(x, gradient, transpose_x=True).astype(weight.dtype)
        if ctx.wants[2]:
            bias_grad = column_sums(upstream)
        if ctx.wants[3]:
            a_grad = paddle.matmul(x, narrow, transpose_x=True)
        if ctx.wants[4]:
            b_grad = onednn.product(low, upstream, transpose_x=True)
        return _gradients(ctx, x_grad, weight_grad, bias_grad, a_grad, b_grad)


def _rows(x: Any) -> Any:
    """[..., width] → [n, width]."""
    return x if x.ndim == 2 else x.reshape([-1, x.shape[-1]])


def _wants(*tensors: Any) -> tuple[bool | None, ...]:
    """Which of them need a gradient; None for what is no tensor."""
    return tuple(None if tensor is None else not tensor.stop_gradient for tensor in tensors)


def _gradients(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    """What paddle takes from a backward: a gradient, or None, for each tensor that went in."""
    return tuple(one for one, wants in zip(gradients, ctx.wants, strict=True) if wants is not None)

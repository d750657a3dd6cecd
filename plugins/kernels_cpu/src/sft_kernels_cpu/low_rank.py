"""A Linear with a low-rank update as one step: three products that add up in one place."""

from __future__ import annotations

from typing import Any

import paddle

from sft_kernels_cpu.library import blas
from sft_kernels_cpu.tensors import dense, empty

_ROWS, _AS_IT_IS, _TRANSPOSED = 101, 111, 112  # of CBLAS


def product(
    x: Any, y: Any, out: Any, scale: float = 1.0, onto: bool = False, turn_x: bool = False, turn_y: bool = False
) -> Any:
    """``out`` = scale · x · y, of dense float32 matrices, each transposed first where that is said; added to what is
    there where ``onto``."""
    (rows, inner), columns = x.shape[::-1] if turn_x else x.shape, out.shape[1]
    turns = (_TRANSPOSED if turned else _AS_IT_IS for turned in (turn_x, turn_y))
    factors = x.data_ptr(), x.shape[1], y.data_ptr(), y.shape[1]
    multiply: Any = blas()
    multiply(_ROWS, *turns, rows, columns, inner, scale, *factors, float(onto), out.data_ptr(), columns)
    return out


class LowRankLinear(paddle.autograd.PyLayer):
    """x [n, in], W [in, out] and b, which do not train, A [in, r], B [r, out] → [n, out].

    Backward keeps x and s · x · A. ``again`` computes x once more, from tensors that are kept anyway, and then x is not
    kept: ``again[0](*again[1])``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, bias: Any | None, a: Any, b: Any, scaling: float, again: Any, library: Any
    ) -> Any:
        y, low = computed(x, weight, bias, a, b, scaling, library)
        ctx.again, kept = (None, [x]) if again is None else again
        ctx.save_for_backward(weight, a, b, low, *kept)
        ctx.wants = [None if one is None else not one.stop_gradient for one in (x, weight, bias, a, b)]
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        weight, a, b, low, *kept = ctx.saved_tensor()
        upstream = dense(upstream)
        narrow = product(upstream, b, empty(low.shape), ctx.scaling, turn_y=True)
        x_grad = a_grad = b_grad = None
        if ctx.wants[0]:
            x_grad = empty([upstream.shape[0], weight.shape[0]])
            product(upstream, weight, x_grad, turn_y=True)
            product(narrow, a, x_grad, onto=True, turn_y=True)
        if ctx.wants[3]:
            x = kept[0] if ctx.again is None else ctx.again(*kept).reshape([-1, a.shape[0]])
            a_grad = product(x, narrow, empty(a.shape), turn_x=True)
        if ctx.wants[4]:
            b_grad = product(low, upstream, empty(b.shape), turn_x=True)
        grads = zip((x_grad, None, None, a_grad, b_grad), ctx.wants, strict=True)
        return tuple(grad for grad, wanted in grads if wanted is not None)


def computed(x: Any, weight: Any, bias: Any | None, a: Any, b: Any, scaling: float, library: Any) -> tuple[Any, Any]:
    """The output, and s · x · A."""
    y = empty([x.shape[0], weight.shape[1]])
    if bias is not None:
        library.repeated(bias.data_ptr(), y.data_ptr(), *y.shape)
    product(x, weight, y, onto=bias is not None)
    low = product(x, a, empty([x.shape[0], a.shape[1]]), scaling)
    return product(low, b, y, onto=True), low

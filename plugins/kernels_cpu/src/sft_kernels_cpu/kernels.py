"""A model's pieces in native code, each one step with a gradient written by hand. Whatever is not float32 and on the
CPU, and whatever has no native code, is left to the kernels that the core would choose."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import paddle

import sft
from sft_kernels_cpu.answers import RoomyKeys, few_rows
from sft_kernels_cpu.attention import Mask, attention
from sft_kernels_cpu.library import blas, for_width
from sft_kernels_cpu.low_rank import LowRankLinear, computed
from sft_kernels_cpu.tensors import dense, empty, fits, learning, passing


class NativeKernels(sft.Kernels):
    """``library`` is what :func:`sft_kernels_cpu.library.native` found, ``rest`` computes what it has not."""

    def __init__(self, library: Any, rest: Any = sft.PLAIN) -> None:
        self._library, self._rest, self.narrow = library, rest, rest.narrow
        self.arithmetic = {**rest.arithmetic, "native_code": library.level}

    def rms_norm(self, x: Any, weight: Any, epsilon: float, offset: float) -> Any:
        if not fits(x, weight):
            return self._rest.rms_norm(x, weight, epsilon, offset)
        weight = dense(weight)
        if learning(x, weight):
            x, rest, library = dense(x), self._rest, self._library
            kept = rest.kept(x)
            y = _RMSNorm.apply(x, weight, epsilon, offset, library, rest, lambda: kept)
            self.remember(
                y, lambda kept, weight: _normed(rest.restored(kept), weight, epsilon, offset, library)[0], kept, weight
            )
            return y
        return _normed(x, weight, epsilon, offset, self._library, learns=False)[0]

    def rotate(self, x: Any, rotary: sft.Rotary, cosines: Any, sines: Any) -> Any:
        rows, length = cosines.shape[:2]
        if not fits(x, cosines, sines) or length != x.shape[1] or rows not in (1, x.shape[0]):
            return self._rest.rotate(x, rotary, cosines, sines)
        if learning(x):
            return _Turn.apply(x, cosines, sines, rotary.interleaved, self._library)
        return _turned(x, cosines, sines, rotary.interleaved, 1.0, self._library)

    def mask(self, ends: np.ndarray | None) -> Mask:
        return Mask(ends)

    def attention(self, query: Any, key: Any, value: Any, mask: Mask, cap: float | None) -> Any:
        # A head must be whole vectors.
        library, length = for_width(self._library, query.shape[3]), query.shape[1]
        if library is None or not mask.whole or not fits(query, key, value) or key.shape[1] != length:
            if mask.rest is None:
                mask.rest = self._rest.mask(mask.given)
            return self._rest.attention(query, key, value, mask.rest, cap)
        return attention(dense(query), dense(key), dense(value), mask, cap or 0.0, library, self._rest)

    def kept_keys(self, key: Any, value: Any) -> sft.KeptKeys:
        if not fits(key, value) or learning(key, value):
            return self._rest.kept_keys(key, value)
        return RoomyKeys(key, value, self._library, self._rest)

    def swiglu(self, gate: Any, up: Any) -> Any:
        return self._gated(gate, up, True) if _alike(gate, up) else self._rest.swiglu(gate, up)

    def geglu(self, gate: Any, up: Any) -> Any:
        return self._gated(gate, up, False) if _alike(gate, up) else self._rest.geglu(gate, up)

    def linear(self, x: Any, weight: Any, bias: Any | None = None, transposed: bool = False) -> Any:
        y = few_rows(self._library, x, weight, bias, transposed)
        return self._rest.linear(x, weight, bias, transposed) if y is None else y

    def low_rank_linear(self, x: Any, weight: Any, bias: Any | None, a: Any, b: Any, scaling: float) -> Any:
        y = few_rows(self._library, x, weight, bias, update=(a, b), scaling=scaling)
        if y is not None:
            return y
        base = [weight] if bias is None else [weight, bias]
        if self.narrow or blas() is None or not fits(x, *base, a, b) or learning(*base):
            return self._rest.low_rank_linear(x, weight, bias, a, b, scaling)
        weight, bias, a, b = (None if one is None else dense(one) for one in (weight, bias, a, b))
        parts, rows = (weight, bias, a, b, scaling), dense(x).reshape([-1, x.shape[-1]])
        if learning(x, a, b):
            y = LowRankLinear.apply(rows, *parts, self.remembered(x), self._library)
        else:
            y = computed(rows, *parts, self._library)[0]
        return y.reshape([*x.shape[:-1], weight.shape[1]])

    def answering(self) -> AbstractContextManager[None]:
        return self._rest.answering()

    def product(self, x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False) -> Any:
        return self._rest.product(x, y, transpose_x, transpose_y)

    def remember(self, y: Any, again: Any, *kept: Any) -> None:
        if self.narrow:  # products are the rest's
            self._rest.remember(y, again, *kept)
        else:
            super().remember(y, again, *kept)

    def cross_entropy(self, logits: Any, labels: Any) -> tuple[Any, Any]:
        if not fits(logits):
            return self._rest.cross_entropy(logits, labels)
        logits, labels = dense(logits), dense(labels)
        losses = paddle.empty([logits.shape[0], 1], "float64")
        pointers = (one.data_ptr() for one in (logits, labels, losses))
        self._library.cross_entropy(*pointers, *logits.shape)
        return losses, logits

    def four_bits(self, codes: Any, values: Any, scales: Any, size: int) -> Any | None:
        library = for_width(self._library, size // 2) if size % 2 == 0 else None  # a block must be whole vectors
        if library is None or not fits(values, scales) or not codes.place.is_cpu_place():
            return self._rest.four_bits(codes, values, scales, size)
        codes, values, scales = dense(codes), dense(values), dense(scales)
        blocks = math.prod(scales.shape)
        y = empty([blocks * size])
        library.four_bits(*(one.data_ptr() for one in (codes, values, scales, y)), blocks, size)
        return y

    def _gated(self, gate: Any, up: Any, silu: bool) -> Any:
        gate, up, rest, library = dense(gate), dense(up), self._rest, self._library
        if not learning(gate, up):
            return _gated(gate, up, silu, library)
        kept = rest.kept(gate), rest.kept(up)
        y = _Gated.apply(gate, up, silu, library, rest, lambda: kept)
        self.remember(y, lambda gate, up: _gated(rest.restored(gate), rest.restored(up), silu, library, passing), *kept)
        return y


def _alike(gate: Any, up: Any) -> bool:
    return fits(gate, up) and gate.shape == up.shape


class _RMSNorm(paddle.autograd.PyLayer):
    """Keeps one number a row, and of what it norms what ``rest`` keeps: ``kept`` gives that. (It is a function because
    paddle takes each tensor here for one that may want a gradient.)"""

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, epsilon: float, offset: float, library: Any, rest: Any, kept: Any
    ) -> Any:
        y, x, inverse = _normed(x, weight, epsilon, offset, library)
        ctx.save_for_backward(kept(), weight, inverse)
        ctx.rest = rest
        ctx.wants = not x.stop_gradient, not weight.stop_gradient
        ctx.offset, ctx.library = offset, library
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        x, weight, inverse = ctx.saved_tensor()
        x = ctx.rest.restored(x)
        upstream, size = dense(upstream), weight.shape[0]
        x_grad = weight_grad = None
        kept = x.data_ptr(), inverse.data_ptr(), upstream.data_ptr()
        if ctx.wants[0]:
            x_grad = empty(x.shape)
            ctx.library.rms_norm_slope(
                *(kept[0], weight.data_ptr(), *kept[1:], x_grad.data_ptr()), inverse.shape[0], size, ctx.offset
            )
        if ctx.wants[1]:
            weight_grad = empty(weight.shape)
            ctx.library.rms_norm_weight_slope(*kept, weight_grad.data_ptr(), inverse.shape[0], size)
        return x_grad, weight_grad


def _normed(x: Any, weight: Any, epsilon: float, offset: float, library: Any, learns: bool = True) -> tuple[Any, ...]:
    """The norm of ``x``, ``x`` itself, and, where it learns, 1 / √(mean(x²) + ε) of each row."""
    x, size, rows = dense(x), weight.shape[0], math.prod(x.shape[:-1])
    y, inverse = empty(x.shape), empty([rows]) if learns else None
    pointers = (x.data_ptr(), weight.data_ptr(), y.data_ptr(), None if inverse is None else inverse.data_ptr())
    library.rms_norm(*pointers, rows, size, epsilon, offset)
    return y, x, inverse


class _Turn(paddle.autograd.PyLayer):
    """Keeps the tables alone, which all layers share: its gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Any, cosines: Any, sines: Any, interleaved: bool, library: Any) -> Any:
        ctx.save_for_backward(cosines, sines)
        ctx.interleaved, ctx.library = interleaved, library
        return _turned(x, cosines, sines, interleaved, 1.0, library)

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        cosines, sines = ctx.saved_tensor()
        return _turned(upstream, cosines, sines, ctx.interleaved, -1.0, ctx.library), None, None


def _turned(x: Any, cosines: Any, sines: Any, interleaved: bool, sign: float, library: Any) -> Any:
    x, cosines, sines = dense(x), dense(cosines), dense(sines)
    rows, length, heads, width = x.shape
    y = empty([rows, length, heads, width])
    pointers = (one.data_ptr() for one in (x, cosines, sines, y))
    places, size = cosines.shape[0] * length, cosines.shape[-1]
    library.rotate(*pointers, rows * length, places, heads, width, size, interleaved, sign)
    return y


class _Gated(paddle.autograd.PyLayer):
    """SwiGLU, or GEGLU where not ``silu``. Keeps of its two factors what ``rest`` keeps of them: ``kept`` gives it, as
    in :class:`_RMSNorm`."""

    @staticmethod
    def forward(ctx: Any, gate: Any, up: Any, silu: bool, library: Any, rest: Any, kept: Any) -> Any:
        ctx.save_for_backward(*kept())
        ctx.rest = rest
        ctx.wants, ctx.silu, ctx.library = [not one.stop_gradient for one in (gate, up)], silu, library
        return _gated(gate, up, silu, library, passing)

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        gate, up = (ctx.rest.restored(kept) for kept in ctx.saved_tensor())
        grads = empty(gate.shape), empty(up.shape)
        pointers = (one.data_ptr() for one in (gate, up, dense(upstream), *grads))
        ctx.library.gated_slope(*pointers, gate.size, ctx.silu)
        return tuple(grad if wanted else None for grad, wanted in zip(grads, ctx.wants, strict=True))


def _gated(gate: Any, up: Any, silu: bool, library: Any, made: Any = empty) -> Any:
    y = made(gate.shape)
    library.gated(gate.data_ptr(), up.data_ptr(), y.data_ptr(), math.prod(gate.shape), silu)
    return y

"""Linears whose weight exists in codes alone: y = x·W + b with W dequantized part by part, forward and backward."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import paddle

from sft_quant_nf4.codes import DYNAMIC, INT4_PAIRS, Blocks, Channels, pair_table
from sft_quant_nf4.kernels import Kernel, Packed
from sft_quant_nf4.tables import table

PART = 1 << 20
"""Weight values that exist in float32 at a time."""


class QuantizedLinear(paddle.nn.Layer, ABC):
    """Stands for a frozen Linear. Subclasses give rows of W [out, in] in float32, a few at a time."""

    def __init__(self, shape: tuple[int, int], bias: np.ndarray | None, step: int) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        rows = max(1, PART // self.in_features // step) * step
        self.parts = [(start, min(start + rows, self.out_features)) for start in range(0, self.out_features, rows)]
        self.bias = None if bias is None else paddle.to_tensor(bias)

    @abstractmethod
    def rows(self, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop`` of the weight, float32 [rows, in]."""

    def dequantize(self) -> Any:
        """The whole weight in Paddle's layout, float32 [in, out]."""
        with paddle.no_grad():
            return paddle.concat([self.rows(*part) for part in self.parts]).t()

    def forward(self, x: Any) -> Any:
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.astype(y.dtype)

    def product(self, x: Any) -> Any:
        """x [..., in] → x·W [..., out], without gradients."""
        parts = [paddle.matmul(x, self.rows(*part).astype(x.dtype), transpose_y=True) for part in self.parts]
        return parts[0] if len(parts) == 1 else paddle.concat(parts, axis=-1)


class _Product(paddle.autograd.PyLayer):
    """x [..., in] → x·W [..., out]; saves nothing, so a float copy of W never outlives a part."""

    @staticmethod
    def forward(ctx: Any, x: Any, layer: QuantizedLinear) -> Any:
        ctx.layer, ctx.wanted = layer, not x.stop_gradient
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        if not ctx.wanted:
            return None
        grad = None
        for start, stop in ctx.layer.parts:
            weight = ctx.layer.rows(start, stop).astype(upstream.dtype)
            share = paddle.matmul(upstream[..., start:stop], weight)
            grad = share if grad is None else grad.add_(share)
        return grad


class BlockLinear(QuantizedLinear):
    """NF4 and FP4: 16 values and an absmax for each block of the flattened weight."""

    def __init__(self, blocks: Blocks, bias: np.ndarray | None) -> None:
        out, size = blocks.shape
        # A part begins at a block, and at a whole byte.
        step = 2 * blocks.blocksize // math.gcd(2 * blocks.blocksize, size)
        super().__init__(blocks.shape, bias, step if out % step == 0 or step < out else out)
        self.blocksize = blocks.blocksize
        count = -(-out * size // blocks.blocksize)
        codes = np.zeros(-(-count * blocks.blocksize // 2), np.uint8)
        codes[: len(blocks.codes)] = blocks.codes
        self.codes = paddle.to_tensor(codes)
        self.table = table(blocks.kind, pair_table(blocks.kind))
        if blocks.double is None:
            self.absmax, self.double = paddle.to_tensor(blocks.absmax), None
        else:
            held = blocks.double
            self.absmax = None
            self.double = (paddle.to_tensor(held.codes), paddle.to_tensor(held.absmax), table("double", DYNAMIC))
            self.offset = float(held.offset)

    def rows(self, start: int, stop: int) -> Any:
        first, last = start * self.in_features, stop * self.in_features
        blocks = slice(first // self.blocksize, -(-last // self.blocksize))
        codes = self.codes[blocks.start * self.blocksize // 2 : -(-blocks.stop * self.blocksize // 2)]
        values = paddle.gather(self.table, codes.astype("int32")).reshape([-1, self.blocksize])
        scaled = (values * self._scales(blocks).unsqueeze(-1)).reshape([-1])
        return scaled[: last - first].reshape([stop - start, self.in_features])

    def _scales(self, blocks: slice) -> Any:
        if self.double is None:
            return self.absmax[blocks]
        codes, absmax, table = self.double
        group = paddle.arange(blocks.start, blocks.stop, dtype="int32") // 256
        return paddle.gather(table, codes[blocks].astype("int32")) * paddle.gather(absmax, group) + self.offset


class ChannelLinear(QuantizedLinear):
    """INT8 and INT4: whole numbers, and a scale for each output channel or each group of its inputs.

    ``codes`` as in :class:`Channels`, until ``kernel`` takes the layer over; then they are in ``packed`` alone.
    """

    def __init__(self, channels: Channels, bias: np.ndarray | None, kernel: Kernel | None = None) -> None:
        super().__init__(channels.shape, bias, 4)  # parts begin where tiles of the kernel's layout do
        self.bits, self.kernel = channels.bits, kernel
        self.packed: Packed | None = None
        self.refused = False
        self.table = table("int4", INT4_PAIRS) if channels.bits == 4 else None
        self.codes, self.scales = paddle.to_tensor(channels.codes), paddle.to_tensor(channels.scales)

    def product(self, x: Any) -> Any:
        if self.kernel is not None and self.kernel.takes(self, x):
            assert self.packed is not None
            return self.packed.product(x)
        return super().product(x)

    def rows(self, start: int, stop: int) -> Any:
        values, scales = self.values(start, stop), self.scales[start:stop]
        grouped = values.reshape([stop - start, scales.shape[1], -1]) * scales.unsqueeze(-1)
        return grouped.reshape([stop - start, self.in_features])

    def values(self, start: int, stop: int) -> Any:
        """The whole numbers of rows ``start`` to ``stop``, float32 [rows, in]."""
        if self.packed is not None:
            return self.packed.values(start, stop)
        codes = self.codes[start:stop]
        if self.table is None:
            return codes.astype("float32")
        pairs = paddle.gather(self.table, codes.reshape([-1]).astype("int32"))
        return pairs.reshape([stop - start, -1])[:, : self.in_features]

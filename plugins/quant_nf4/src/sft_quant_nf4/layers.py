"""Linears whose weight exists in codes alone: y = x·W + b with W dequantized part by part on a CPU, and as a whole on a
GPU, forward and backward."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import paddle

import sft
from sft import UsageError
from sft_quant_nf4.codes import DYNAMIC, Blocks, Channels, DoubleAbsmax, codebook, pair_table
from sft_quant_nf4.kernels import Kernel, Packed, on_gpu
from sft_quant_nf4.lookup import look_up
from sft_quant_nf4.tables import table

PART = 15 << 16
"""Weight values that exist in float32 at a time on a CPU, whose cache holds them. They take less than 4 MiB: of larger
blocks each is new from the system, which zeroes it, in four times the time in which the codes are looked up."""
GPU_PART = 1 << 28
"""On a GPU, where each part is a dozen kernels to launch: a matrix of any size that is usual is one part."""


class QuantizedLinear(paddle.nn.Layer, ABC):
    """Stands for a frozen Linear. Subclasses give rows of W [out, in] in float32, a few at a time."""

    kernels = sft.PLAIN

    def __init__(self, shape: tuple[int, int], bias: np.ndarray | None, step: int) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.parts, self._gpu_parts = self._divided(PART, step), self._divided(GPU_PART, step)
        self.bias = None if bias is None else paddle.to_tensor(bias)

    def _divided(self, values: int, step: int) -> list[tuple[int, int]]:
        """Rows from and to of parts of at most so many values, each of a multiple of ``step`` rows."""
        rows = max(1, values // self.in_features // step) * step
        return [(start, min(start + rows, self.out_features)) for start in range(0, self.out_features, rows)]

    def parts_for(self, x: Any) -> list[tuple[int, int]]:
        """The rows of W, from and to, that exist in float32 at a time where ``x`` is multiplied."""
        return self._gpu_parts if on_gpu(x) else self.parts

    @abstractmethod
    def rows(self, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop`` of the weight, float32 [rows, in]."""

    def dequantize(self) -> Any:
        """The whole weight in Paddle's layout, float32 [in, out]."""
        with paddle.no_grad():
            if paddle.device.get_device() != "cpu":
                parts = [self.rows(*part) for part in self._gpu_parts]
                return (parts[0] if len(parts) == 1 else paddle.concat(parts)).t()
            whole = paddle.empty([self.in_features, self.out_features], "float32")
            values = sft.array_of(whole)
            for start, stop in self.parts:
                rows = self.rows(start, stop)
                sft.copy_onto(values[:, start:stop], sft.array_of(rows).T)
            return whole

    def part(self, axis: int, index: int, count: int) -> QuantizedLinear:
        """The layer of part ``index`` of ``count`` of a whole layer's W [in, out] along ``axis`` (0: inputs, 1:
        outputs): the same codes and scales, of which it has a copy of its own.

        Raises :class:`UsageError` where a block or group of values that share a scale would be cut through, and for a
        bias under divided inputs, which every process would add.
        """
        if count == 1:
            return self
        if axis == 0 and self.bias is not None:
            raise UsageError(
                "A quantized layer has a bias, and each process that has a part of its inputs would add it; leave the "
                "quantizer or tensor parallelism out."
            )
        length = self.out_features if axis else self.in_features
        if length % count:
            raise UsageError(
                f"The {length} {'outputs' if axis else 'inputs'} of a quantized layer do not divide among {count} "
                "processes; choose another number of them."
            )
        where = slice(length // count * index, length // count * (index + 1))
        if axis == 0:
            return self._inputs(where, count)
        return self._outputs(where, count, None if self.bias is None else self.bias.numpy()[where])

    @abstractmethod
    def _inputs(self, where: slice, count: int) -> QuantizedLinear:
        """The layer of the inputs ``where``, one of ``count`` parts."""

    @abstractmethod
    def _outputs(self, where: slice, count: int, bias: np.ndarray | None) -> QuantizedLinear:
        """The layer of the outputs ``where``, one of ``count`` parts."""

    def forward(self, x: Any) -> Any:
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.astype(y.dtype)

    def product(self, x: Any) -> Any:
        """x [..., in] → x·W [..., out], without gradients."""
        rows, parts = x.reshape([-1, self.in_features]), []
        for part in self.parts_for(x):
            parts.append(self.kernels.product(rows, self.rows(*part).astype(x.dtype), transpose_y=True))
        y = parts[0] if len(parts) == 1 else paddle.concat(parts, axis=-1)
        return y.reshape([*x.shape[:-1], self.out_features])


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
        rows = upstream.reshape([-1, ctx.layer.out_features])
        grad: Any = None
        for start, stop in ctx.layer.parts_for(upstream):
            weight = ctx.layer.rows(start, stop).astype(upstream.dtype)
            share = ctx.layer.kernels.product(rows[:, start:stop], weight)
            grad = share if grad is None else grad.add_(share)
        return grad.reshape([*upstream.shape[:-1], ctx.layer.in_features])


class BlockLinear(QuantizedLinear):
    """NF4 and FP4: 16 values and an absmax for each block of the flattened weight."""

    def __init__(self, blocks: Blocks, bias: np.ndarray | None) -> None:
        out, size = blocks.shape
        # A part begins at a block, and at a whole byte.
        step = 2 * blocks.blocksize // math.gcd(2 * blocks.blocksize, size)
        super().__init__(blocks.shape, bias, step if out % step == 0 or step < out else out)
        self.blocksize, self.kind = blocks.blocksize, blocks.kind
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
        # Of a line of blocks how many are here, how many there are, and the first that is here: as they were made.
        self._places = (1, 1, 0)

    def _inputs(self, where: slice, count: int) -> QuantizedLinear:
        self._check(where, "inputs", count)
        return self._of_lines(self.out_features, where, (self.out_features, where.stop - where.start), None)

    def _outputs(self, where: slice, count: int, bias: np.ndarray | None) -> QuantizedLinear:
        size = self.in_features
        values = slice(where.start * size, where.stop * size)
        self._check(values, "values", count)
        return self._of_lines(1, values, (where.stop - where.start, size), bias)

    def _check(self, where: slice, what: str, count: int) -> None:
        width = where.stop - where.start
        if width % math.lcm(self.blocksize, 2):
            raise UsageError(
                f"qlora_weight_blocksize {self.blocksize} does not divide the {width} {what} of a layer that each of "
                f"{count} processes has; set it to an even divisor of that, or choose another number of processes."
            )

    def _of_lines(self, lines: int, where: slice, shape: tuple[int, int], bias: np.ndarray | None) -> QuantizedLinear:
        """A layer of ``shape`` from the values ``where`` of each of so many ``lines`` of all values [out, in].

        With double quantization it has the float32 absmax of all groups of 256 blocks, and looks up its own.
        """
        blocks = slice(where.start // self.blocksize, where.stop // self.blocksize)

        def cut(tensor: Any, places: slice) -> np.ndarray:
            return np.ascontiguousarray(tensor.numpy().reshape(lines, -1)[:, places]).reshape(-1)

        codes, absmax, double = cut(self.codes, slice(where.start // 2, where.stop // 2)), None, None
        if self.double is None:
            absmax = cut(self.absmax, blocks)
        else:
            of_blocks, of_groups, _ = self.double
            double = DoubleAbsmax(cut(of_blocks, blocks), of_groups.numpy(), np.float32(self.offset))
        part = BlockLinear(Blocks(codes, absmax, double, shape, self.kind, self.blocksize), bias)
        part._places = (blocks.stop - blocks.start, 2 * self.codes.shape[0] // self.blocksize // lines, blocks.start)
        return part

    def rows(self, start: int, stop: int) -> Any:
        first, last = start * self.in_features, stop * self.in_features
        blocks = slice(first // self.blocksize, -(-last // self.blocksize))
        places = slice(blocks.start * self.blocksize // 2, blocks.stop * self.blocksize // 2)
        if self.codes.place.is_cpu_place():
            scales = self._scales_on_cpu(blocks)
            scaled = _looked_up(self.kernels, self.codes[places], self.kind, scales, self.blocksize)
        else:
            pairs = paddle.gather(self.table, self.codes[places].astype("int32"))
            scaled = (pairs.reshape([-1, self.blocksize]) * self._scales(blocks).unsqueeze(-1)).reshape([-1])
        return scaled[: last - first].reshape([stop - start, self.in_features])

    def _scales(self, blocks: slice) -> Any:
        """The absmax of ``blocks``, float32."""
        if self.double is None:
            return self.absmax[blocks]
        codes, absmax, table = self.double
        group = self._groups(paddle.arange(blocks.start, blocks.stop, dtype="int32"))
        return paddle.gather(table, codes[blocks].astype("int32")) * paddle.gather(absmax, group) + self.offset

    def _scales_on_cpu(self, blocks: slice) -> np.ndarray:
        """The same in numpy, to the last bit."""
        if self.double is None:
            return sft.array_of(self.absmax)[blocks]
        codes, absmax, _ = self.double
        group = self._groups(np.arange(blocks.start, blocks.stop, dtype=np.int32))
        scales = DYNAMIC.take(sft.array_of(codes)[blocks]) * sft.array_of(absmax).take(group)
        return scales + np.float32(self.offset)

    def _groups(self, blocks: Any) -> Any:
        """In which group of 256 each of the ``blocks``, int32, was quantized."""
        width, stride, first = self._places
        if width == stride:  # all are here
            return blocks // 256
        return (blocks // width * stride + first + blocks % width) // 256


def _looked_up(kernels: sft.Kernels, codes: Any, kind: str, scales: np.ndarray, size: int) -> Any:
    """What 4-bit ``codes`` uint8 [n / 2] on the CPU stand for, times the scale of each ``size``: float32 [n]."""
    values = kernels.four_bits(codes, table(f"codes of {kind}", codebook(kind)), paddle.to_tensor(scales), size)
    if values is None:
        values = paddle.empty([2 * codes.size], "float32")
        look_up(sft.array_of(codes), kind, sft.array_of(values))
        in_blocks = sft.array_of(values).reshape(-1, size)
        np.multiply(in_blocks, scales.reshape(-1, 1), out=in_blocks)
    return values


class ChannelLinear(QuantizedLinear):
    """INT8 and INT4: whole numbers, and a scale for each output channel or each group of its inputs.

    ``codes`` as in :class:`Channels`, until ``kernel`` takes the layer over; then they are in ``packed`` alone, and
    the layer is not to be divided any more.
    """

    def __init__(self, channels: Channels, bias: np.ndarray | None, kernel: Kernel | None = None) -> None:
        super().__init__(channels.shape, bias, 4)  # parts begin where tiles of the kernel's layout do
        self.bits, self.kernel = channels.bits, kernel
        self.packed: Packed | None = None
        self.refused = False
        self.table = table("int4", pair_table("int4")) if channels.bits == 4 else None
        self.codes, self.scales = paddle.to_tensor(channels.codes), paddle.to_tensor(channels.scales)

    def _inputs(self, where: slice, count: int) -> QuantizedLinear:
        width, groups = where.stop - where.start, self.scales.shape[1]
        scales, codes = self.scales.numpy(), self.codes.numpy()
        if groups > 1:
            group = self.in_features // groups
            if width % group:
                raise UsageError(
                    f"weight_only_group_size {group} does not divide the {width} inputs of a layer that each of "
                    f"{count} processes has; set it to a divisor of that, or leave it out."
                )
            scales = scales[:, where.start // group : where.stop // group]
        if self.bits == 4 and width % 2:
            raise UsageError(
                f"Each of {count} processes has {width} inputs of a layer, and int4 keeps two in a byte; take int8, or "
                "choose another number of processes."
            )
        each = 8 // self.bits
        codes = codes[:, where.start // each : where.stop // each]
        return self._of(codes, scales, (self.out_features, width), None)

    def _outputs(self, where: slice, count: int, bias: np.ndarray | None) -> QuantizedLinear:
        shape = (where.stop - where.start, self.in_features)
        return self._of(self.codes.numpy()[where], self.scales.numpy()[where], shape, bias)

    def _of(
        self, codes: np.ndarray, scales: np.ndarray, shape: tuple[int, int], bias: np.ndarray | None
    ) -> QuantizedLinear:
        codes, scales = np.ascontiguousarray(codes), np.ascontiguousarray(scales)
        return ChannelLinear(Channels(codes, scales, shape, self.bits), bias, self.kernel)

    def product(self, x: Any) -> Any:
        if self.kernel is not None and self.kernel.takes(self, x):
            assert self.packed is not None
            return self.packed.product(x)
        return super().product(x)

    def rows(self, start: int, stop: int) -> Any:
        scales = self.scales[start:stop]
        if self.table is not None and self.packed is None and self.codes.place.is_cpu_place():
            size = self.in_features // scales.shape[1]
            if size % 2 == 0:  # no byte has values of two scales
                values = _looked_up(
                    self.kernels, self.codes[start:stop].reshape([-1]), "int4", sft.array_of(scales), size
                )
                return values.reshape([stop - start, self.in_features])
        values = self.values(start, stop)
        grouped = values.reshape([stop - start, scales.shape[1], -1]) * scales.unsqueeze(-1)
        return grouped.reshape([stop - start, self.in_features])

    def values(self, start: int, stop: int) -> Any:
        """The whole numbers of rows ``start`` to ``stop``, float32 [rows, in]."""
        if self.packed is not None:
            return self.packed.values(start, stop)
        codes = self.codes[start:stop]
        if self.table is None:
            return codes.astype("float32")
        if codes.place.is_cpu_place():
            pairs = paddle.empty([2 * codes.size], "float32")
            look_up(sft.array_of(codes).reshape(-1), "int4", sft.array_of(pairs))
            return pairs.reshape([stop - start, -1])[:, : self.in_features]
        pairs = paddle.gather(self.table, codes.reshape([-1]).astype("int32"))
        return pairs.reshape([stop - start, -1])[:, : self.in_features]

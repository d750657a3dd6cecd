"""paddle's own product for int8 and int4 layers on a GPU, ``paddle.nn.quant.weight_only_linear``: layout and use.

It multiplies 16-bit inputs with codes, without a float weight in memory; there is none for NF4 and FP4. **Nobody has
run this on a GPU yet.** Therefore it proves itself: of each kind of layer the first is computed both ways, and if
the kernel raises or differs by more than 16-bit rounding, that kind stays with the product of dequantized values, and
a line says so. (An error that ends the GPU's context cannot be caught.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import numpy as np
import paddle

from sft_quant_nf4.tables import table

ARCHITECTURES = (75, 80, 86, 89, 90)
"""Compute capabilities that share the layout below; 70 has another one, and for others paddle has no kernel."""
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""By how much rounding to the type changes a number, relative to it."""
TILE = 64
"""Inputs of one channel that lie side by side."""


def order(bits: int) -> np.ndarray:
    """int64 [64]: which of 64 inputs stands at each place of a tile.

    A register of the GPU is 32 bits; the even values of each come first, and a thread's values of four registers are
    those that the tensor cores want of it.
    """
    register = 32 // bits
    place = np.arange(TILE)
    inside = place % register
    place += 2 * (inside % (register // 2)) + inside // (register // 2) - inside
    inside = place % (4 * register)
    return place - inside + 8 * (inside % register // 2) + inside % 2 + 2 * (inside // register)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers plus 2^(bits-1), uint8 [out, in] → the kernel's bytes, int8 [out, in] or [out / 2, in].

    The tiles of 16 / bits channels take turns. Of two 4-bit values in a byte the first has the low half.
    """
    out, size = values.shape
    tiles = values.reshape(-1, 16 // bits, size // TILE, TILE)[..., order(bits)].swapaxes(1, 2).reshape(-1)
    if bits == 4:
        tiles = tiles[0::2] | tiles[1::2] << 4
    return tiles.view(np.int8).reshape(out * bits // 8, size)


def _numbers(bits: int) -> np.ndarray:
    """float32 [256, 8 / bits]: the whole numbers in each of the kernel's bytes, from -128 on."""
    byte = np.arange(-128, 128)[:, None] & 255
    numbers = byte - 128 if bits == 8 else np.concatenate([byte & 15, byte >> 4], axis=1) - 8
    return numbers.astype(np.float32)


class ChannelLayer(Protocol):
    """An int8 or int4 layer, as far as the kernel needs it; :class:`sft_quant_nf4.layers.ChannelLinear` is one."""

    bits: int
    in_features: int
    out_features: int
    parts: list[tuple[int, int]]
    """Channels from and to, which are computed together."""
    scales: Any
    """float32 [out, groups]."""
    codes: Any
    """As in :class:`sft_quant_nf4.codes.Channels`; None as soon as ``packed`` has them."""
    packed: Packed | None
    refused: bool
    """Whether the kernel cannot compute this layer."""

    def values(self, start: int, stop: int) -> Any:
        """The whole numbers of channels ``start`` to ``stop``, float32 [channels, in]."""
        ...

    def rows(self, start: int, stop: int) -> Any:
        """The weights of these channels, float32 [channels, in]."""
        ...


class Packed:
    """The codes of one layer in the kernel's layout, and its scales in 16 bits."""

    def __init__(self, layer: ChannelLayer, dtype: str) -> None:
        self.bits, self.group, self.dtype = layer.bits, group_of(layer), dtype
        self.shape = (layer.out_features, layer.in_features)
        self.codes = paddle.to_tensor(pack(_plus_half(layer), self.bits))
        scales = layer.scales.t().contiguous().astype(dtype)
        self.scales = scales[0] if self.group == -1 else scales
        self._table = table(f"packed int{self.bits}", _numbers(self.bits))
        self._order = table(f"order of int{self.bits}", np.argsort(order(self.bits)))

    def values(self, start: int, stop: int) -> Any:
        """The whole numbers of channels ``start`` to ``stop``, multiples of 4; float32 [channels, in]."""
        together, size = 16 // self.bits, self.shape[1]
        codes = self.codes.reshape([self.shape[0] // together, -1])[start // together : stop // together]
        values = paddle.gather(self._table, codes.reshape([-1]).astype("int32") + 128)
        tiles = paddle.index_select(values.reshape([-1, TILE]), self._order, axis=1)
        return tiles.reshape([-1, size // TILE, together, TILE]).transpose([0, 2, 1, 3]).reshape([stop - start, size])

    def product(self, x: Any) -> Any:
        """x [..., in] → x·W [..., out], both of ``dtype``."""
        from paddle.nn.quant import weight_only_linear

        return weight_only_linear(
            x.astype(self.dtype),
            self.codes,
            weight_scale=self.scales,
            weight_dtype=f"int{self.bits}",
            arch=architecture(),
            group_size=self.group,
        )


class Kernel:
    """Which layers of one model paddle's kernel computes; ``say`` receives a line for each kind of layer."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._works: dict[tuple[int, int, str], bool] = {}

    def takes(self, layer: ChannelLayer, x: Any) -> bool:
        """Whether the kernel computes ``layer`` of ``x``; then the layer's codes have its layout, and no other."""
        if not on_gpu(x):
            return False
        dtype = product_dtype(x)
        if dtype in ROUNDING and layer.packed is None and not layer.refused:
            packed = self._pack(layer, dtype)
            layer.refused = packed is None
            if packed is not None:
                layer.packed, layer.codes = packed, None
        return layer.packed is not None and layer.packed.dtype == dtype

    def _pack(self, layer: ChannelLayer, dtype: str) -> Packed | None:
        kind = (layer.bits, group_of(layer), dtype)
        if not (fits(layer) and self._works.get(kind, True) and scales_fit(layer, dtype)):
            return None
        packed = Packed(layer, dtype)
        if kind not in self._works:
            failure = compare(layer, packed)
            self._works[kind] = failure is None
            how = "by weight_only_linear" if failure is None else f"by dequantizing, as weight_only_linear {failure}"
            self._say(f"int{layer.bits}: {dtype} products are computed {how}")
        return packed if self._works[kind] else None


def on_gpu(x: Any) -> bool:
    return bool(x.place.is_gpu_place())


def architecture() -> int:
    """The GPU's compute capability, 80 for 8.0."""
    return _architecture(paddle.device.get_device())


@cache  # asked at every product
def _architecture(device: str) -> int:
    """Of the current device, which ``device`` names."""
    major, minor = paddle.device.cuda.get_device_capability()
    return 10 * int(major) + int(minor)


def product_dtype(x: Any) -> str:
    """In which type a product of ``x`` is computed here."""
    dtype = paddle.get_autocast_dtype() if paddle.is_autocast_enabled() else x.dtype
    return str(dtype).rpartition(".")[2]


def group_of(layer: ChannelLayer) -> int:
    """Inputs that share a scale; -1: all."""
    groups = layer.scales.shape[1]
    return -1 if groups == 1 else layer.in_features // groups


def fits(layer: ChannelLayer) -> bool:
    """Whether the kernel has this GPU, this group size and these sizes, which must be whole tiles."""
    whole = layer.in_features % TILE == 0 and layer.out_features % TILE == 0
    return whole and group_of(layer) in (-1, 64, 128) and architecture() in ARCHITECTURES


def scales_fit(layer: ChannelLayer, dtype: str) -> bool:
    """Whether the scales are numbers of a 16-bit type, none of them too small or too large for it."""
    scales = layer.scales.numpy()
    rounded = layer.scales.astype(dtype).astype("float32").numpy()
    return bool((np.abs(rounded - scales) <= ROUNDING[dtype] * scales).all())


def compare(layer: ChannelLayer, packed: Packed) -> str | None:
    """What is wrong with the kernel's layout or its product for ``layer``, whose own codes are still there.

    Few rows and many are two kernels. Scale, weight and result are each rounded once in 16 bits; for random rows each
    is an error of at most ROUNDING times the size of a channel, and four of them are allowed.
    """
    try:
        with paddle.amp.auto_cast(enable=False):  # it would round what the kernel is held against, too
            return _compared(layer, packed)
    except Exception as error:  # whatever a GPU or its library may raise
        return f"fails ({(str(error).strip() or type(error).__name__).splitlines()[0]})"


def _compared(layer: ChannelLayer, packed: Packed) -> str | None:
    for rows in (3, 2 * TILE):
        x = paddle.to_tensor(np.random.default_rng(rows).standard_normal((rows, layer.in_features), np.float32))
        x = x.astype(packed.dtype)
        found = packed.product(x).astype("float32")
        for start, stop in layer.parts:
            if not bool((packed.values(start, stop) == layer.values(start, stop)).all()):
                return "has codes that are not read back"
            weight = layer.rows(start, stop)
            error = found[:, start:stop] - paddle.matmul(x.astype("float32"), weight, transpose_y=True)
            allowed = 4 * ROUNDING[packed.dtype] * rows**0.5 * weight.norm(axis=1)
            if not bool((error.norm(axis=0) <= allowed).all()):
                return f"differs by up to {float(error.abs().max()):.3g} on {rows} rows"
    return None


def _plus_half(layer: ChannelLayer) -> np.ndarray:
    """The layer's whole numbers plus 2^(bits-1), uint8 [out, in]."""
    codes = layer.codes.numpy()
    if layer.bits == 8:
        return np.asarray(codes.view(np.uint8) ^ np.uint8(128))
    return np.stack([codes >> 4, codes & 15], axis=-1).reshape(layer.out_features, layer.in_features)

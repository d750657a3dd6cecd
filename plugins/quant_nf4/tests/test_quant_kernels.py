"""paddle's kernel for int8 and int4 layers: its layout is paddle's, and it is used where it proves right, not else.

There is no GPU here, so a stand-in for ``weight_only_linear`` computes in float32, and wants codes and scales exactly
as paddle's ``weight_quantize``, which runs on CPU too, lays them out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sft_quant_nf4.codes import Channels, quantize_channels

KINDS = [(8, None), (4, None), (4, 64), (4, 128)]
KIND_NAMES = ["int8", "int4", "int4-64", "int4-128"]
OUT, IN = 128, 256


def channels_of(bits: int, group: int | None, shape: tuple[int, int] = (OUT, IN), seed: int = 0) -> Channels:
    weight = 0.02 * np.random.default_rng(seed).standard_normal(shape)
    return quantize_channels(weight.astype(np.float32), bits, group)


def whole_of(channels: Channels) -> np.ndarray:
    """The whole numbers, float32 [out, in]; a largest one in each channel or group."""
    found = channels.codes.astype(np.float32)
    if channels.bits == 4:
        pairs = np.stack([channels.codes >> 4, channels.codes & 15], axis=-1)
        found = pairs.reshape(channels.shape).astype(np.float32) - 8
    assert (np.abs(found).reshape(*channels.scales.shape, -1).max(-1) == 2 ** (channels.bits - 1) - 1).all()
    return found


def as_paddle(whole: np.ndarray, bits: int, group: int | None, arch: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of paddle, which finds a scale of one and so keeps whole numbers as they are."""
    import paddle
    from paddle.nn.quant import weight_quantize

    weight = paddle.to_tensor(np.ascontiguousarray(whole.T)).astype("float16")
    codes, scales = weight_quantize(weight, algo=f"weight_only_int{bits}", arch=arch, group_size=group or -1)
    assert (scales.numpy() == 1).all()
    return codes.numpy(), scales.numpy()


class StandIn:
    """``weight_only_linear`` for some layers; ``change`` of the weight [out, in] makes it a wrong one."""

    def __init__(self, *layers: Channels, group: int | None, change: Callable[[np.ndarray], Any] = lambda w: None):
        self.group, self.change, self.rows = group, change, []
        self.known = {as_paddle(whole_of(one), one.bits, group)[0].tobytes(): whole_of(one) for one in layers}
        self.bits = layers[0].bits

    def __call__(self, x: Any, weight: Any, *, weight_scale: Any, weight_dtype: str, arch: int, group_size: int) -> Any:
        import paddle

        self.rows.append(int(np.prod(x.shape[:-1])))
        assert (weight_dtype, arch, group_size) == (f"int{self.bits}", 80, self.group or -1)
        assert x.dtype == weight_scale.dtype == paddle.float16
        whole = self.known[weight.numpy().tobytes()]
        assert weight_scale.shape == list(as_paddle(whole, self.bits, self.group)[1].shape)
        scales = weight_scale.numpy().astype(np.float32)
        wide = whole * np.repeat(np.atleast_2d(scales), self.group or IN, axis=0).T
        self.change(wide)
        return paddle.matmul(x.astype("float32"), paddle.to_tensor(wide), transpose_y=True).astype("float16")


@pytest.fixture
def gpu(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """As if there were a GPU with the given kernel, in a run that computes in float16 (automatic casts)."""
    from sft_quant_nf4 import kernels

    def install(kernel: Any, arch: int = 80, dtype: str = "float16") -> None:
        monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
        monkeypatch.setattr(kernels, "architecture", lambda: arch)
        monkeypatch.setattr(kernels, "product_dtype", lambda x: dtype)
        monkeypatch.setattr(paddle.nn.quant, "weight_only_linear", kernel)

    return install


def inputs(paddle: Any) -> Any:
    return paddle.to_tensor(np.random.default_rng(9).standard_normal((2, 5, IN)).astype(np.float32))


def layer_with(channels: Channels, said: list[str], kernel: Any = None) -> Any:
    """Without a bias: paddle adds no float16 on CPU."""
    from sft_quant_nf4.kernels import Kernel
    from sft_quant_nf4.layers import ChannelLinear

    return ChannelLinear(channels, None, kernel or Kernel(said.append))


# --- the layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90])
@pytest.mark.parametrize("shape", [(64, 64), (192, 128), (128, 640)], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_layout_is_that_of_paddles_weight_quantize(
    paddle: Any, bits: int, shape: tuple[int, int], arch: int
) -> None:
    from sft_quant_nf4.kernels import ARCHITECTURES, Packed, pack

    assert arch in ARCHITECTURES
    channels = channels_of(bits, None, shape)
    whole = whole_of(channels)
    expected = as_paddle(whole, bits, None, arch)[0]
    packed = pack((whole + 2 ** (bits - 1)).astype(np.uint8), bits)
    assert (packed.dtype, packed.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(Packed(layer_with(channels, []), "float16").codes.numpy(), expected)


@pytest.mark.parametrize(("bits", "group"), KINDS, ids=KIND_NAMES)
def test_whole_numbers_are_read_back_from_it(paddle: Any, bits: int, group: int | None) -> None:
    from sft_quant_nf4.kernels import Packed

    channels = channels_of(bits, group)
    packed = Packed(layer_with(channels, []), "bfloat16")
    for start, stop in ((0, OUT), (4, 12), (OUT - 4, OUT)):
        np.testing.assert_array_equal(packed.values(start, stop).numpy(), whole_of(channels)[start:stop])


# --- where it is right --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), KINDS, ids=KIND_NAMES)
def test_a_kernel_that_is_right_computes_all_layers_from_the_one_copy_of_the_codes(
    paddle: Any, gpu: Any, read: Any, monkeypatch: pytest.MonkeyPatch, bits: int, group: int | None
) -> None:
    from sft_quant_nf4 import layers

    monkeypatch.setattr(layers, "PART", 32 * IN)  # several parts
    first, second = (channels_of(bits, group, seed=seed) for seed in (1, 2))
    kernel = StandIn(first, second, group=group)
    said: list[str] = []
    gpu(kernel)
    layer = layer_with(first, said)
    other = layer_with(second, said, layer.kernel)
    x = inputs(paddle)
    for channels, one in ((first, layer), (second, other), (first, layer)):
        expected = x.numpy() @ read(channels).T
        error = np.abs(one(x).astype("float32").numpy() - expected)
        assert error.max() < 4 * 2**-11 * np.abs(expected).max()
        assert one.codes is None
        np.testing.assert_allclose(one.dequantize().numpy(), read(channels).T, rtol=1e-6, atol=0)
    assert kernel.rows == [3, 128, 10, 10, 10]  # few and many rows are tried once
    assert said == [f"int{bits}: float16 products are computed by weight_only_linear"]
    held = layer.packed.codes.size
    assert held * 8 == OUT * IN * bits


def test_gradients_are_those_of_the_dequantized_weight(paddle: Any, gpu: Any, read: Any) -> None:
    """Backward goes part by part over the kernel's layout. In float32: paddle multiplies no 16 bits on CPU."""
    channels = channels_of(4, 64)
    right = StandIn(channels, group=64)
    gpu(lambda x, weight, **settings: right(x, weight, **settings).astype("float32"))
    layer = layer_with(channels, [])
    x = inputs(paddle)
    x.stop_gradient = False
    upstream = np.random.default_rng(1).standard_normal((2, 5, OUT)).astype(np.float32)
    (layer(x) * paddle.to_tensor(upstream)).sum().backward()
    assert layer.packed is not None
    np.testing.assert_allclose(x.grad.numpy(), upstream @ read(channels).astype(np.float64), atol=1e-5)


# --- where it is not ----------------------------------------------------------------------------------------


def fails(*given: Any, **named: Any) -> Any:
    raise RuntimeError("(NotFound) The kernel `weight_only_linear` is not registered.\n  [Hint: more]")


def one_channel_off(weight: np.ndarray) -> None:
    weight[77] *= 1.02


def channels_swapped(weight: np.ndarray) -> None:
    weight[[5, 6]] = weight[[6, 5]]


def inputs_swapped(weight: np.ndarray) -> None:
    weight[:, [64, 65]] = weight[:, [65, 64]]


@pytest.mark.parametrize(
    "change", [None, one_channel_off, channels_swapped, inputs_swapped], ids=lambda f: getattr(f, "__name__", "raises")
)
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 64)], ids=["int8", "int4-64"])
def test_a_kernel_that_fails_or_differs_is_not_used_and_a_line_says_so(
    paddle: Any, gpu: Any, read: Any, bits: int, group: int | None, change: Any
) -> None:
    channels = channels_of(bits, group)
    said: list[str] = []
    kernel = fails if change is None else StandIn(channels, group=group, change=change)
    gpu(kernel)
    layer = layer_with(channels, said)
    other = layer_with(channels, said, layer.kernel)
    for one in (layer, other):
        found = one(inputs(paddle)).numpy()
        np.testing.assert_allclose(found, inputs(paddle).numpy() @ read(channels).T, atol=1e-5)
        assert (one.packed, one.codes is None) == (None, False)
    (line,) = said
    assert line.startswith(f"int{bits}: float16 products are computed by dequantizing, as weight_only_linear ")
    assert ("is not registered" in line) == (change is None)
    assert ("differs by up to" in line) == (change is not None)
    assert change is None or kernel.rows == [3]


def test_codes_that_are_not_read_back_keep_the_layer_as_it_is(
    paddle: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_quant_nf4.kernels import Packed

    channels = channels_of(8, None)
    said: list[str] = []
    gpu(StandIn(channels, group=None))
    monkeypatch.setattr(Packed, "values", lambda self, start, stop: paddle.zeros([stop - start, IN]))
    layer = layer_with(channels, said)
    layer(inputs(paddle))
    assert layer.packed is None
    assert said == [
        "int8: float16 products are computed by dequantizing, as weight_only_linear has codes that are not read back"
    ]


@pytest.mark.parametrize(
    ("shape", "bits", "group", "settings"),
    [
        ((128, 256), 4, 32, {}),
        ((128, 96), 8, None, {}),
        ((96, 128), 8, None, {}),
        ((128, 256), 8, None, {"arch": 70}),
        ((128, 256), 8, None, {"arch": 100}),
        ((128, 256), 8, None, {"dtype": "float32"}),
    ],
    ids=["group", "inputs", "outputs", "sm70", "sm100", "float32"],
)
def test_what_the_kernel_does_not_do_is_computed_part_by_part(
    paddle: Any, gpu: Any, read: Any, shape: tuple[int, int], bits: int, group: int | None, settings: dict[str, Any]
) -> None:
    channels = channels_of(bits, group, shape)
    said: list[str] = []
    gpu(fails, **settings)
    layer = layer_with(channels, said)
    x = paddle.ones([2, shape[1]])
    np.testing.assert_allclose(layer(x).numpy(), x.numpy() @ read(channels).T, atol=1e-5)
    assert (layer.packed, said) == (None, [])


def test_scales_that_16_bits_cannot_hold_keep_a_layer_out_and_others_in(paddle: Any, gpu: Any) -> None:
    """1e-9 is zero in float16; bfloat16 has the range of float32."""
    from sft_quant_nf4.kernels import scales_fit

    tiny, normal = channels_of(8, None, seed=1), channels_of(8, None, seed=2)
    tiny.scales[7] *= 1e-6
    gpu(StandIn(normal, group=None))
    said: list[str] = []
    layer = layer_with(tiny, said)
    other = layer_with(normal, said, layer.kernel)
    for one in (layer, other):
        one(inputs(paddle))
    assert (layer.packed is None, other.packed is None) == (True, False)
    assert scales_fit(layer, "bfloat16")


def test_on_cpu_nothing_is_tried(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddle.nn.quant, "weight_only_linear", fails)
    said: list[str] = []
    layer = layer_with(channels_of(8, None), said)
    layer(inputs(paddle))
    assert (layer.packed, layer.refused, said) == (None, False, [])


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "group"), KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_on_a_gpu_the_kernel_is_right(paddle: Any, bits: int, group: int | None, dtype: str) -> None:
    from sft_quant_nf4.kernels import Packed, compare, fits

    if not paddle.device.get_device().startswith("gpu"):
        pytest.skip("a CPU cannot try this")
    layer = layer_with(channels_of(bits, group), [])
    if not fits(layer):
        pytest.skip("paddle has no kernel of int8 and int4 products for this GPU")
    assert compare(layer, Packed(layer, dtype)) is None


def test_the_kernel_is_held_against_float32_in_a_run_of_16_bits(paddle: Any, gpu: Any, read: Any) -> None:
    """A layer first meets its kernel within automatic casts. What it is compared with must not be rounded by them: the
    kernel's own error is allowed to be four roundings, and this one's is three and a half."""
    from sft.testing import emulated_autocast

    channels = channels_of(8, None)
    seen: list[Any] = []
    gpu(StandIn(channels, group=None, change=lambda wide: seen.append(paddle.is_autocast_enabled())))
    said: list[str] = []
    with emulated_autocast("float16"):
        layer_with(channels, said)(inputs(paddle).astype("float16"))
    assert seen[:2] == [False, False]
    assert said == ["int8: float16 products are computed by weight_only_linear"]

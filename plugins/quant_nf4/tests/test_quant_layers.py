"""Quantized layers: they compute with the dequantized weight, keep codes alone, and save nothing for backward."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

import sft
from sft_quant_nf4.codes import quantize_blocks, quantize_channels

KINDS = ["nf4", "nf4-double", "fp4", "nf4-6", "int8", "int4", "int4-group"]


def make(weight: np.ndarray, kind: str, bias: np.ndarray | None = None) -> tuple[Any, Any]:
    """The layer for a weight [out, in], and what it stores."""
    from sft_quant_nf4.layers import BlockLinear, ChannelLinear

    if kind.startswith("int"):
        channels = quantize_channels(weight, int(kind[3]), weight.shape[1] // 3 if "group" in kind else None)
        return ChannelLinear(channels, bias), channels
    blocks = quantize_blocks(weight, kind[:3], 6 if kind.endswith("6") else 64, "double" in kind)
    return BlockLinear(blocks, bias), blocks


def tensors_of(layer: Any) -> list[Any]:
    """Every tensor that a layer holds, whichever way."""
    import paddle

    found: list[Any] = []
    for value in [*vars(layer).values(), *layer.parameters(), *layer.buffers()]:
        found += value if isinstance(value, (tuple, list)) else [value]
    return list({id(item): item for item in found if isinstance(item, paddle.Tensor)}.values())


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [(24, 30), (37, 51), (1, 9), (300, 12)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_the_dequantized_weight(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, read: Any, kind: str, shape: tuple[int, int], biased: bool
) -> None:
    """In parts of some 200 values; float32 noise of 50 products is below 1e-5."""
    from sft_quant_nf4 import layers

    monkeypatch.setattr(layers, "PART", 200)
    generator = np.random.default_rng(shape[0])
    weight = generator.standard_normal(shape).astype(np.float32)
    bias = generator.standard_normal(shape[0]).astype(np.float32) if biased else None
    layer, stored = make(weight, kind, bias)
    stands_for = read(stored)
    if shape == (300, 12):
        assert len(layer.parts) > 1
    x, upstream = (generator.standard_normal((2, 3, size)).astype(np.float32) for size in (shape[1], shape[0]))
    tensor = paddle.to_tensor(x, stop_gradient=False)
    y = layer(tensor)
    (y * paddle.to_tensor(upstream)).sum().backward()
    wide = stands_for.astype(np.float64)
    np.testing.assert_allclose(y.numpy(), x @ wide.T + (0 if bias is None else bias), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(tensor.grad.numpy(), upstream @ wide, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(layer.dequantize().numpy(), stands_for.T, rtol=1e-6, atol=0)
    assert (layer.in_features, layer.out_features) == (shape[1], shape[0])


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in ("large", "odd") for kind in ("nf4", "fp4")])
def test_a_dequantized_weight_is_that_of_bitsandbytes(
    paddle: Any, bitsandbytes: dict[str, np.ndarray], name: str, kind: str, double: bool
) -> None:
    """Byte for byte."""
    layer, _ = make(bitsandbytes[f"{name}.weight"].astype(np.float32), kind + "-double" * double)
    found = np.ascontiguousarray(layer.dequantize().numpy().T).reshape(-1)[:: 37 if name == "large" else 1]
    assert found.tobytes() == bitsandbytes[f"{name}.{kind}{'.double' * double}.dequantized"].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_wants_no_gradient_gets_none(paddle: Any, kind: str) -> None:
    layer, _ = make(np.ones((4, 12), np.float32), kind)
    x = paddle.ones([2, 12])
    assert layer(x).stop_gradient
    scale = paddle.ones([1], "float32")
    scale.stop_gradient = False
    (layer(x) * scale).sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_outputs_have_the_type_of_the_inputs(paddle: Any, read: Any, kind: str) -> None:
    """float64 stands for 16 bits here: paddle multiplies no 16-bit matrices on CPU."""
    generator = np.random.default_rng(0)
    layer, stored = make(generator.standard_normal((16, 12)).astype(np.float32), kind, np.ones(16, np.float32))
    x = paddle.to_tensor(generator.standard_normal((3, 12)), stop_gradient=False)
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (paddle.float64, paddle.float64)
    np.testing.assert_allclose(y.numpy(), x.numpy() @ read(stored).T.astype(np.float64) + 1, rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "most"), [("nf4", 0.7), ("fp4", 0.7), ("nf4-double", 0.53), ("int8", 1.02), ("int4", 0.52)]
)
def test_a_layer_keeps_codes_and_no_float_copy(paddle: Any, kind: str, most: float) -> None:
    """Bytes for each value, before and after it was used; the same as paddle counts them as allocated."""
    from paddle.base import core

    weight = np.random.default_rng(0).standard_normal((512, 768)).astype(np.float32)
    before = core.host_memory_stat_current_value("Allocated", 0)
    layer, _ = make(weight, kind)
    for _ in range(2):
        held = sum(tensor.size * tensor.element_size() for tensor in tensors_of(layer))
        assert held <= most * weight.size, held / weight.size
        assert core.host_memory_stat_current_value("Allocated", 0) - before <= most * weight.size
        x = paddle.ones([2, 768])
        x.stop_gradient = False
        layer(x).sum().backward()
        del x
    assert not layer.parameters()
    assert not layer.state_dict()


def test_bits_of_large_layers(paddle: Any) -> None:
    """4.5 bits a value, 4.127 with double quantization; beside them two tables of 3 kB."""
    weight = np.ones((2048, 1024), np.float32)
    for kind, bits in (("nf4", 4.5), ("nf4-double", 4.127)):
        layer, _ = make(weight, kind)
        held = sum(tensor.size * tensor.element_size() for tensor in tensors_of(layer))
        assert 8 * (held - 3072) / weight.size == pytest.approx(bits, abs=0.005)


@pytest.mark.parametrize("kind", ["nf4", "int4"])
def test_nothing_is_saved_for_backward_and_a_part_is_the_most_there_is(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from paddle.base import core

    from sft_quant_nf4 import layers

    monkeypatch.setattr(layers, "PART", 1 << 14)
    weight = np.random.default_rng(0).standard_normal((2048, 512)).astype(np.float32)
    layer, _ = make(weight, kind)
    x = paddle.ones([1, 512])
    x.stop_gradient = False
    gc.collect()  # what other tests have left would be freed meanwhile
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    y = layer(x)
    assert core.host_memory_stat_current_value("Allocated", 0) - before == y.size * 4
    y.sum().backward()
    peak = core.host_memory_stat_peak_value("Allocated", 0) - before
    assert peak < 8 * 4 * (1 << 14), peak  # the whole weight would be 64 parts


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_has_the_whole_matrix_at_a_time(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, read: Any, kind: str
) -> None:
    """As if there were one: each pass, and whoever wants the float weight, asks for all rows once, not for a part after
    the other; more than GPU_PART values are divided there too."""
    from sft_quant_nf4 import layers

    monkeypatch.setattr(layers, "PART", 200)
    generator = np.random.default_rng(3)
    weight = generator.standard_normal((300, 12)).astype(np.float32)
    whole, stored = make(weight, kind)
    monkeypatch.setattr(layers, "GPU_PART", 2400)
    divided, _ = make(weight, kind)
    monkeypatch.setattr(layers, "on_gpu", lambda x: True)
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
    x, upstream = (generator.standard_normal((5, size)).astype(np.float32) for size in (12, 300))
    for layer, parts in ((whole, [(0, 300)]), (divided, divided._gpu_parts)):
        asked: list[tuple[int, int]] = []
        rows = layer.rows
        layer.rows = lambda start, stop, rows=rows, asked=asked: (asked.append((start, stop)), rows(start, stop))[1]
        tensor = paddle.to_tensor(x, stop_gradient=False)
        y = layer(tensor)
        (y * paddle.to_tensor(upstream)).sum().backward()
        assert asked == parts * 2
        np.testing.assert_allclose(layer.dequantize().numpy(), read(stored).T, rtol=1e-6, atol=0)
        assert asked == parts * 3
        wide = read(stored).astype(np.float64)
        np.testing.assert_allclose(y.numpy(), x @ wide.T, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(tensor.grad.numpy(), upstream @ wide, atol=1e-5, rtol=1e-5)
    assert 2 <= len(divided._gpu_parts) <= 3


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4", "int4", "int4-group"])
def test_kernels_may_look_codes_up(paddle: Any, kind: str) -> None:
    """They are told all that a part of a layer stands for; what they do not give is as it was."""

    class ByOne(sft.Kernels):
        calls = 0

        def four_bits(self, codes: Any, values: Any, scales: Any, size: int) -> Any:
            codes, values, scales = codes.numpy(), values.numpy(), scales.numpy().reshape(-1, 1)
            both = values[np.stack([codes >> 4, codes & 15], axis=1).reshape(len(scales), size)]
            self.calls += 1
            return paddle.to_tensor((both * scales).reshape(-1))

    layer, _ = make(np.random.default_rng(0).standard_normal((96, 192)).astype(np.float32), kind)
    expected = layer.dequantize().numpy()
    layer.kernels = ByOne()
    assert np.array_equal(layer.dequantize().numpy(), expected)
    assert layer.kernels.calls == len(layer.parts)

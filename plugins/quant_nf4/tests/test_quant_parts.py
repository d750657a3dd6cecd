"""Parts of quantized layers, for processes that share a model: the codes and the results of the whole layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sft
from sft_quant_nf4.codes import quantize_blocks, quantize_channels

KINDS = ["nf4", "fp4", "nf4-double", "int8", "int4", "int4-group"]
OUT, IN = 24, 240


def make(kind: str, shape: tuple[int, int] = (OUT, IN), size: int = 8, bias: np.ndarray | None = None) -> Any:
    """A layer for a weight [out, in] whose rows differ in scale; ``size`` of a block or group."""
    from sft_quant_nf4.layers import BlockLinear, ChannelLinear

    generator = np.random.default_rng(3)
    weight = (generator.standard_normal(shape) * np.exp(generator.standard_normal((shape[0], 1)))).astype(np.float32)
    if kind.startswith("int"):
        return ChannelLinear(quantize_channels(weight, int(kind[3]), size if "group" in kind else None), bias)
    return BlockLinear(quantize_blocks(weight, kind[:3], size, "double" in kind), bias)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("axis", [0, 1], ids=["inputs", "outputs"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_hold_the_values_of_the_whole(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, kind: str, axis: int, count: int
) -> None:
    """Bit for bit. The 720 blocks of double quantization are three groups; two rows are dequantized at a time."""
    from sft_quant_nf4 import layers

    monkeypatch.setattr(layers, "PART", 500)
    whole = make(kind)
    values = whole.dequantize().numpy()
    parts = [whole.part(axis, index, count) for index in range(count)]
    for part, expected in zip(parts, np.split(values, count, axis), strict=True):
        np.testing.assert_array_equal(part.dequantize().numpy(), expected)
        assert (part.in_features, part.out_features) == expected.shape
    if kind == "nf4-double" and count > 1:  # and not by way of a plain absmax
        assert all(part.absmax is None for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_parts_are_those_of_the_whole(paddle: Any, kind: str) -> None:
    """Values and input gradients: outputs stand side by side, inputs add up. Each is within float32's bound for sums of
    n products, n · 2⁻²⁴ · Σ|x·w|, of the sum in float64 (n + 3: three parts and a bias are added too)."""
    generator = np.random.default_rng(4)
    bias = generator.standard_normal(OUT).astype(np.float32)
    x, upstream = (generator.standard_normal((5, size)).astype(np.float32) for size in (IN, OUT))

    def both(layer: Any, x: np.ndarray, upstream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tensor = paddle.to_tensor(np.ascontiguousarray(x), stop_gradient=False)
        y = layer(tensor)
        (y * paddle.to_tensor(np.ascontiguousarray(upstream))).sum().backward()
        return y.numpy(), tensor.grad.numpy()

    whole, plain = make(kind, bias=bias), make(kind)
    weight = whole.dequantize().numpy().astype(np.float64)
    sums = {
        "y": (x @ weight + bias, np.abs(x) @ np.abs(weight) + np.abs(bias), IN),
        "plain": (x @ weight, np.abs(x) @ np.abs(weight), IN),
        "gradient": (upstream @ weight.T, np.abs(upstream) @ np.abs(weight.T), OUT),
    }

    def right(found: np.ndarray, name: str) -> None:
        value, size, count = sums[name]
        assert (np.abs(found - value) <= (count + 3) * 2.0**-24 * size).all(), name

    y, grad = both(whole, x, upstream)
    right(y, "y")
    right(grad, "gradient")
    found = [both(whole.part(1, index, 3), x, share) for index, share in enumerate(np.split(upstream, 3, 1))]
    right(np.concatenate([one for one, _ in found], 1), "y")
    right(sum(one for _, one in found), "gradient")
    found = [both(plain.part(0, index, 3), share, upstream) for index, share in enumerate(np.split(x, 3, 1))]
    right(sum(one for one, _ in found), "plain")
    right(np.concatenate([one for _, one in found], 1), "gradient")


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.57), ("nf4-double", 0.53), ("int8", 1.03), ("int4", 0.53)])
@pytest.mark.parametrize("axis", [0, 1], ids=["inputs", "outputs"])
def test_a_part_takes_its_part_of_the_memory(paddle: Any, kind: str, most: float, axis: int) -> None:
    """Bytes a value of the part, as paddle counts them, once the whole layer is gone."""
    from paddle.base import core

    make(kind, (8, 64), 64)  # tables that all layers share
    before = core.host_memory_stat_current_value("Allocated", 0)
    part = make(kind, (512, 1024), 64).part(axis, 1, 4)
    held = core.host_memory_stat_current_value("Allocated", 0) - before
    assert part.in_features * part.out_features == 512 * 1024 // 4
    assert held <= most * 512 * 1024 // 4


@pytest.mark.parametrize(
    ("kind", "axis", "count", "message"),
    [
        (
            "nf4",
            0,
            4,
            r"qlora_weight_blocksize 8 does not divide the 60 inputs of a layer that each of 4 processes has",
        ),
        ("fp4", 1, 24, None),
        ("int4-group", 0, 4, r"weight_only_group_size 8 does not divide the 60 inputs .* each of 4 processes has; set"),
        ("int4", 0, 16, r"Each of 16 processes has 15 inputs of a layer, and int4 keeps two in a byte; take int8"),
        ("int8", 0, 16, None),
        ("int8", 0, 7, r"The 240 inputs of a quantized layer do not divide among 7 processes; choose another number"),
        ("nf4", 1, 5, r"The 24 outputs of a quantized layer do not divide among 5 processes; choose another number"),
    ],
)
def test_what_cannot_be_cut_is_refused(paddle: Any, kind: str, axis: int, count: int, message: str | None) -> None:
    whole = make(kind)
    if message is None:
        assert whole.part(axis, 0, count).codes.size == whole.codes.size // count
        return
    with pytest.raises(sft.UsageError, match=message):
        whole.part(axis, 0, count)


def test_outputs_that_share_a_block_are_not_divided(paddle: Any) -> None:
    with pytest.raises(sft.UsageError, match=r"qlora_weight_blocksize 64 does not divide the 36 values of a layer"):
        make("nf4", (6, 12), 64).part(1, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_goes_with_outputs_alone(paddle: Any, kind: str) -> None:
    bias = np.arange(OUT, dtype=np.float32)
    whole = make(kind, bias=bias)
    np.testing.assert_array_equal(whole.part(1, 2, 3).bias.numpy(), bias[16:])
    with pytest.raises(sft.UsageError, match="has a bias, and each process that has a part of its inputs would add it"):
        whole.part(0, 0, 2)
    assert make(kind).part(1, 0, 2).bias is None

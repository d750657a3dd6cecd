"""What is stored: byte for byte what bitsandbytes stores, and whole numbers against their formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sft_quant_nf4 import codes
from sft_quant_nf4.codes import CODEBOOKS, Blocks, Channels, double_quantize, quantize_blocks, quantize_channels

Read = Callable[[Blocks | Channels], np.ndarray]
CASES = [(name, kind) for name in ("large", "odd") for kind in ("nf4", "fp4")]


def weight_of(bitsandbytes: dict[str, np.ndarray], name: str) -> np.ndarray:
    return bitsandbytes[f"{name}.weight"].astype(np.float32)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_codes_and_absmax_are_those_of_bitsandbytes(
    bitsandbytes: dict[str, np.ndarray], name: str, kind: str, read: Read
) -> None:
    """Also of values exactly between two codes, of a block of zeros, and of a last block that is not full."""
    found = quantize_blocks(weight_of(bitsandbytes, name), kind, 64, double=False)
    same(found.codes, bitsandbytes[f"{name}.{kind}.codes"])
    assert found.absmax is not None
    same(found.absmax, bitsandbytes[f"{name}.{kind}.absmax"])
    assert (found.absmax == 0).any() == (name == "odd")
    same(read(found).reshape(-1)[:: 37 if name == "large" else 1], bitsandbytes[f"{name}.{kind}.dequantized"])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_double_quantization_is_that_of_bitsandbytes(
    bitsandbytes: dict[str, np.ndarray], name: str, kind: str, read: Read
) -> None:
    found = quantize_blocks(weight_of(bitsandbytes, name), kind, 64, double=True)
    key = f"{name}.{kind}.double"
    assert found.absmax is None
    assert found.double is not None
    same(found.codes, bitsandbytes[f"{name}.{kind}.codes"])
    same(found.double.codes, bitsandbytes[f"{key}.codes"])
    same(found.double.absmax, bitsandbytes[f"{key}.absmax"])
    assert found.double.offset == bitsandbytes[f"{key}.offset"][0]
    same(read(found).reshape(-1)[:: 37 if name == "large" else 1], bitsandbytes[f"{key}.dequantized"])


@pytest.mark.parametrize("name", ["nested", "summed"])
def test_many_nested_codes_are_those_of_bitsandbytes(bitsandbytes: dict[str, np.ndarray], name: str) -> None:
    """Enough for two things to show: the rounding of bitsandbytes' table, and the order of torch's sum."""
    values = bitsandbytes[f"{name}.values"]
    found = double_quantize(values)
    same(found.codes, bitsandbytes[f"{name}.codes"])
    same(found.absmax, bitsandbytes[f"{name}.absmax"])
    assert found.offset == bitsandbytes[f"{name}.offset"][0]
    if name == "nested":
        exact = (values - found.offset).reshape(-1, 256) / found.absmax[:, None]
        nearest = np.abs(exact.reshape(-1, 1) - codes.DYNAMIC).argmin(axis=1)
        assert (nearest != found.codes).sum() >= 2
    else:  # what another last bit of the offset does
        others, absmax = codes._eight_bits(values - np.nextafter(found.offset, np.float32(0)))
        assert (others != found.codes).any()
        assert (absmax != found.absmax).any()


def test_the_offset_is_torchs_mean_bit_by_bit(bitsandbytes: dict[str, np.ndarray]) -> None:
    """Of as many values as make torch add in one lane or eight, in one level or in all four."""
    exactly = 0
    for size, offset in zip(bitsandbytes["means.sizes"], bitsandbytes["means.offset"], strict=True):
        whole = (np.arange(size) * 2654435761 % 2**32) >> 8  # the 24 bits of make_bitsandbytes.spread
        values = whole.astype(np.float32) / np.float32(2**24)
        assert codes.cascade_sum(values) / np.float32(size) == offset, size
        exactly += np.float32(whole.sum() / size / 2**24) == offset
    assert exactly < len(bitsandbytes["means.sizes"])  # the order shows: the best rounding is another


def plain(weight: np.ndarray, kind: str, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    """Nearest codes [n] and absmax, in float64 and one value at a time."""
    found, absmax = [], []
    flat = weight.reshape(-1).astype(np.float64)
    for start in range(0, flat.size, blocksize):
        block = flat[start : start + blocksize]
        absmax.append(np.abs(block).max())
        found += [int(np.abs(value / absmax[-1] - CODEBOOKS[kind].astype(np.float64)).argmin()) for value in block]
    return np.array(found), np.array(absmax, np.float32)


def values_of(blocks: Blocks) -> np.ndarray:
    """The code of each value."""
    return np.stack([blocks.codes >> 4, blocks.codes & 15], axis=1).reshape(-1)[: blocks.shape[0] * blocks.shape[1]]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [2, 6, 32, 128, 4096, 1 << 18])
def test_other_blocksizes_store_the_nearest_code(kind: str, blocksize: int, read: Read) -> None:
    weight = np.random.default_rng(blocksize).standard_normal((37, 53)).astype(np.float32)
    found = quantize_blocks(weight, kind, blocksize, double=False)
    expected, absmax = plain(weight, kind, blocksize)
    table = CODEBOOKS[kind]
    np.testing.assert_array_equal(table[values_of(found)], table[expected])
    np.testing.assert_array_equal(found.absmax, absmax)
    scale = np.repeat(absmax, blocksize)[: weight.size].astype(np.float64)
    np.testing.assert_allclose(read(found).reshape(-1), table[expected] * scale, rtol=1e-6, atol=0)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, read: Read) -> None:
    weight = np.random.default_rng(0).standard_normal((31, 77)).astype(np.float32)
    whole = [quantize_blocks(weight, "nf4", 6, double=False), quantize_channels(weight, 8, 7)]
    monkeypatch.setattr(codes, "_CHUNK", 100)
    parts = [quantize_blocks(weight, "nf4", 6, double=False), quantize_channels(weight, 8, 7)]
    for one, other in zip(whole, parts, strict=True):
        same(one.codes, other.codes)
        same(read(one), read(other))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_large_blocks_take_4_bits_and_their_absmax(kind: str) -> None:
    weight = np.ones((1024, 1024), np.float32)
    found = quantize_blocks(weight, kind, 64, double=False)
    assert found.absmax is not None
    assert 8 * (found.codes.nbytes + found.absmax.nbytes) / weight.size == 4.5
    found = quantize_blocks(weight, kind, 64, double=True)
    assert found.double is not None
    stored = found.codes.nbytes + found.double.codes.nbytes + found.double.absmax.nbytes
    assert 8 * stored / weight.size == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (4, 4), (4, 11)])
def test_whole_numbers_are_the_formula(bits: int, group: int | None, read: Read) -> None:
    """scale = absmax / (2^(bits-1) - 1) of a channel or group, and the nearest whole number of it."""
    weight = np.random.default_rng(bits).standard_normal((15, 44)).astype(np.float32)
    weight[3] = 0
    found = quantize_channels(weight, bits, group)
    largest = 127 if bits == 8 else 7
    parts = weight.astype(np.float64).reshape(15, -1, group or 44)
    absmax = np.abs(parts).max(axis=2, keepdims=True)
    scale = np.where(absmax == 0, 1, absmax) / largest
    np.testing.assert_allclose(found.scales, absmax[..., 0] / largest, rtol=1e-6)
    expected = (np.rint(parts / scale) * scale).reshape(15, 44)
    np.testing.assert_allclose(read(found), expected, rtol=1e-5, atol=1e-6)
    error = np.abs(read(found).reshape(parts.shape) - parts)
    assert (error <= absmax / (2 * largest) * (1 + 1e-5)).all()
    assert found.codes.nbytes * 8 == weight.size * bits
    assert found.codes.dtype == (np.int8 if bits == 8 else np.uint8)


def test_int4_stores_eight_more_with_the_first_of_a_pair_in_the_high_half(read: Read) -> None:
    weight = np.float32([[7, -7, 0, 1, 3]])
    found = quantize_channels(weight, 4, None)
    assert found.codes.tolist() == [[0xF1, 0x89, 0xB8]]  # an odd channel ends with a zero
    np.testing.assert_array_equal(read(found), weight)


@pytest.mark.parametrize("way", ["nf4", "int8", "int4"])
def test_threads_make_the_same_codes(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Each thread codes parts of its own, as many as paddle has threads."""
    weight = np.random.default_rng(3).standard_normal((300, 256), np.float32)
    monkeypatch.setattr(codes, "_CHUNK", 1 << 12)
    pools: list[int] = []

    class Pool(codes.ThreadPoolExecutor):
        def __init__(self, threads: int) -> None:
            pools.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(codes, "ThreadPoolExecutor", Pool)
    made = []
    for threads in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        if way == "nf4":
            one: Blocks | Channels = quantize_blocks(weight, way, 64, False)
        else:
            one = quantize_channels(weight, int(way[3:]), None)
        made.append(one)
    assert pools == [3]
    scales = [one.absmax if isinstance(one, Blocks) else one.scales for one in made]
    np.testing.assert_array_equal(made[0].codes, made[1].codes)
    np.testing.assert_array_equal(*scales)

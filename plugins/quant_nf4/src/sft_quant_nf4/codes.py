"""Quantized weights as arrays, in numpy: what is stored, and how it is made. Weights are [out, in], row-major.

NF4 and FP4 (arXiv 2305.14314; codes and layout as bitsandbytes has them): blocks of ``blocksize`` values, one absmax a
block, the nearest of 16 values, the first value of a pair in the high four bits. Double quantization stores the
absmax less their mean in 8 bits of a signed dynamic map, in blocks of 256. INT8: absmax / 127 of each output channel.
INT4: absmax / 7 of each output channel, or of each group of ``group`` inputs; stored plus 8, two a byte.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # fmt: skip
_FP4 = [0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
FP4 = np.array(_FP4 + [0.0 - value for value in _FP4], np.float32)
CODEBOOKS = {"nf4": NF4, "fp4": FP4}

_Found = TypeVar("_Found")
_CHUNK = 1 << 17
"""Values that are coded at a time: bounds the scratch memory beside the weight."""


@dataclass
class Blocks:
    """A 4-bit weight: ``codes`` uint8 [ceil(n / 2)], ``absmax`` float32 [blocks], or its double-quantized form."""

    codes: np.ndarray
    absmax: np.ndarray | None
    double: DoubleAbsmax | None
    shape: tuple[int, int]
    kind: str
    blocksize: int


@dataclass
class DoubleAbsmax:
    """absmax in 8 bits: ``codes`` uint8 [blocks], ``absmax`` float32 [blocks / 256], ``offset`` their mean."""

    codes: np.ndarray
    absmax: np.ndarray
    offset: np.float32


def pair_table(kind: str) -> np.ndarray:
    """float32 [256, 2]: the two values that a byte of codes stands for."""
    byte, values = np.arange(256), codebook(kind)
    return np.stack([values[byte >> 4], values[byte & 15]], axis=1)


def codebook(kind: str) -> np.ndarray:
    """float32 [16]: what each code of "nf4", "fp4" or "int4" stands for."""
    return np.arange(-8, 8, dtype=np.float32) if kind == "int4" else CODEBOOKS[kind]


def nearest(values: np.ndarray, kind: str) -> np.ndarray:
    """Codes uint8 of values in [-1, 1], as bitsandbytes chooses: halfway between two it is the lower one.

    FP4 has two zeros: values that round to zero get code 0 up to zero itself, and code 8 above it.
    """
    # A stable order of the two zeros; comparing with all 15 midpoints takes a tenth of the time of a binary search.
    order = np.argsort(CODEBOOKS[kind], kind="stable").astype(np.uint8)
    ascending = CODEBOOKS[kind][order]
    above = np.zeros(values.shape, np.uint8)
    for middle in (ascending[1:] + ascending[:-1]) / 2:
        above += values > middle
    return order[above]


def quantize_blocks(weight: np.ndarray, kind: str, blocksize: int, double: bool) -> Blocks:
    """float32 [out, in] → 4-bit blocks."""
    flat = weight.reshape(-1)
    size = flat.size
    codes = np.zeros(-(-size // 2), np.uint8)
    absmax = np.zeros(-(-size // blocksize), np.float32)
    step = max(1, _CHUNK // (2 * blocksize)) * 2 * blocksize

    def code_from(start: int) -> None:
        part = flat[start : start + step]
        blocks = -(-part.size // blocksize)
        padded = np.zeros(blocks * blocksize, np.float32)
        padded[: part.size] = part
        padded = padded.reshape(blocks, blocksize)
        scale = np.abs(padded).max(axis=1)
        absmax[start // blocksize : start // blocksize + blocks] = scale
        unit = padded * (1.0 / np.where(scale == 0, np.float32(1), scale)).astype(np.float32)[:, None]
        code = nearest(unit.reshape(-1)[: part.size + part.size % 2], kind)
        codes[start // 2 : start // 2 + len(code) // 2] = (code[0::2] << 4) | code[1::2]

    _in_threads(code_from, range(0, size, step))
    doubled = double_quantize(absmax) if double else None
    return Blocks(codes, None if double else absmax, doubled, (weight.shape[0], weight.shape[1]), kind, blocksize)


def _in_threads(work: Callable[[int], _Found], starts: Sequence[int]) -> list[_Found]:
    """``work`` of each of ``starts``, by as many threads as paddle computes with; numpy lets others run meanwhile."""
    threads = min(len(starts), int(os.environ.get("OMP_NUM_THREADS") or 1))
    if threads <= 1:
        return [work(start) for start in starts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, starts))


def _dynamic_map() -> np.ndarray:
    """bitsandbytes' signed 8-bit dynamic map: 7 decades, each split linearly into as many steps as bits are left.

    Rounded as torch rounds: its linspace counts from both ends in steps of float32, and all that follows is float32.
    """
    values = [np.array([0, 1], np.float32)]
    for decade in range(7):
        steps = 2**decade
        step, place = float((np.float32(1) - np.float32(0.1)) / np.float32(steps)), np.arange(steps + 1)
        up, down = float(np.float32(0.1)) + step * place, 1 - step * (steps - place)
        edges = np.where(place < (steps + 1) // 2, up, down).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        values += [means, -means]
    return np.sort(np.concatenate(values))


DYNAMIC = _dynamic_map()


def double_quantize(absmax: np.ndarray) -> DoubleAbsmax:
    """absmax float32 [blocks] → 8 bits each."""
    offset = cascade_sum(absmax) / np.float32(len(absmax))
    return DoubleAbsmax(*_eight_bits(absmax - offset), offset)


def cascade_sum(values: np.ndarray) -> np.float32:
    """The sum of float32 [n] in the order in which torch adds on one thread of an x86 CPU, so to the same last bit.

    bitsandbytes subtracts torch's mean, and its last bit decides about some codes. torch has 8 lanes (one for fewer
    than 8 values) and 4 running sums of each. What they have added goes up a level every ``step`` rows, through four
    levels, so that numbers of similar size meet.
    """
    lanes = 8 if len(values) >= 8 else 1
    vectors = values[: len(values) // lanes * lanes].reshape(-1, lanes)
    count = len(vectors) // 4
    rows = vectors[: 4 * count].reshape(count, 4 * lanes)
    power = max(4, max(count - 1, 0).bit_length() // 4)
    step = 1 << power
    levels = np.zeros((4, 4 * lanes), np.float32)
    for start in range(0, count - step + 1, step):
        levels[0] = _in_order(rows[start : start + step])
        for level in range(1, 4):
            levels[level] += levels[level - 1]
            levels[level - 1] = 0
            if (start + step) & ((step - 1) << (level * power)):
                break
    levels[0] = _in_order(rows[count // step * step :])
    first, *others = _in_order(levels).reshape(4, lanes)
    of_lanes = _in_order([first, *vectors[4 * count :], *others])
    return np.float32(_in_order([*values[vectors.size :], *of_lanes]))


def _in_order(terms: Iterable[Any]) -> Any:
    """Their float32 sum, added one after the other, which numpy's own sum does not promise."""
    total = np.float32(0)
    for term in terms:
        total = total + term
    return total


def _eight_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the dynamic map uint8 [n], and the float32 absmax of each 256."""
    padded = np.zeros(-(-len(values) // 256) * 256, np.float32)
    padded[: len(values)] = values
    padded = padded.reshape(-1, 256)
    absmax = np.abs(padded).max(axis=1)
    unit = (padded / np.where(absmax == 0, np.float32(1), absmax)[:, None]).reshape(-1)[: len(values)]
    # bitsandbytes looks codes up in a table of 65,536 steps; without its rounding one code in a thousand differs.
    steps = np.float32(32767.5)
    unit = np.floor((unit + 1) * steps + np.float32(0.5)) / steps - 1
    upper = np.clip(np.searchsorted(DYNAMIC, unit), 1, 255)
    lower = upper - 1
    codes = np.where(np.abs(unit - DYNAMIC[lower]) <= np.abs(DYNAMIC[upper] - unit), lower, upper)
    return codes.astype(np.uint8), absmax


@dataclass
class Channels:
    """An 8- or 4-bit weight: ``scales`` float32 [out, groups]; ``codes`` int8 [out, in], or uint8 [out, in / 2]."""

    codes: np.ndarray
    scales: np.ndarray
    shape: tuple[int, int]
    bits: int


def quantize_channels(weight: np.ndarray, bits: int, group: int | None) -> Channels:
    """float32 [out, in] → whole numbers of ``bits`` bits with a scale for each output channel, or ``group`` inputs."""
    out, size = weight.shape
    width = group or size
    rows = max(1, _CHUNK // size)

    def code_from(start: int) -> tuple[np.ndarray, np.ndarray]:
        return _whole(weight[start : start + rows].reshape(-1, size // width, width), bits)

    parts = _in_threads(code_from, range(0, out, rows))
    scales = np.concatenate([part[1] for part in parts])
    return Channels(np.concatenate([part[0] for part in parts]), scales, (out, size), bits)


def _whole(parts: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """[rows, groups, width] → stored codes [rows, ...] and scales [rows, groups]."""
    largest = 2 ** (bits - 1) - 1
    scales = np.abs(parts).max(axis=2) / np.float32(largest)
    safe = np.where(scales == 0, np.float32(1), scales)
    whole = np.clip(np.rint(parts / safe[..., None]), -largest, largest).reshape(len(parts), -1)
    if bits == 8:
        return whole.astype(np.int8), scales
    size = whole.shape[1]
    shifted = np.full((len(parts), size + size % 2), 8, np.uint8)
    shifted[:, :size] = (whole + 8).astype(np.uint8)
    return (shifted[:, 0::2] << 4) | shifted[:, 1::2], scales

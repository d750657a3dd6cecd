"""Attention beside its formula in float64: documents, windows, padding, groups of heads, caps; its time and memory."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

import sft

DOCUMENTS = {
    "one": [[150], [150]],
    "several": [[70, 1, 79], [3, 129, 18]],
    "short": [[5] * 30, [1] * 150],
    "long": [[300], [129, 171]],
}


def ends_of(rows: list[list[int]], window: int | None = None) -> np.ndarray:
    ends = np.stack([np.repeat(np.cumsum(lengths), lengths) for lengths in rows]).astype(np.int32)
    if window is not None:
        ends = np.minimum(ends, np.arange(ends.shape[1], dtype=np.int32) + window)
    return ends[:, None, :, None]


def formula(q: Any, k: Any, v: Any, ends: np.ndarray, cap: float | None, upstream: np.ndarray) -> list[np.ndarray]:
    """The output and the gradients of Σ out · upstream, in float64 and dense."""
    q, k, v, upstream = (one.astype(np.float64) for one in (q, k, v, upstream))
    groups, size, length = q.shape[2] // k.shape[2], q.shape[3], q.shape[1]
    wide_k, wide_v = (one.repeat(groups, axis=2) for one in (k, v))
    places = np.arange(length)
    seen = (places[:, None] >= places) & (places[:, None] < ends[:, :, :, 0][:, :, None, :])
    scores = np.einsum("bihd,bjhd->bhij", q, wide_k) / np.sqrt(size)
    bent = scores if cap is None else cap * np.tanh(scores / cap)
    weights = np.exp(np.where(seen, bent, -np.inf) - np.where(seen, bent, -np.inf).max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhij,bjhd->bihd", weights, wide_v)
    weights_grad = np.einsum("bihd,bjhd->bhij", upstream, wide_v)
    slope = weights * (weights_grad - (weights_grad * weights).sum(-1, keepdims=True))
    slope = slope if cap is None else slope * (1 - (bent / cap) ** 2)
    slope /= np.sqrt(size)
    v_grad = np.einsum("bhij,bihd->bjhd", weights, upstream)
    k_grad = np.einsum("bhij,bihd->bjhd", slope, q)
    split = [one.reshape(*k.shape[:3], groups, size).sum(3) for one in (k_grad, v_grad)]
    return [out, np.einsum("bhij,bjhd->bihd", slope, wide_k), *split]


def computed(kernels: Any, arrays: list[np.ndarray], ends: np.ndarray | None, cap: float | None, upstream: np.ndarray):
    import paddle

    tensors = [paddle.to_tensor(array, stop_gradient=False) for array in arrays]
    out = kernels.attention(*tensors, kernels.mask(ends), cap)
    (out * paddle.to_tensor(upstream)).sum().backward()
    return [out.numpy(), *[tensor.grad.numpy() for tensor in tensors]]


def arrays_of(rows: int, length: int, heads: int, kv_heads: int, size: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = [(rows, length, count, size) for count in (heads, kv_heads, kv_heads)]
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("documents", list(DOCUMENTS))
@pytest.mark.parametrize(
    ("window", "cap", "heads", "size"),
    [(None, None, (6, 2), 32), (20, None, (2, 2), 16), (70, 2.0, (4, 1), 48), (None, 5.0, (3, 3), 64)],
    ids=["grouped", "window", "window and cap", "cap"],
)
def test_it_is_the_formula(
    kernels: Any, documents: str, window: int | None, cap: float | None, heads: tuple[int, int], size: int
) -> None:
    rows = DOCUMENTS[documents]
    ends = ends_of(rows, window)
    arrays = arrays_of(2, ends.shape[2], *heads, size)
    upstream = arrays_of(2, ends.shape[2], *heads, size, seed=1)[0]
    found, expected = computed(kernels, arrays, ends, cap, upstream), formula(*arrays, ends, cap, upstream)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() <= 2e-6 * np.abs(other).max()


def test_without_ends_a_row_is_one_document(kernels: Any, paddle: Any) -> None:
    arrays, upstream = arrays_of(2, 90, 4, 2, 16), arrays_of(2, 90, 4, 2, 16, seed=1)[0]
    found = computed(kernels, arrays, None, None, upstream)
    for one, other in zip(found, formula(*arrays, ends_of([[90]] * 2), None, upstream), strict=True):
        assert np.abs(one - other).max() <= 2e-6 * np.abs(other).max()


@pytest.mark.parametrize("size", [8, 4])
def test_a_narrow_head_takes_a_narrower_level(kernels: Any, size: int) -> None:
    arrays, upstream = arrays_of(1, 20, 2, 1, size), arrays_of(1, 20, 2, 1, size, seed=1)[0]
    ends = ends_of([[11, 9]])
    found = computed(kernels, arrays, ends, None, upstream)
    for one, other in zip(found, formula(*arrays, ends, None, upstream), strict=True):
        assert np.abs(one - other).max() <= 2e-6 * np.abs(other).max()


@pytest.mark.parametrize("why", ["odd heads", "ends that fall", "float64"])
def test_what_it_cannot_do_is_left_to_others(library: Any, paddle: Any, why: str) -> None:
    from sft_kernels_cpu.kernels import NativeKernels

    class Others(sft.Kernels):
        def mask(self, ends: Any) -> Any:
            return "mask of", ends

        def attention(self, *arguments: Any) -> Any:
            return arguments

    arrays, ends = arrays_of(1, 20, 2, 1, 6 if why == "odd heads" else 16), ends_of([[11, 9]])
    if why == "ends that fall":
        ends[0, 0, 3] = 20  # key 3 is seen by the second document, and its neighbours are not
    tensors = [paddle.to_tensor(array, dtype="float64" if why == "float64" else "float32") for array in arrays]
    native = NativeKernels(library, Others())
    *given, mask, cap = native.attention(*tensors, native.mask(ends), 3.0)
    assert all(one is other for one, other in zip(given, tensors, strict=True))
    assert mask == ("mask of", ends)
    assert cap == 3.0


def test_two_runs_and_one_thread_give_the_same_bits(kernels: Any, threads: Any) -> None:
    ends = ends_of(DOCUMENTS["several"])
    arrays, upstream = arrays_of(2, 150, 6, 2, 32), arrays_of(2, 150, 6, 2, 32, seed=1)[0]
    found = []
    for count in (2, 1, 2):
        threads(count)
        found.append(computed(kernels, arrays, ends, None, upstream))
    for other in found[1:]:
        assert all((a == b).all() for a, b in zip(found[0], other, strict=True))


def test_nan_goes_where_it_is_seen_and_nowhere_else(kernels: Any, paddle: Any) -> None:
    q, k, v = arrays_of(1, 40, 2, 1, 16)
    k[0, 25] = np.nan
    mask = kernels.mask(ends_of([[20, 20]]))
    out = kernels.attention(*[paddle.to_tensor(one) for one in (q, k, v)], mask, None).numpy()
    assert np.isfinite(out[0, :25]).all()
    assert np.isnan(out[0, 25:]).all()


@pytest.mark.parametrize("library", [None], indirect=True, ids=["best"])
def test_time_follows_what_is_seen(kernels: Any, paddle: Any) -> None:
    """Documents of 64 in a row of 4096: a 64th of the scores, and less than an eighth of the time."""
    tensors = [paddle.to_tensor(array) for array in arrays_of(1, 4096, 4, 4, 64)]
    seconds = {}
    for size in (4096, 64):
        mask, tries = kernels.mask(ends_of([[size] * (4096 // size)])), []
        for _ in range(3):
            start = time.process_time()
            kernels.attention(*tensors, mask, None)
            tries.append(time.process_time() - start)
        seconds[size] = min(tries)
    assert seconds[64] < seconds[4096] / 8

"""The formula, tried by `sft certify` on the blocks themselves (group ``sft.certify`` in pyproject.toml): a run on a
CPU leaves them to the model's kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_LENGTH, _HEADS, _KEPT, _SIZE = 300, 4, 2, 8


def _formula(arrays: list[np.ndarray], ends: np.ndarray, cap: float | None) -> list[np.ndarray]:
    """softmax(Q·Kᵀ/√D)·V, capped, of keys j that query i sees (j ≤ i < end of j), and the gradients of Q, K and V;
    float64, each [S, heads, D]."""
    q, k, v, dy = (one[0].astype(np.float64).transpose(1, 0, 2) for one in arrays)
    k, v = (np.repeat(one, _HEADS // _KEPT, axis=0) for one in (k, v))
    places, scale = np.arange(_LENGTH), 1 / math.sqrt(_SIZE)
    scores, bent = q @ k.swapaxes(1, 2) * scale, np.ones(1)
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
        bent = 1 - (scores / cap) ** 2
    seen = (places[:, None] >= places) & (places[:, None] < ends)
    weights = np.exp(np.where(seen, scores, -np.inf) - np.where(seen, scores, -np.inf).max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    change = dy @ v.swapaxes(1, 2)
    slope = weights * (change - (weights * change).sum(-1, keepdims=True)) * bent * scale
    found = [weights @ v, slope @ k, slope.swapaxes(1, 2) @ q, weights.swapaxes(1, 2) @ dy]
    shared = [one.reshape(_KEPT, -1, _LENGTH, _SIZE).sum(1) for one in found[2:]]
    return [one.transpose(1, 0, 2) for one in (*found[:2], *shared)]


def check_blocks_compute_the_formula(lab: Any) -> None:
    """Blocks of queries give softmax(Q·Kᵀ/√D)·V and its gradients, over documents, with shared key heads and caps."""
    import paddle

    from sft_attn_flashmask.blockwise import attention
    from sft_attn_flashmask.masks import column_masks

    generator = np.random.default_rng(0)
    shapes = [(1, _LENGTH, heads, _SIZE) for heads in (_HEADS, _KEPT, _KEPT, _HEADS)]
    documents = np.repeat([110, 150, 300], [110, 40, 150])
    for ends, cap in ((documents, None), (np.full(_LENGTH, _LENGTH), 2.0)):
        arrays = [generator.standard_normal(shape, dtype=np.float32) for shape in shapes]
        tensors = [paddle.to_tensor(one, stop_gradient=False) for one in arrays[:3]]
        query, key, value = tensors
        y = attention(query, key, value, column_masks(ends.astype(np.int32)[None, None, :, None]), cap)
        (y * paddle.to_tensor(arrays[3])).sum().backward()
        found = [y, *(one.grad for one in tensors)]
        names = ("the output", "the gradient of queries", "the gradient of keys", "the gradient of values")
        for name, one, expected in zip(names, found, _formula(arrays, ends, cap), strict=True):
            off, largest = np.abs(one.numpy()[0] - expected).max(), np.abs(expected).max()
            assert off <= 1e-5 * largest, f"{name} is {off:.2e} off, where the largest value is {largest:.2e}"


BLOCKS = (check_blocks_compute_the_formula,)

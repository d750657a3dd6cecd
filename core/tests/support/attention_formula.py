"""Attention as its formula has it, in float64, by numpy."""

from __future__ import annotations

import numpy as np


def attention_formula(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    upstream: np.ndarray,
    seen: np.ndarray,
    cap: float | None = None,
) -> list[np.ndarray]:
    """softmax(Q Kᵀ / √D) V, and the gradients of query, key and value for what comes from above. [B, S, H, D], keys and
    values [B, S, K, D]; ``seen`` bool [B, S, S]: whether query i sees key j. With ``cap``, scores s become
    cap · tanh(s / cap)."""
    q, k, v, g = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in (query, key, value, upstream))
    heads, size = k.shape[1], q.shape[-1]
    k, v = (np.repeat(x, q.shape[1] // heads, axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(size)
    bent = scores if cap is None else cap * np.tanh(scores / cap)
    weights = np.exp(np.where(seen[:, None], bent, -np.inf) - bent.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    above = g @ v.swapaxes(-1, -2)
    slope = weights * (above - (above * weights).sum(-1, keepdims=True)) / np.sqrt(size)
    if cap is not None:
        slope *= 1 - (bent / cap) ** 2

    def ungrouped(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), heads, -1, *x.shape[2:]).sum(2)

    found = weights @ v, slope @ k, ungrouped(slope.swapaxes(-1, -2) @ q), ungrouped(weights.swapaxes(-1, -2) @ g)
    return [x.transpose(0, 2, 1, 3) for x in found]

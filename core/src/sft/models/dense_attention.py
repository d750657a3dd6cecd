"""paddle's ``scaled_dot_product_attention``; rows of several documents get a dense mask, of O(S²) memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def dense_attention(query: Any, key: Any, value: Any, mask: Any | None, cap: float | None) -> Any:
    """softmax(Q Kᵀ / √D) V; ``mask`` is what :func:`dense_mask` gives, None: causal."""
    from paddle.nn.functional import scaled_dot_product_attention

    if cap is not None:
        return _capped(query, key, value, mask, cap)
    if mask is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True)
    # With both a mask and is_causal paddle ignores the mask, so causality goes into it.
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _capped(query: Any, key: Any, value: Any, mask: Any | None, cap: float) -> Any:
    """Scores s become cap · tanh(s / cap) before the mask; paddle's own attention has no place for that."""
    import paddle

    rows, length, heads, size = query.shape
    groups = key.shape[2]
    if mask is None:
        mask = dense_mask(np.full([1, 1, length, 1], length, np.int32))
    query = query.transpose([0, 2, 1, 3]).reshape([rows, groups, heads // groups, length, size]) / math.sqrt(size)
    key, value = (tensor.transpose([0, 2, 1, 3]).unsqueeze(2) for tensor in (key, value))
    scores = paddle.tanh(paddle.matmul(query, key, transpose_y=True).astype("float32") / cap) * cap
    scores = scores + mask.unsqueeze(2)
    out = paddle.matmul(paddle.nn.functional.softmax(scores, axis=-1).astype(value.dtype), value)
    return out.reshape([rows, heads, length, size]).transpose([0, 2, 1, 3])


HIDDEN = -3e4
"""What is added to a score that is not seen: its exponential is 0, and float16 has it. (-1e30 would be -inf there, and
kernels that go block by block make NaN of a block in which a query sees nothing, from -inf minus -inf.)"""


def dense_mask(ends: np.ndarray) -> Any:
    """int32 [B, 1, S, 1], causal → float32 [B, 1, S, S]: 0 where query i sees key j, else :data:`HIDDEN`."""
    import paddle

    places, end = np.arange(ends.shape[2]), ends.transpose(0, 1, 3, 2)
    seen = (places[:, None] >= places) & (places[:, None] < end)
    return paddle.to_tensor(np.where(seen, np.float32(0), np.float32(HIDDEN)))

"""The attention that a model has where no plugin provides another, and masks in the dense form."""

from __future__ import annotations

import math
from typing import Any


class DefaultAttention:
    """paddle's ``scaled_dot_product_attention``; rows of several documents get a dense mask, of O(S²) memory."""

    packed = True
    describes_padding = False
    caps = True

    def attend(
        self, query: Any, key: Any, value: Any, startend_row_indices: Any | None, cap: float | None = None
    ) -> Any:
        from paddle.nn.functional import scaled_dot_product_attention

        if cap is not None:
            return _capped(query, key, value, startend_row_indices, cap)
        if startend_row_indices is None:
            return scaled_dot_product_attention(query, key, value, is_causal=True)
        # With both a mask and is_causal paddle ignores the mask, so causality goes into it.
        return scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(startend_row_indices))


def _capped(query: Any, key: Any, value: Any, startend_row_indices: Any | None, cap: float) -> Any:
    """Scores s become cap · tanh(s / cap) before the mask; paddle's own attention has no place for that."""
    import paddle

    rows, length, heads, size = query.shape
    groups = key.shape[2]
    if startend_row_indices is None:
        startend_row_indices = paddle.full([1, 1, length, 1], length, "int32")
    query = query.transpose([0, 2, 1, 3]).reshape([rows, groups, heads // groups, length, size]) / math.sqrt(size)
    key, value = (tensor.transpose([0, 2, 1, 3]).unsqueeze(2) for tensor in (key, value))
    scores = paddle.tanh(paddle.matmul(query, key, transpose_y=True).astype("float32") / cap) * cap
    scores = scores + dense_mask(startend_row_indices).unsqueeze(2)
    out = paddle.matmul(paddle.nn.functional.softmax(scores, axis=-1).astype(value.dtype), value)
    return out.reshape([rows, heads, length, size]).transpose([0, 2, 1, 3])


HIDDEN = -3e4
"""What is added to a score that is not seen: its exponential is 0, and float16 has it. (-1e30 would be -inf there, and
kernels that go block by block make NaN of a block in which a query sees nothing, from -inf minus -inf.)"""


def dense_mask(startend_row_indices: Any) -> Any:
    """int32 [B, 1, S, 1], causal → float32 [B, 1, S, S]: 0 where query i sees key j, else :data:`HIDDEN`."""
    import paddle

    length = startend_row_indices.shape[2]
    query = paddle.arange(length, dtype="int32").reshape([1, 1, length, 1])
    key = paddle.arange(length, dtype="int32").reshape([1, 1, 1, length])
    end = startend_row_indices.transpose([0, 1, 3, 2])
    seen = (query >= key) & (query < end)
    return paddle.where(seen, paddle.zeros([1]), paddle.full([1], HIDDEN))

"""Attention of tokens that are added to an answer, over the keys and values of those before."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
from paddle.nn import functional as F

HIDDEN = -1e30
"""What is added to the score of a key that is not seen."""


class Seen:
    """What the ``count`` tokens that are new in each row see of the ``all_keys`` that there are with them: those before
    them that are no padding, int64 [B] on the left of each row, and within the last ``window``. All layers share it.

    Attributes:
        all_keys: How many keys there are.
        first: Where ``count`` is 1: the first key that the token of each row sees, int32 [B].
    """

    def __init__(self, padding: np.ndarray, all_keys: int, count: int, window: int | None) -> None:
        self.all_keys = all_keys
        begin = 0 if window is None else all_keys - window
        self.first = np.maximum(padding, begin).astype(np.int32)
        places, keys = np.arange(all_keys - count, all_keys), np.arange(all_keys)
        seen = (keys <= places[:, None]) & (keys >= padding[:, None, None])
        if window is not None:
            seen &= keys > places[:, None] - window
        self._hidden = None if seen.all() else np.where(seen, np.float32(0), np.float32(HIDDEN))[:, None, None]
        self._added: Any | None = None

    def added(self, kv_heads: int, share: int) -> Any | None:
        """What is added to scores [B, K, ``share`` · count, keys], K = ``kv_heads``; None where all is seen."""
        if self._added is None and self._hidden is not None:
            rows, _, _, count, keys = self._hidden.shape
            # Once for all layers, as large as scores are: to repeat it in an addition is slow.
            large = paddle.to_tensor(self._hidden).expand([rows, kv_heads, share, count, keys])
            self._added = large.reshape([rows, kv_heads, share * count, keys])
        return self._added


class KeptKeys:
    """The keys and values of one layer, [B, K, S, D]: those of the prompts, and of what was added."""

    def __init__(self, key: Any, value: Any) -> None:
        """Of prompts: [B, S, K, D]."""
        self._key, self._value = by_head(key), by_head(value)

    def attend(self, query: Any, key: Any, value: Any, seen: Seen, cap: float | None) -> Any:
        """Keep ``key`` and ``value`` [B, new, K, D] too; attention of ``query`` [B, new, H, D] → [B, new, H, D], with
        scores capped by ``cap`` as :meth:`sft.Kernels.attention` does it."""
        self._key = key = paddle.concat([self._key, by_head(key)], axis=2)
        self._value = value = paddle.concat([self._value, by_head(value)], axis=2)
        rows, count, heads, size = query.shape
        groups = key.shape[1]
        # Heads that share a key are rows of one matrix.
        query = (by_head(query) if count > 1 else query).reshape([rows, groups, -1, size]) * (1 / math.sqrt(size))
        scores = paddle.matmul(query, key, transpose_y=True).astype("float32")
        if cap is not None:
            scores = paddle.tanh(scores / cap) * cap
        added = seen.added(groups, heads // groups)
        if added is not None:
            scores = scores.add_(added)
        out = paddle.matmul(F.softmax(scores, axis=-1).astype(value.dtype), value)
        return out.reshape([rows, 1, heads, size]) if count == 1 else by_head(out.reshape([rows, heads, count, size]))


def by_head(x: Any) -> Any:
    """[B, S, heads, D] ↔ [B, heads, S, D]."""
    rows, first, second, size = x.shape
    return x.reshape([rows, second, first, size]) if 1 in (first, second) else x.transpose([0, 2, 1, 3])

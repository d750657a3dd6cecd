"""The forward pass of answers: prompts, and then token by token, over the keys and values of what came before."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
from paddle.nn import functional as F

from sft.models.architecture import ModelShape
from sft.models.kernels import PLAIN, Kernels
from sft.models.turning import tables

HIDDEN = -1e30
"""What is added to the score of a key that is not seen."""


class CachedReading:
    """Prompts, padded on the left to one length, and their answers: each call of the decoder takes the tokens that are
    new, and sees the keys and values of those before, which are kept here.

    ``padding`` int64 [B] is how many tokens on the left of each row are none.
    """

    positions: Any

    def __init__(self, architecture: ModelShape, padding: np.ndarray, kernels: Kernels = PLAIN) -> None:
        self._architecture, self._padding, self._kernels = architecture, padding, kernels
        self._kept: list[tuple[Any, Any] | None] = [None] * len(architecture.blocks)
        self._seen = 0
        self._tables: list[Any] = []
        self._masks: dict[int | None, Any] = {}
        self._whole: dict[int | None, Any] = {}

    def expect(self, count: int) -> None:
        """The next call brings ``count`` tokens a row."""
        first, self._seen = self._seen, self._seen + count
        places = np.arange(first, self._seen)
        positions = np.maximum(places[None] - self._padding[:, None], 0)
        self.positions = paddle.to_tensor(positions)
        lengths = np.broadcast_to((self._seen - self._padding)[:, None], positions.shape)
        self._tables = [tables(rotary, positions, lengths) for rotary in self._architecture.rotaries]
        windows = {block.window for block in self._architecture.blocks}
        self._whole = {window: self._kernels.mask(self._ends(window)) for window in windows} if not first else {}
        self._masks = {window: self._mask(places, window) for window in windows} if first else {}

    def _ends(self, window: int | None) -> np.ndarray:
        """Of prompts: int32 [B, 1, S, 1], as :class:`sft.Batch` has them. A token of padding sees itself: its softmax
        must not be empty, and nobody reads what comes of it."""
        places = np.arange(self._seen)
        ends = np.where(places < self._padding[:, None], places + 1, self._seen)
        ends = ends if window is None else np.minimum(ends, places + window)
        return ends.astype(np.int32)[:, None, :, None]

    def _mask(self, places: np.ndarray, window: int | None) -> Any | None:
        """What is added to scores of tokens at ``places``, [B, K, G · new, all]; None where all is seen."""
        keys = np.arange(self._seen)
        seen = (keys <= places[:, None]) & (keys >= self._padding[:, None, None])
        if window is not None:
            seen &= keys > places[:, None] - window
        if seen.all():
            return None
        hidden = np.where(seen, np.float32(0), np.float32(HIDDEN))[:, None, None]
        return paddle.to_tensor(hidden)

    @property
    def is_outgrown(self) -> bool:
        """Whether one more token makes a document so long that its rotary embedding is another one (longrope): then
        the keys that are kept stand for nothing, and all tokens have to be read again."""
        limits = {rotary.limit for rotary in self._architecture.rotaries if rotary.kind == "longrope"}
        return any((self._seen - self._padding == limit).any() for limit in limits)

    def turn(self, x: Any, rotary: int) -> Any:
        return self._kernels.rotate(x, self._architecture.rotaries[rotary], *self._tables[rotary])

    def attend(self, layer: int, query: Any, key: Any, value: Any) -> Any:
        window, cap = self._architecture.blocks[layer].window, self._architecture.attention_cap
        kept = self._kept[layer]
        if kept is None:
            self._kept[layer] = by_head(key), by_head(value)
            return self._kernels.attention(query, key, value, self._whole[window], cap)
        key, value = paddle.concat([kept[0], by_head(key)], axis=2), paddle.concat([kept[1], by_head(value)], axis=2)
        self._kept[layer] = key, value
        rows, count, heads, size = query.shape
        groups, seen = key.shape[1], key.shape[2]
        # Heads that share a key are rows of one matrix.
        query = (by_head(query) if count > 1 else query).reshape([rows, groups, -1, size]) * (1 / math.sqrt(size))
        scores = paddle.matmul(query, key, transpose_y=True).astype("float32")
        if cap is not None:
            scores = paddle.tanh(scores / cap) * cap
        mask = self._masks[window]
        if mask is not None:
            if mask.ndim == 5:  # once for all layers, as large as scores are: to repeat it in an addition is slow
                mask = mask.expand([rows, groups, heads // groups, count, seen]).reshape(scores.shape)
                self._masks[window] = mask
            scores = scores.add_(mask)
        out = paddle.matmul(F.softmax(scores, axis=-1).astype(value.dtype), value)
        return out.reshape([rows, 1, heads, size]) if count == 1 else by_head(out.reshape([rows, heads, count, size]))


def by_head(x: Any) -> Any:
    """[B, S, heads, D] ↔ [B, heads, S, D]."""
    rows, first, second, size = x.shape
    return x.reshape([rows, second, first, size]) if 1 in (first, second) else x.transpose([0, 2, 1, 3])

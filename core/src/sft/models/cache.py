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

QUERIES = 512
"""So many tokens of a prompt have their scores computed at a time."""


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

    def expect(self, count: int) -> None:
        """The next call brings ``count`` tokens a row."""
        first, self._seen = self._seen, self._seen + count
        places = np.arange(first, self._seen)
        positions = np.maximum(places[None] - self._padding[:, None], 0)
        self.positions = paddle.to_tensor(positions)
        lengths = np.broadcast_to((self._seen - self._padding)[:, None], positions.shape)
        self._tables = [tables(rotary, positions, lengths) for rotary in self._architecture.rotaries]
        keys = np.arange(self._seen)
        visible = (keys[None, None] <= places[:, None]) & (keys[None, None] >= self._padding[:, None, None])
        # A padding token sees itself: its softmax must not be empty, and nobody reads what comes of it.
        visible |= keys[None, None] == places[:, None]
        self._masks = {}
        for window in {block.window for block in self._architecture.blocks}:
            seen = visible if window is None else visible & (keys[None, None] > places[:, None] - window)
            self._masks[window] = None if seen.all() else paddle.to_tensor(seen[:, None])  # bool [B, 1, new, all]

    @property
    def is_outgrown(self) -> bool:
        """Whether one more token makes a document so long that its rotary embedding is another one (longrope): then
        the keys that are kept stand for nothing, and all tokens have to be read again."""
        limits = {rotary.limit for rotary in self._architecture.rotaries if rotary.kind == "longrope"}
        return any((self._seen - self._padding == limit).any() for limit in limits)

    def turn(self, x: Any, rotary: int) -> Any:
        return self._kernels.rotate(x, self._architecture.rotaries[rotary], *self._tables[rotary])

    def attend(self, layer: int, query: Any, key: Any, value: Any) -> Any:
        count, size = query.shape[1], query.shape[3]
        query, key, value = by_head(query / math.sqrt(size)), by_head(key), by_head(value)
        kept = self._kept[layer]
        if kept is not None:
            key, value = paddle.concat([kept[0], key], axis=2), paddle.concat([kept[1], value], axis=2)
        self._kept[layer] = (key, value)
        mask = self._masks[self._architecture.blocks[layer].window]
        if count <= QUERIES:
            return by_head(self._attended(query, key, value, mask))
        parts = []
        for start in range(0, count, QUERIES):
            rows = slice(start, start + QUERIES)
            parts.append(self._attended(query[:, :, rows], key, value, None if mask is None else mask[:, :, rows]))
        return by_head(paddle.concat(parts, axis=2))

    def _attended(self, query: Any, key: Any, value: Any, mask: Any | None) -> Any:
        """Scaled queries [B, H, new, D], keys and values [B, K, all, D], and which of these are seen → [B, H, new,
        D]."""
        rows, heads, count, size = query.shape
        groups, seen, cap = key.shape[1], key.shape[2], self._architecture.attention_cap
        # Heads that share a key are rows of one matrix.
        scores = paddle.matmul(query.reshape([rows, groups, -1, size]), key, transpose_y=True).astype("float32")
        if cap is not None:
            scores = paddle.tanh(scores / cap) * cap
        if mask is not None:
            scores = paddle.where(mask, scores.reshape([rows, heads, count, seen]), paddle.full([1], -1e30, "float32"))
            scores = scores.reshape([rows, groups, -1, seen])
        weights = F.softmax(scores, axis=-1).astype(value.dtype)
        return paddle.matmul(weights, value).reshape([rows, heads, count, size])


def by_head(x: Any) -> Any:
    """[B, S, heads, D] ↔ [B, heads, S, D]."""
    rows, first, second, size = x.shape
    return x.reshape([rows, second, first, size]) if 1 in (first, second) else x.transpose([0, 2, 1, 3])

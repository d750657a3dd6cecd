"""Exact masked attention on CPU, block of query rows by block, over the keys that the block can see.

Time follows the sum of squared segment lengths, extra memory is one block of scores: rows x seen keys for each
head, linear in the length of the row. No [S, S] tensor exists, forward or backward (which recomputes the block).
Rows of a batch that see the same range of keys share a block as long as that keeps it small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
import paddle

from sft import row_sums
from sft_attn_flashmask.masks import ColumnMask

BLOCK = 128
"""Query rows in a block."""
SHARED = 4 * BLOCK * BLOCK
"""Scores of one head that a block shared by several rows of a batch may have."""


def attention(query: Any, key: Any, value: Any, masks: list[ColumnMask] | None, cap: float | None = None) -> Any:
    """softmax(Q Kᵀ / √D + mask) V. query [B, S, H, D]; key, value [B, S, K, D], K divides H → [B, S, H, D].

    ``masks`` has one for each row of the batch; None means plain causal attention. A query that sees no key gets
    zeros. With ``cap``, scores s become cap · tanh(s / cap) before the mask.
    """
    batch, length = query.shape[:2]
    if masks is None:
        masks = [ColumnMask(np.full((1, length, 1), length, np.int32), causal=True)] * batch
    return _Blockwise.apply(query, key, value, masks, cap)


def _blocks(masks: list[ColumnMask]) -> Iterator[tuple[slice, list[tuple[slice, slice, np.ndarray | None]]]]:
    """Query rows, and for each run of batch rows that see the same keys: batch rows, keys, bool [b, heads, rows, keys]
    of what is not seen (None: all is)."""
    for start in range(0, masks[0].length, BLOCK):
        rows = slice(start, min(start + BLOCK, masks[0].length))
        tiles = [mask.tile(rows) for mask in masks]
        found = []
        for keys, run in groupby(range(len(tiles)), key=lambda number: tiles[number][0]):
            numbers = list(run)
            most = max(1, SHARED // (BLOCK * max(1, keys.stop - keys.start)))
            for first in range(numbers[0], numbers[-1] + 1, most):
                batch = slice(first, min(first + most, numbers[-1] + 1))
                found.append((batch, keys, _stack([masked for _, masked in tiles[batch]])))
        yield rows, found


def _stack(tiles: list[np.ndarray | None]) -> np.ndarray | None:
    shape = next((masked.shape for masked in tiles if masked is not None), None)
    if shape is None:
        return None
    return np.stack([np.zeros(shape, bool) if masked is None else masked for masked in tiles])


def _fold(x: Any, groups: int) -> Any:
    """[b, rows, K·G, D] → [b, K, G·rows, D]: query heads that share a key head become rows of it."""
    batch, rows, heads, size = x.shape
    return x.transpose([0, 2, 1, 3]).reshape([batch, heads // groups, groups * rows, size])


def _unfold(x: Any, rows: int) -> Any:
    """The inverse of :func:`_fold`."""
    return x.reshape([x.shape[0], -1, rows, x.shape[-1]]).transpose([0, 2, 1, 3])


def _scores(query: Any, key: Any, cap: float | None) -> Any:
    """Of folded, scaled queries [b, K, G·rows, D] and keys [b, K, keys, D], capped."""
    scores = paddle.matmul(query, key, transpose_y=True)
    return scores if cap is None else paddle.tanh(scores / cap) * cap


def _probabilities(scores: Any, masked: np.ndarray | None, groups: int) -> tuple[Any, Any]:
    """Softmax of ``scores`` [b, K, G·rows, keys], which it may change, and the sum of each row [b, K, G·rows, 1], by
    which what is made of them is to be divided: paddle's softmax loses small terms of long rows (1e-5 of 32,768). Rows
    that see nothing are 0."""
    if masked is None:
        weights = paddle.nn.functional.softmax(scores, axis=-1)
        return weights, row_sums(weights)

    def fold(per_head: np.ndarray) -> Any:
        tensor = paddle.to_tensor(per_head).astype(scores.dtype)
        if masked.shape[1] == 1:
            return tensor.tile([1, 1, groups, 1])
        return tensor.reshape([*scores.shape[:3], tensor.shape[3]])

    weights = paddle.nn.functional.softmax(
        scores.add_(fold(np.where(masked, np.float32(-1e30), np.float32(0)))), axis=-1
    )
    total = row_sums(weights)
    blind = masked.all(axis=-1, keepdims=True)
    return (weights * fold(~blind) if blind.any() else weights), total


class _Blockwise(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, masks: list[ColumnMask], cap: float | None) -> Any:
        groups, scale = query.shape[2] // key.shape[2], 1.0 / math.sqrt(query.shape[3])
        keys_first, values_first = (x.transpose([0, 2, 1, 3]) for x in (key, value))
        blocks = []
        for rows, tiles in _blocks(masks):
            parts = []
            for batch, keys, masked in tiles:
                q = query[batch, rows]
                if keys.stop == keys.start:
                    parts.append(paddle.zeros_like(q))
                    continue
                scores = _scores(_fold(q, groups) * scale, keys_first[batch, :, keys], cap)
                weights, total = _probabilities(scores, masked, groups)
                seen = paddle.matmul(weights, values_first[batch, :, keys]) / total
                parts.append(_unfold(seen, rows.stop - rows.start))
            blocks.append(paddle.concat(parts))
        output = paddle.concat(blocks, axis=1)
        ctx.save_for_backward(query, key, value, output)
        ctx.masks, ctx.cap = masks, cap
        ctx.wanted = [not x.stop_gradient for x in (query, key, value)]
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        query, key, value, output = ctx.saved_tensor()
        groups, scale = query.shape[2] // key.shape[2], 1.0 / math.sqrt(query.shape[3])
        keys_first, values_first = (x.transpose([0, 2, 1, 3]) for x in (key, value))
        key_grad, value_grad = paddle.zeros_like(keys_first), paddle.zeros_like(values_first)
        query_grads = []
        for rows, tiles in _blocks(ctx.masks):
            parts = []
            for batch, keys, masked in tiles:
                if keys.stop == keys.start:
                    parts.append(paddle.zeros_like(query[batch, rows]))
                    continue
                q, dy, y = (_fold(x[batch, rows], groups) for x in (query, upstream, output))
                q, k, v = q * scale, keys_first[batch, :, keys], values_first[batch, :, keys]
                scores = _scores(q, k, ctx.cap)
                bend = None if ctx.cap is None else 1.0 - (scores / ctx.cap) ** 2
                weights, total = _probabilities(scores, masked, groups)
                dy = dy / total
                value_grad[batch, :, keys] += paddle.matmul(weights, dy, transpose_x=True)
                slope = weights * (paddle.matmul(dy, v, transpose_y=True) - row_sums(dy * y))
                slope = slope if bend is None else slope * bend
                key_grad[batch, :, keys] += paddle.matmul(slope, q, transpose_x=True)
                parts.append(_unfold(paddle.matmul(slope, k) * scale, rows.stop - rows.start))
            query_grads.append(paddle.concat(parts))
        grads = (paddle.concat(query_grads, axis=1), *(x.transpose([0, 2, 1, 3]) for x in (key_grad, value_grad)))
        return tuple(grad if wanted else None for grad, wanted in zip(grads, ctx.wanted, strict=True))

"""Exact masked attention on CPU, block of query rows by block, over the keys that the block can see.

Time follows the sum of squared segment lengths, extra memory is one block of scores: rows x seen keys for each
head, linear in the length of the row. No [S, S] tensor exists, forward or backward (which recomputes the block).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle

from sft_attn_flashmask.masks import ColumnMask

BLOCK = 128


def attention(query: Any, key: Any, value: Any, indices: Any | None, causal: bool = True) -> Any:
    """softmax(Q Kᵀ / √D + mask) V. query [B, S, H, D]; key, value [B, S, K, D], K divides H → [B, S, H, D].

    ``indices`` as in :mod:`sft_attn_flashmask.masks`, or None for plain causal attention. A query that sees no
    key gets zeros.
    """
    batch, length = query.shape[:2]
    if indices is None:
        columns = np.full((batch, 1, length, 1), length, np.int32)
    else:
        columns = np.asarray(indices.numpy(), np.int32)
    return _Blockwise.apply(query, key, value, [ColumnMask(one, causal) for one in columns])


def _blocks(mask: ColumnMask) -> Iterator[tuple[slice, slice, np.ndarray | None]]:
    for start in range(0, mask.length, BLOCK):
        rows = slice(start, min(start + BLOCK, mask.length))
        keys, masked = mask.tile(rows)
        yield rows, keys, masked


def _fold(x: Any, groups: int) -> Any:
    """[rows, K·G, D] → [K, G·rows, D]: query heads that share a key head become rows of it."""
    rows, heads, size = x.shape
    return x.transpose([1, 0, 2]).reshape([heads // groups, groups * rows, size])


def _unfold(x: Any, groups: int, rows: int) -> Any:
    """The inverse of :func:`_fold`."""
    return x.reshape([x.shape[0] * groups, rows, x.shape[-1]]).transpose([1, 0, 2])


def _probabilities(query: Any, key: Any, masked: np.ndarray | None, groups: int) -> Any:
    """Softmax of folded, scaled queries [K, G·rows, D] over keys [K, keys, D]; rows that see nothing are 0."""
    scores = paddle.matmul(query, key, transpose_y=True)
    if masked is None:
        return paddle.nn.functional.softmax(scores, axis=-1)
    heads = scores.shape[0]
    if masked.shape[0] == 1:
        hidden = np.broadcast_to(np.tile(masked, (1, groups, 1)), scores.shape)
    else:
        hidden = masked.reshape(heads, groups * masked.shape[1], masked.shape[2])
    weights = paddle.nn.functional.softmax(
        scores + paddle.to_tensor(np.where(hidden, np.float32(-1e30), np.float32(0))), axis=-1
    )
    blind = hidden.all(axis=-1, keepdims=True)
    return weights * paddle.to_tensor(~blind).astype(weights.dtype) if blind.any() else weights


class _Blockwise(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, masks: list[ColumnMask]) -> Any:
        groups, scale = query.shape[2] // key.shape[2], 1.0 / math.sqrt(query.shape[3])
        rows_out = []
        for number, mask in enumerate(masks):
            keys_first, values_first = (x[number].transpose([1, 0, 2]) for x in (key, value))
            blocks = []
            for rows, keys, masked in _blocks(mask):
                q = _fold(query[number, rows], groups) * scale
                if keys.stop == keys.start:
                    blocks.append(paddle.zeros_like(query[number, rows]))
                    continue
                weights = _probabilities(q, keys_first[:, keys], masked, groups)
                out = paddle.matmul(weights, values_first[:, keys])
                blocks.append(_unfold(out, groups, rows.stop - rows.start))
            rows_out.append(paddle.concat(blocks))
        output = paddle.stack(rows_out)
        ctx.save_for_backward(query, key, value, output)
        ctx.masks = masks
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        query, key, value, output = ctx.saved_tensor()
        groups, scale = query.shape[2] // key.shape[2], 1.0 / math.sqrt(query.shape[3])
        grads: list[list[Any]] = [[], [], []]
        for number, mask in enumerate(ctx.masks):
            keys_first, values_first = (x[number].transpose([1, 0, 2]) for x in (key, value))
            key_grad, value_grad = paddle.zeros_like(keys_first), paddle.zeros_like(values_first)
            query_grads = []
            for rows, keys, masked in _blocks(mask):
                if keys.stop == keys.start:
                    query_grads.append(paddle.zeros_like(query[number, rows]))
                    continue
                q = _fold(query[number, rows], groups) * scale
                dy, y = (_fold(x[number, rows], groups) for x in (upstream, output))
                k, v = keys_first[:, keys], values_first[:, keys]
                weights = _probabilities(q, k, masked, groups)
                value_grad[:, keys] += paddle.matmul(weights, dy, transpose_x=True)
                slope = paddle.matmul(dy, v, transpose_y=True) - (dy * y).sum(axis=-1, keepdim=True)
                slope = weights * slope
                key_grad[:, keys] += paddle.matmul(slope, q, transpose_x=True)
                query_grads.append(_unfold(paddle.matmul(slope, k) * scale, groups, rows.stop - rows.start))
            for held, grad in zip(
                grads,
                (paddle.concat(query_grads), key_grad.transpose([1, 0, 2]), value_grad.transpose([1, 0, 2])),
                strict=True,
            ):
                held.append(grad)
        return tuple(paddle.stack(parts) for parts in grads)

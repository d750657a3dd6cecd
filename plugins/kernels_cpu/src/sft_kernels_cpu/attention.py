"""Attention within documents: no [S, S] tensor, and time that follows what is seen. Backward keeps the four tensors of
forward and two numbers for each query, from which it computes the scores again, a block at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle

import sft
from sft_kernels_cpu.tensors import dense, empty, learning

QUERIES = 64
"""In a block, at most; the native code's number."""


class Mask:
    """The blocks of queries of a batch, made once for all layers, forward and backward."""

    def __init__(self, ends: np.ndarray | None) -> None:
        """``ends`` int32 [B, 1, S, 1]: from which query row on a key is not seen. None: one document a row."""
        self.given = ends
        self.whole = ends is None or _rises(ends[:, 0, :, 0])
        self._shape: tuple[int, int] | None = None
        self.rest: Any = None
        """What other kernels made of the same ends, where they are needed."""

    def of(self, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The ends, int32 [B, S], and the blocks, int32 [n, 5]: row of the batch, first query, the one after the last,
        first key that is seen, and whether a document begins here."""
        if self._shape != (rows, length):
            if self.given is None:
                self._ends = np.full((rows, length), length, np.int32)
            else:
                self._ends = np.ascontiguousarray(np.broadcast_to(self.given[:, 0, :, 0], (rows, length)), np.int32)
            self._blocks = np.concatenate([_blocks(row, end) for row, end in enumerate(self._ends)])
            self._shape = (rows, length)
        return self._ends, self._blocks


def _rises(ends: np.ndarray) -> bool:
    """Whether each query sees itself and keys that follow each other, as documents and windows make it."""
    return bool((np.diff(ends, axis=1) >= 0).all() and (ends > np.arange(ends.shape[1])).all())


def _blocks(row: int, ends: np.ndarray) -> np.ndarray:
    places = np.arange(len(ends))
    first = np.searchsorted(ends, places, side="right")
    begins = first == places
    document = np.maximum.accumulate(np.where(begins, places, 0))
    starts = np.flatnonzero((places - document) % QUERIES == 0)
    stops = np.append(starts[1:], len(ends))
    columns = np.full_like(starts, row), starts, stops, first[starts], begins[starts]
    return np.stack(columns, axis=1).astype(np.int32)


def attention(query: Any, key: Any, value: Any, mask: Mask, cap: float, library: Any, rest: sft.Kernels) -> Any:
    """Of dense float32 tensors: query [B, S, H, D]; key, value [B, S, K, D] → [B, S, H, D]; ``cap`` 0 is none.
    Backward keeps queries and keys, and the other two as ``rest`` keeps things."""
    if learning(query, key, value):
        return _Attention.apply(query, key, value, mask, cap, library, rest)
    return _attended(query, key, value, mask, cap, library)[0]


class _Attention(paddle.autograd.PyLayer):
    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, value: Any, mask: Mask, cap: float, library: Any, rest: sft.Kernels
    ) -> Any:
        ctx.wants = [not one.stop_gradient for one in (query, key, value)]
        out, sizes = _attended(query, key, value, mask, cap, library)
        # Queries and keys as they are: of others the weights of backward would not be those of forward.
        ctx.save_for_backward(query, key, rest.kept(value), rest.kept(out), sizes)
        ctx.mask, ctx.cap, ctx.library, ctx.rest = mask, cap, library, rest
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        query, key, *kept, sizes = ctx.saved_tensor()
        value, out = (ctx.rest.restored(one) for one in kept)
        upstream = dense(upstream)
        rows, length, heads, size = query.shape
        ends, blocks = ctx.mask.of(rows, length)
        grads = [empty(one.shape) for one in (query, key, value)]
        parts = empty([2, *query.shape])
        done = ctx.library.attention_slope(
            *(one.data_ptr() for one in (query, key, value, out, upstream, sizes)),
            *(ends.ctypes.data, blocks.ctypes.data, len(blocks)),
            *(rows, length, heads, key.shape[2], size, 1.0 / math.sqrt(size), ctx.cap),
            *(one.data_ptr() for one in (*grads, parts)),
        )
        if not done:
            raise MemoryError("no memory for a block of attention")
        return tuple(grad if wanted else None for grad, wanted in zip(grads, ctx.wants, strict=True))


def _attended(query: Any, key: Any, value: Any, mask: Mask, cap: float, library: Any) -> tuple[Any, Any]:
    """The output, and what makes weights of scores, float32 [B, H, 2, S]: the greatest score, and the share of each."""
    rows, length, heads, size = query.shape
    ends, blocks = mask.of(rows, length)
    out, sizes = empty(query.shape), empty([rows, heads, 2, length])
    done = library.attention(
        *(one.data_ptr() for one in (query, key, value)),
        *(ends.ctypes.data, blocks.ctypes.data, len(blocks)),
        *(length, heads, key.shape[2], size, 1.0 / math.sqrt(size), cap),
        *(one.data_ptr() for one in (out, sizes)),
    )
    if not done:
        raise MemoryError("no memory for a block of attention")
    return out, sizes

"""Attention over the documents of a batch, by paddle's plain operations: its time follows the sum of their squared
lengths, its memory is linear in the batch, and no [S, S] tensor exists, forward or backward.

Documents of similar lengths are gathered into a bucket [n, W], where the shorter ones are followed by tokens that none
of theirs sees, as these come later. A bucket goes block by block of query rows, each over the keys that its rows can
see: one softmax a block, which backward computes again. Heads that share a key are rows of one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from sft.models.sums import row_sums
from sft.precision import no_casts

ROWS = 128
"""Query rows in a block."""
SHARED = 4 * ROWS * ROWS
"""Scores of one head that a block may have because several documents share it."""
HIDDEN = -1e30
"""What is added to a score that is not seen."""
OPERATIONS = ROWS * ROWS // 2
"""What the calls for a block cost, in scores of one head."""


class Documents:
    """What is known of a batch: where its documents begin, in buckets; and which rows of query, key and value these
    gather, made once for each number of heads."""

    def __init__(self, starts: np.ndarray, lengths: np.ndarray, window: int | None) -> None:
        """Documents ``starts`` int64 [d], in the numbering of all tokens of the batch, that are ``lengths`` int64 [d]
        long and follow each other without a gap; a query sees the last ``window`` tokens of its own."""
        self.tokens = int(lengths.sum())
        self.buckets = [
            _Bucket(_tokens(starts[numbers], lengths[numbers], width), lengths[numbers], _blocks(width, window))
            for width, numbers in _buckets(lengths, window)
        ]
        self._places: dict[tuple[int, int], _Places] = {}
        longest = max(block.keys.stop - block.keys.start for bucket in self.buckets for block in bucket.blocks)
        self.hidden = _Hidden(longest, window)

    def places(self, heads: int, shared: int) -> _Places:
        """For ``heads`` key heads, each of which ``shared`` query heads look at."""
        if (heads, shared) not in self._places:
            self._places[heads, shared] = _Places(self, heads, shared)
        return self._places[heads, shared]


def documents_of(ends: np.ndarray) -> Documents | None:
    """Of int32 [B, 1, S, 1] in the causal form of :class:`sft.AttentionBackend`, if it says no more than where
    documents, and perhaps windows of one size, end; else None."""
    rows, _, length, _ = ends.shape
    ends, places = ends[:, 0, :, 0], np.arange(length)
    begins = np.ones(ends.shape, bool)  # where no earlier token is seen any more
    begins[:, 1:] = np.maximum.accumulate(ends, axis=1)[:, :-1] <= places[1:]
    starts = np.flatnonzero(begins)
    lengths = np.diff(np.append(starts, rows * length))
    stops = np.repeat(starts % length + lengths, lengths).reshape(ends.shape)
    reaches = (ends - places)[ends < stops]
    window = int(reaches[0]) if reaches.size else None
    if (ends != (stops if window is None else np.minimum(stops, places + window))).any():
        return None
    return Documents(starts, lengths, window)


def rows_of(rows: int, length: int) -> Documents:
    """Rows that are one document each."""
    return Documents(np.arange(rows) * length, np.full(rows, length), None)


def document_attention(query: Any, key: Any, value: Any, documents: Documents, cap: float | None) -> Any:
    """softmax(Q Kᵀ / √D) V within documents, causal. query [B, S, H, D]; key, value [B, S, K, D], K divides H → like
    query. With ``cap``, scores s become cap · tanh(s / cap) before the mask. 16-bit tensors are computed in float32."""
    places = documents.places(key.shape[2], query.shape[2] // key.shape[2])
    with no_casts():
        if paddle.is_grad_enabled():
            return _DocumentAttention.apply(query, key, value, places, cap)
        return _forward(query, key, value, places, cap)


# --- buckets --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Query rows of each document of a bucket, and the range of keys that they see."""

    rows: slice
    keys: slice


@dataclass(frozen=True)
class _Bucket:
    """``tokens`` int64 [n, W]: the tokens of its documents; after the last of a document the last again."""

    tokens: np.ndarray
    lengths: np.ndarray
    blocks: list[_Block]

    @property
    def count(self) -> int:
        return len(self.lengths)


def _blocks(width: int, window: int | None) -> list[_Block]:
    found = []
    for start in range(0, width, ROWS):
        first = 0 if window is None else max(0, start - window + 1)
        stop = min(start + ROWS, width)
        found.append(_Block(slice(start, stop), slice(first, stop)))
    return found


def _tokens(starts: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    return starts[:, None] + np.minimum(np.arange(width), lengths[:, None] - 1)


def _buckets(lengths: np.ndarray, window: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """Buckets' widths and the numbers of their documents: those that cost the least together, counted in scores, where
    a bucket takes documents of neighbouring lengths, and as many as :data:`SHARED` allows."""
    order = np.argsort(lengths, kind="stable")
    sizes, firsts = np.unique(lengths[order], return_index=True)
    bounds = np.append(firsts, len(lengths))
    best, begins = np.zeros(len(sizes) + 1), np.zeros(len(sizes), int)
    costs = [_cost(_width(int(size)), window) for size in sizes]
    for number, (most, calls, scores) in enumerate(costs):
        counts = bounds[number + 1] - bounds[: number + 1]
        totals = best[: number + 1] + -(-counts // most) * calls + counts * scores
        begins[number] = totals.argmin()
        best[number + 1] = totals.min()
    end = len(sizes)
    while end:
        begin, width, most = begins[end - 1], _width(int(sizes[end - 1])), costs[end - 1][0]
        for first in range(bounds[begin], bounds[end], most):
            yield width, np.sort(order[first : min(first + most, bounds[end])])
        end = begin


def _width(length: int) -> int:
    """Above 16 a multiple of 8: of others :func:`row_sums` has to copy."""
    return length if length <= 16 else -(-length // 8) * 8


def _cost(width: int, window: int | None) -> tuple[int, int, int]:
    """How many documents of a width may share a bucket; what the bucket costs, and then each document, in scores."""
    blocks = [
        (block.rows.stop - block.rows.start) * (block.keys.stop - block.keys.start) for block in _blocks(width, window)
    ]
    return max(1, SHARED // max(blocks)), OPERATIONS * len(blocks), sum(blocks)


# --- rows that are gathered -----------------------------------------------------------------------------------


class _Hidden:
    """What is added to scores, for blocks of up to ``longest`` keys."""

    def __init__(self, longest: int, window: int | None) -> None:
        self._before, most = longest - 1, min(ROWS, longest)
        distance = np.arange(most)[:, None] - np.arange(-self._before, most)
        seen = (distance >= 0) & (distance < (window or longest + ROWS))
        self._table = paddle.to_tensor(np.where(seen, np.float32(0), np.float32(HIDDEN)).reshape(1, 1, 1, *seen.shape))

    def __call__(self, block: _Block) -> Any:
        """float32 [1, 1, 1, rows, keys]: to those of a block 0, or :data:`HIDDEN`."""
        shift = self._before - block.rows.start
        rows = block.rows.stop - block.rows.start
        return self._table[:, :, :, :rows, block.keys.start + shift : block.keys.stop + shift]


class _Places:
    """What the buckets' blocks gather from [tokens · heads, D], and where results are found in what they compute."""

    def __init__(self, documents: Documents, heads: int, shared: int) -> None:
        self.heads, self.shared = heads, shared
        # Not the documents, which hold this: in a circle both would outlive their batch.
        self.buckets, self.hidden = documents.buckets, documents.hidden
        every = heads * shared
        within = np.arange(every).reshape(1, heads, shared, 1)
        self.keys: list[Any] = []
        self.queries: list[list[Any]] = []
        self.upstream: list[list[Any]] = []
        key_places, query_places = np.empty(documents.tokens * heads, int), np.empty(documents.tokens * every, int)
        key_count = query_count = 0
        for bucket in documents.buckets:
            real = np.arange(bucket.tokens.shape[1]) < bucket.lengths[:, None]
            keys = bucket.tokens[:, None] * heads + np.arange(heads)[:, None]
            key_count = _invert(key_places, keys, real[:, None], key_count)
            self.keys.append(_index(keys))
            self.queries.append([])
            self.upstream.append([])
            for block in bucket.blocks:
                queries = bucket.tokens[:, None, None, block.rows] * every + within
                ours = real[:, None, None, block.rows]
                query_count = _invert(query_places, queries, ours, query_count)
                # What comes after a document has no gradient: it gathers a row of zeros behind the last.
                upstream = np.where(ours, queries, documents.tokens * every)
                index = _index(queries)
                self.queries[-1].append(index)
                self.upstream[-1].append(index if ours.all() else _index(upstream))
        self.key_results, self.query_results = _index(key_places), _index(query_places)

    def __iter__(self) -> Iterator[tuple[_Bucket, Any, list[tuple[_Block, Any, Any]]]]:
        for number, bucket in enumerate(self.buckets):
            blocks = zip(bucket.blocks, self.queries[number], self.upstream[number], strict=True)
            yield bucket, self.keys[number], list(blocks)


def _index(rows: np.ndarray) -> Any:
    return paddle.to_tensor(rows.ravel().astype(np.int32 if rows.max(initial=0) < 2**31 else np.int64))


def _invert(places: np.ndarray, gathered: np.ndarray, real: np.ndarray, first: int) -> int:
    """Note in ``places`` where the ``real`` ones of ``gathered`` are, counted from ``first``; returns what is next."""
    mask = np.broadcast_to(real, gathered.shape)
    places[gathered[mask]] = first + np.flatnonzero(mask)
    return first + gathered.size


# --- computing ------------------------------------------------------------------------------------------------


def _flat(x: Any) -> Any:
    """[..., D] of any float type → [rows, D]; 16 bits become float32."""
    flat = x.reshape([-1, x.shape[-1]])
    return flat.astype("float32") if flat.dtype in (paddle.float16, paddle.bfloat16) else flat


def _scores(query: Any, key: Any, cap: float | None) -> Any:
    scores = paddle.matmul(query, key, transpose_y=True)
    return scores if cap is None else paddle.tanh(scores / cap) * cap


def _weights(scores: Any, hidden: Any, shared: int) -> tuple[Any, Any]:
    """Softmax of scores [n, K, G·rows, keys], which become it, and its sum a row, by which what is made of it is to be
    divided: paddle's softmax loses small terms of long rows (1e-5 of 32,768)."""
    count, heads, rows, keys = scores.shape
    # Copies of the mask are added: on CPU an addition that repeats one of its terms takes ten times as long.
    spread = hidden.expand([count, heads, shared, rows // shared, keys]).reshape(scores.shape)
    scores.add_(spread.astype(scores.dtype))
    del spread
    weights = paddle.nn.functional.softmax_(scores, axis=-1)
    return weights, row_sums(weights)


def _forward(query: Any, key: Any, value: Any, places: _Places, cap: float | None) -> Any:
    size = query.shape[3]
    queries, keys, values = _flat(query) * (1 / math.sqrt(size)), _flat(key), _flat(value)

    def of_block(q: Any, k: Any, v: Any, hidden: Any) -> Any:
        weights, total = _weights(_scores(q, k, cap), hidden, places.shared)
        return (paddle.matmul(weights, v) / total).reshape([-1, size])

    def of_bucket(bucket: _Bucket, key_index: Any, blocks: list[tuple[_Block, Any, Any]]) -> Iterator[Any]:
        shape = [bucket.count, places.heads, -1, size]
        k, v = (paddle.gather(x, key_index).reshape(shape) for x in (keys, values))
        for block, index, _ in blocks:
            q, hidden = paddle.gather(queries, index).reshape(shape), places.hidden(block)
            yield of_block(q, k[:, :, block.keys], v[:, :, block.keys], hidden)

    found = paddle.concat([part for one in places for part in of_bucket(*one)])
    return paddle.gather(found, places.query_results).reshape(query.shape).astype(query.dtype)


def _backward_of_block(
    q: Any, k: Any, v: Any, y: Any, dy: Any, hidden: Any, shared: int, cap: float | None
) -> tuple[Any, Any, Any]:
    """Gradients of scaled queries, keys and values of a block, of output ``y`` and its gradient ``dy``."""
    scores = _scores(q, k, cap)
    bend = None if cap is None else (scores / cap).square_().scale_(-1.0, 1.0)
    weights, total = _weights(scores, hidden, shared)
    dy = dy / total
    value_grad = paddle.matmul(weights, dy, transpose_x=True)
    slope = paddle.matmul(dy, v, transpose_y=True).subtract_(row_sums(dy * y)).multiply_(weights)
    slope = slope if bend is None else slope.multiply_(bend)
    return paddle.matmul(slope, k), paddle.matmul(slope, q, transpose_x=True), value_grad


def _spread(x: Any, keys: slice, width: int) -> Any:
    """[n, K, keys, D] → [n, K, W, D], zeros elsewhere."""
    count, heads, _, size = x.shape
    gaps = [(keys.start, 0), (width - keys.stop, 1)]
    parts = [x]
    for gap, place in gaps:
        if gap:
            parts.insert(place * len(parts), paddle.zeros([count, heads, gap, size], x.dtype))
    return x if len(parts) == 1 else paddle.concat(parts, axis=2)


class _DocumentAttention(paddle.autograd.PyLayer):
    """Keeps its arguments and its result, and computes each block's softmax again."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, places: _Places, cap: float | None) -> Any:
        output = _forward(query, key, value, places, cap)
        ctx.save_for_backward(query, key, value, output)
        ctx.places, ctx.cap = places, cap
        ctx.wanted = [not x.stop_gradient for x in (query, key, value)]
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        query, key, value, output = ctx.saved_tensor()
        places, size = ctx.places, query.shape[3]
        scale = 1 / math.sqrt(size)
        queries, keys, values, outputs = _flat(query) * scale, _flat(key), _flat(value), _flat(output)
        slopes = _flat(upstream)
        slopes = paddle.concat([slopes, paddle.zeros([1, size], slopes.dtype)])
        found: list[list[Any]] = [[], [], []]
        for bucket, key_index, blocks in places:
            shape = [bucket.count, places.heads, -1, size]
            k, v = (paddle.gather(x, key_index).reshape(shape) for x in (keys, values))
            key_grad: Any = None
            value_grad: Any = None
            for block, index, upstream_index in blocks:
                q, y = (paddle.gather(x, index).reshape(shape) for x in (queries, outputs))
                dy, hidden = paddle.gather(slopes, upstream_index).reshape(shape), places.hidden(block)
                seen_k, seen_v = k[:, :, block.keys], v[:, :, block.keys]
                grads = _backward_of_block(q, seen_k, seen_v, y, dy, hidden, places.shared, ctx.cap)
                found[0].append(grads[0].reshape([-1, size]))
                more = [_spread(x, block.keys, k.shape[2]) for x in grads[1:]]
                if key_grad is None:
                    key_grad, value_grad = more
                else:
                    key_grad.add_(more[0])
                    value_grad.add_(more[1])
            found[1].append(key_grad.reshape([-1, size]))
            found[2].append(value_grad.reshape([-1, size]))
        where = (places.query_results, places.key_results, places.key_results)
        results: list[Any] = []
        for x, index, wanted in zip((query, key, value), where, ctx.wanted, strict=True):
            parts = paddle.concat(found.pop(0))
            results.append(paddle.gather(parts, index).reshape(x.shape) if wanted else None)
        if results[0] is not None:
            results[0] = results[0].scale_(scale)
        return tuple(None if grad is None else grad.astype(query.dtype) for grad in results)

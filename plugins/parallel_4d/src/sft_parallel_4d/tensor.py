"""Tensor parallelism (arXiv 1909.08053) and sequence parallelism (arXiv 2205.05198) over the decoder's Linear layers.

Attention and MLP of each block compute with a share of the heads and of the intermediate size: their Linears are plain
ones, of a part of the weight. Processes meet where a block enters and leaves attention and MLP alone, so a technique
that wraps or replaces a Linear has nothing to know, as long as its output is linear in the divided input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
from paddle.nn import functional as F

import sft
from sft import Batch
from sft.parallel import Part, mark_part, mark_sums, part_of
from sft_parallel_4d.fleet import drawing_apart, seed_apart
from sft_parallel_4d.internals import seed_now
from sft_parallel_4d.meeting import BlockMeeting, Columns
from sft_parallel_4d.model_size import KEYS, divided_side
from sft_parallel_4d.topology import Axis, among

LINEARS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
APART = "sft: apart"
"""The name, to paddle, of the state of draws that differ along the axis."""


class TensorParallel:
    """Divides a model along ``axis``; with ``sequence`` what lies between attention and MLP too."""

    def __init__(self, axis: Axis, sequence: bool, world: Axis) -> None:
        self._axis, self.sequence, self._world = axis, sequence, world
        self._alike = self._none = Axis(0, None)
        """Neighbours with the same key/value heads, which are fewer than the processes."""
        self._partial: set[int] = set()
        self.meeting = BlockMeeting(axis, sequence)
        self._draws = False

    # --- before there are weights ---

    def divide(self, model: Any) -> None:
        """Parts of the Linears of each block, of the embedding and of lm_head; nothing is allocated."""
        copies = max(1, self._axis.size // model.architecture.kv_heads)
        if copies > 1:
            first = self._axis.rank // copies * copies
            self._alike = among(self._world, self._axis, range(first, first + copies))
        for block in model.model.layers:
            for parent, name, side in _places(block):
                self._divide_linear(parent, name, side)
            self._divide_attention(block.self_attn)
        embedding, head = model.model.embed_tokens, model.lm_head
        tied = head.weight is embedding.weight
        stream = getattr(embedding, "stream", embedding.weight.dtype)
        vocabulary = Columns(self._axis, embedding.weight.shape[0])
        rows = _Rows(self._local(embedding.weight, 0), stream, vocabulary.start, self.meeting)
        model.model.embed_tokens = rows
        head.weight = rows.weight if tied else self._local(head.weight, 0 if head.transpose_y else 1)
        head.vocabulary = vocabulary

    def _divide_linear(self, parent: Any, name: str, side: str) -> None:
        linear = getattr(parent, name)
        axis, fused = (0, ()) if side == "in" else (1, _fused(parent, name))
        copies = self._alike.size if name in KEYS else 1
        mark_part(linear, self._part(tuple(linear.weight.shape), axis, fused, copies))
        if side == "in" and linear.bias is not None:
            setattr(parent, name, _Summand(linear, self._local(linear.weight, axis), self._axis.rank == 0))
            return
        linear.weight = self._local(linear.weight, axis, fused, copies)
        if linear.bias is not None:
            linear.bias = self._local(linear.bias, 0, fused, copies)

    def _divide_attention(self, attention: Any) -> None:
        attention.heads //= self._axis.size
        attention.kv_heads = max(1, attention.kv_heads // self._axis.size)
        if attention.head_norm == "all":
            for norm in (attention.q_norm, attention.k_norm):
                norm.weight = self._local(norm.weight, 0)
                norm.total = self.meeting.sum

    def _part(self, shape: tuple[int, ...], axis: int, fused: tuple[int, ...] = (), copies: int = 1) -> Part:
        return Part(shape, axis, self._axis.rank // copies, self._axis.size // copies, fused)

    def _local(self, parameter: Any, axis: int, fused: tuple[int, ...] = (), copies: int = 1) -> Any:
        """An unallocated parameter for this process's part of ``parameter``."""
        part = self._part(tuple(parameter.shape), axis, fused, copies)
        with paddle.LazyGuard():
            # A layer's, as paddle.create_parameter makes none of 16 bits.
            local = paddle.nn.Layer().create_parameter(list(part.local_shape), dtype=parameter.dtype)
        mark_part(local, part)
        local.stop_gradient = parameter.stop_gradient
        return local

    # --- weights, attention and adapters are there ---

    def connect(self, model: Any) -> None:
        """Let blocks work together."""
        model.model.meeting = self.meeting
        for block in model.model.layers:
            block.meeting = self.meeting
            for layer, side in adapters(block):
                mark_sums(layer, side, self._total_for(layer))
                if side == "in":
                    self._draw_apart(layer)
        self._partial = self._find_partial(model)

    def _total_for(self, layer: Any) -> Callable[[Any], Any]:
        """What sums over the parts of the Linear that ``layer`` stands over."""
        part = part_beneath(layer)
        if part is None or self._axis.copies(part) == 1:
            return self.meeting.total_of_parts
        share = float(self._axis.answers_for(part))  # each part once
        return lambda values: self.meeting.total_of_parts(values * share)

    def _draw_apart(self, adapter: Any) -> None:
        """Let dropout on a divided input draw for each part of it; elsewhere all processes drop the same."""
        for parent in adapter.sublayers(include_self=True):
            for name, dropout in list(parent.named_children()):
                if type(dropout) is paddle.nn.Dropout and dropout.p > 0:
                    setattr(parent, name, _DropoutApart(dropout))
                    self._draws = True

    def seed_dropout(self) -> None:
        """A step begins: what is drawn apart depends on its seed, which all of the axis have, and on the process."""
        if self._draws:
            seed = int(np.random.SeedSequence([seed_now(), self._axis.rank]).generate_state(1)[0])
            seed_apart(APART, seed)

    def summed_over(self, parameter: Any) -> Axis:
        """The processes whose gradients of ``parameter`` are summands of the whole one: all, of what each has whole and
        uses on its part of a product, or of the sequence; and those that have the same key/value heads."""
        part = part_of(parameter)
        if part is not None and self._axis.copies(part) > 1:
            return self._alike
        return self._axis if id(parameter) in self._partial else self._none

    def _find_partial(self, model: Any) -> set[int]:
        """The identities of parameters that are here whole, and whose gradients are summands."""
        found = set()
        for block in model.model.layers:
            inside = [block] if self.sequence else [block.self_attn, block.mlp]
            for layer in inside:
                found |= {id(p) for p in layer.parameters() if part_of(p) is None}
        if self.sequence:
            found |= {id(p) for p in model.model.norm.parameters()}
        return found

    def fit(self, batch: Batch) -> Batch:
        """``batch`` with a length that can be divided, if the sequence is."""
        if not self.sequence:
            return batch
        missing = -batch.input_ids.shape[1] % self._axis.size
        return padded(batch, missing) if missing else batch


def padded(batch: Batch, columns: int) -> Batch:
    """``batch`` with ``columns`` more of padding on the right, each token of which sees itself alone."""
    rows, length = batch.input_ids.shape
    more = ((0, 0), (0, columns))
    ends = np.arange(length + 1, length + columns + 1, dtype=np.int32)
    ends = np.broadcast_to(ends[None, None, :, None], (rows, 1, columns, 1))
    return replace(
        batch,
        input_ids=np.pad(batch.input_ids, more, mode="edge"),
        labels=np.pad(batch.labels, more, constant_values=-100),
        weights=None if batch.weights is None else np.pad(batch.weights, more),
        position_ids=np.pad(batch.position_ids, more),
        startend_row_indices=np.concatenate([batch.startend_row_indices, ends], axis=2),
    )


class _Rows(paddle.nn.Layer):
    """An embedding of which each process has a part of the rows, from ``start`` on; in place of an ``nn.Embedding``.
    ``stream`` is the dtype of what it gives."""

    def __init__(self, weight: Any, stream: Any, start: int, meeting: BlockMeeting) -> None:
        super().__init__()
        self.weight, self._stream, self._start, self._meeting = weight, stream, start, meeting

    def forward(self, tokens: Any) -> Any:
        return self._rows(tokens, self.weight, self._stream)

    def look_up(self, tokens: Any, matrix: Any) -> Any:
        """Rows of another ``matrix``, of which each process has the same part: int64 [B, S] → [B, S, r]."""
        return self._rows(tokens, matrix, matrix.dtype)

    def _rows(self, tokens: Any, matrix: Any, dtype: Any) -> Any:
        rows = matrix.shape[0]
        places = tokens - self._start
        here = ((places >= 0) & (places < rows)).unsqueeze(-1)
        found = F.embedding(places.clip(0, rows - 1), matrix).astype(dtype)
        return self._meeting.total(found * here.astype(found.dtype))


class _Summand(sft.Linear):
    """A Linear with a bias, divided by its inputs: one process adds the bias, to which gradients flow in all."""

    def __init__(self, whole: Any, weight: Any, adds: bool) -> None:
        paddle.nn.Layer.__init__(self)  # not that of Linear, which would make parameters
        self.weight, self.bias, self.name = weight, whole.bias, None
        mark_part(self, part_of(whole))
        self._share = float(adds)

    @property
    def added_bias(self) -> Any:
        """Of :func:`sft.linear_bias`."""
        return self.bias * self._share

    def forward(self, x: Any) -> Any:
        return self.kernels.linear(x, self.weight) + self.added_bias


class _DropoutApart(paddle.nn.Dropout):
    """Dropout that draws something else in each process of the axis."""

    def __init__(self, like: Any) -> None:
        super().__init__(like.p, axis=like.axis, mode=like.mode)
        self.training = like.training

    def forward(self, x: Any) -> Any:
        if not self.training:
            return x
        with drawing_apart(APART):
            return super().forward(x)


def _places(block: Any) -> Iterator[tuple[Any, str, str]]:
    """Where a block has its Linears: parent, name, and the side of the Linear that is divided."""
    parents = [block.self_attn, block.mlp]
    if hasattr(block.mlp, "experts"):
        parents = [block.self_attn, *block.mlp.experts, *filter(None, [getattr(block.mlp, "shared_expert", None)])]
    for parent in parents:
        for name in LINEARS:
            if hasattr(parent, name):
                yield parent, name, divided_side(name)


def _fused(parent: Any, name: str) -> tuple[int, ...]:
    """How many outputs each of the matrices has that lie in one Linear; () where it is one matrix."""
    if name == "qkv_proj":
        key = parent.kv_heads * parent.head_size
        return parent.heads * parent.head_size, key, key
    if name == "gate_up_proj":
        half = int(parent.gate_up_proj.weight.shape[1]) // 2
        return half, half
    return ()


def part_beneath(layer: Any) -> Part | None:
    """The part of the Linear that an adapter ``layer`` stands over; None where that is whole, or none of a block."""
    return next((part for part in map(part_of, layer.sublayers()) if part is not None), None)


def outer_adapters(model: Any) -> list[tuple[Any, str]]:
    """What stands in the places of the embedding and of lm_head, with the side that is the vocabulary."""
    places = [(model.model.embed_tokens, "in"), (model.lm_head, "out")]
    return [(layer, side) for layer, side in places if hasattr(layer, "sides")]


def adapters(block: Any) -> Iterator[tuple[Any, str]]:
    """Layers that stand at the place of a Linear and are more than that, with the divided side of their Linear."""
    for parent, name, side in _places(block):
        layer = getattr(parent, name)
        if not isinstance(layer, paddle.nn.Linear) and not hasattr(layer, "dequantize"):
            yield layer, side

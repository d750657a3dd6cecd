"""Tensor parallelism (arXiv 1909.08053) and sequence parallelism (arXiv 2205.05198) over ordinary Linear layers.

Attention and MLP of each block compute with a share of the heads and of the intermediate size: their Linears are plain
ones, of a part of the weight. Processes meet where a block enters and leaves attention and MLP alone, so a technique
that wraps or replaces a Linear has nothing to know, as long as its output is linear in the divided input.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
from paddle.autograd import PyLayer
from paddle.distributed.fleet.layers.mpu.random import get_rng_state_tracker

from sft import Batch, UsageError
from sft.distributed.parts import Part, part_of
from sft.training.loss import Vocabulary
from sft_parallel_4d.model_size import divided_side
from sft_parallel_4d.topology import Axis

LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
APART = "sft: apart"
"""The name, to paddle, of the state of draws that differ along the axis."""
SEQUENCE = 1
"""The dimension of [B, S, hidden] that sequence parallelism divides."""


class _Crossing(PyLayer):
    """x → ``there(x)``, and its gradient → ``back(gradient)``: where processes meet, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Any, there: Callable[[Any], Any], back: Callable[[Any], Any]) -> Any:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        return ctx.back(upstream)


class _Columns(Vocabulary):
    """The logits of a part of the vocabulary."""

    def __init__(self, axis: Axis, start: int) -> None:
        self._axis, self.start = axis, start

    def maximum(self, values: Any) -> Any:
        return self._axis.maximum(values.clone())

    def total(self, values: Any) -> Any:
        return self._axis.sum(values.clone())


class TensorParallel:
    """Divides a model along ``axis``; with ``sequence`` what lies between attention and MLP too, while it is
    ``active`` (in training and evaluation; answers come token by token)."""

    def __init__(self, axis: Axis, sequence: bool) -> None:
        self._axis, self.sequence = axis, sequence
        self.active = False
        self._draws = False

    # --- before there are weights ---

    def divide(self, model: Any) -> None:
        """Parts of the Linears of each block, of the embedding and of lm_head; nothing is allocated."""
        backbone = getattr(model, model.base_model_prefix)
        for block in backbone.layers:
            attention = block.self_attn
            attention.num_heads //= self._axis.size
            attention.num_key_value_heads //= self._axis.size
            for parent, name, side in _places(block):
                self._divide_linear(parent, name, 0 if side == "in" else 1)
        tied = model.lm_head.weight is backbone.embed_tokens.weight
        self._divide_embedding(backbone.embed_tokens)
        self._divide_head(model.lm_head, backbone.embed_tokens.weight if tied else None)

    def _part(self, shape: tuple[int, ...], axis: int) -> Part:
        return Part(shape, axis, self._axis.rank, self._axis.size)

    def _local(self, parameter: Any, axis: int) -> Any:
        """An unallocated parameter for this process's part of ``parameter``."""
        part = self._part(tuple(parameter.shape), axis)
        shape = [where.stop - where.start for where in part.where]
        with paddle.LazyGuard():
            local = paddle.create_parameter(shape, dtype=parameter.dtype)
        local.sft_part = part
        local.stop_gradient = parameter.stop_gradient
        return local

    def _divide_linear(self, parent: Any, name: str, axis: int) -> None:
        linear = getattr(parent, name)
        linear.sft_part = self._part(tuple(linear.weight.shape), axis)
        linear.weight = self._local(linear.weight, axis)
        if linear.bias is not None:
            if axis == 0:
                raise UsageError(f"{name} has a bias, which tensor parallelism would add once a process.")
            linear.bias = self._local(linear.bias, 0)

    def _divide_embedding(self, embedding: Any) -> None:
        embedding.weight = self._local(embedding.weight, 0)
        embedding.forward = types.MethodType(self._embed, embedding)

    def _embed(self, embedding: Any, tokens: Any) -> Any:
        rows = embedding.weight.shape[0]
        places = tokens - self._axis.rank * rows
        here = ((places >= 0) & (places < rows)).unsqueeze(-1)
        found = paddle.nn.functional.embedding(places.clip(0, rows - 1), embedding.weight)
        return self._sum(found * here.astype(found.dtype))

    def _divide_head(self, head: Any, tied: Any | None) -> None:
        axis = 0 if getattr(head, "transpose_y", False) else 1
        head.weight = self._local(head.weight, axis) if tied is None else tied
        head.sft_vocabulary = _Columns(self._axis, self._axis.rank * head.weight.shape[axis])
        head.forward = types.MethodType(self._logits, head)

    def _logits(self, head: Any, hidden: Any, *_: Any, **__: Any) -> Any:
        """For answers: the logits of the whole vocabulary."""
        transposed = bool(getattr(head, "transpose_y", False))
        return self._axis.gather(paddle.matmul(hidden, head.weight, transpose_y=transposed), -1)

    # --- weights, attention and adapters are there ---

    def connect(self, model: Any, first: bool, last: bool) -> None:
        """Let blocks work together. ``first``, ``last``: whether the model's first, its last block is here."""
        backbone = getattr(model, model.base_model_prefix)
        blocks = list(backbone.layers)
        for block in blocks:
            for layer, side in adapters(block):
                layer.sft_sums = {side: self._sum_within}
                if side == "in":
                    self._draw_apart(layer)
            _around(block.self_attn, self._enter, self._leave)
            _around(block.mlp, self._enter, self._leave)
        if self.sequence and first:
            _around(blocks[0], self._split, None)
        if self.sequence and last:
            _around(backbone.norm, None, self._join)

    def _draw_apart(self, layer: Any) -> None:
        """Let dropout on a divided input draw for each part of it; elsewhere all processes drop the same."""
        for dropout in layer.sublayers():
            if isinstance(dropout, paddle.nn.Dropout) and dropout.p > 0:
                own = dropout.forward

                def forward(x: Any, layer: Any = dropout, own: Callable[[Any], Any] = own) -> Any:
                    if not layer.training:
                        return x
                    with get_rng_state_tracker().rng_state(APART):
                        return own(x)

                dropout.forward = forward
                self._draws = True

    def seed_dropout(self) -> None:
        """A step begins: what is drawn apart depends on its seed and on the process."""
        if self._draws:
            common = int(paddle.randint(0, 2**31 - 1, [1], "int64"))  # the same in all processes of the axis
            seed = int(np.random.SeedSequence([common, self._axis.rank]).generate_state(1)[0])
            tracker = get_rng_state_tracker()
            if APART not in tracker.states_:  # once: paddle keeps each state that was ever added
                tracker.add(APART, seed)
            with tracker.rng_state(APART):
                paddle.seed(seed)

    def _enter(self, x: Any) -> Any:
        """What all have (or each a part of) → the same for all, whose gradients add up."""
        if self.sequence and self.active:
            return _Crossing.apply(x, self._gather, self._sum_own)
        return _Crossing.apply(x, lambda x: x.clone(), lambda gradient: self._axis.sum(gradient.clone()))

    def _leave(self, x: Any) -> Any:
        """Summands → their sum for all (or for each a part)."""
        return _Crossing.apply(x, self._sum_own, self._gather) if self.sequence and self.active else self._sum(x)

    def _split(self, x: Any) -> Any:
        """What all have → each its part of the sequence."""
        return _Crossing.apply(x, self._own, self._gather) if self.active else x

    def _join(self, x: Any) -> Any:
        """Parts of the sequence → the whole for all, who compute the same with it."""
        return _Crossing.apply(x, self._gather, self._own) if self.active else x

    def _sum(self, x: Any) -> Any:
        return _Crossing.apply(x, lambda x: self._axis.sum(x.clone()), lambda gradient: gradient)

    def _sum_within(self, x: Any) -> Any:
        """Summands → their sum for all, each of whom computes something else with it: their gradients add up, too."""
        return _Crossing.apply(
            x, lambda x: self._axis.sum(x.clone()), lambda gradient: self._axis.sum(gradient.clone())
        )

    def _gather(self, x: Any) -> Any:
        return self._axis.gather(x, SEQUENCE)

    def _own(self, x: Any) -> Any:
        return self._axis.own(x, SEQUENCE)

    def _sum_own(self, x: Any) -> Any:
        return self._axis.sum_own(x, SEQUENCE)

    def partial(self, model: Any) -> set[int]:
        """The identities of parameters whose gradients here are summands of the whole ones: those that each process has
        whole and uses on its part of a product, or of the sequence."""
        backbone = getattr(model, model.base_model_prefix)
        found = set()
        for block in backbone.layers:
            inside = [block] if self.sequence else [block.self_attn, block.mlp]
            for layer in inside:
                found |= {id(p) for p in layer.parameters() if part_of(p) is None}
        if self.sequence:
            found |= {id(p) for p in backbone.norm.parameters()}
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
        position_ids=np.pad(batch.position_ids, more),
        startend_row_indices=np.concatenate([batch.startend_row_indices, ends], axis=2),
    )


def _around(layer: Any, before: Callable[[Any], Any] | None, after: Callable[[Any], Any] | None) -> None:
    """Put ``before`` in front of a layer's first argument, and ``after`` behind its (first) result."""
    own = layer.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        if before is not None and arguments:
            arguments = (before(arguments[0]), *arguments[1:])
        elif before is not None:
            named["hidden_states"] = before(named["hidden_states"])
        result = own(*arguments, **named)
        if after is None:
            return result
        return (after(result[0]), *result[1:]) if isinstance(result, tuple) else after(result)

    layer.forward = forward


def _places(block: Any) -> Iterator[tuple[Any, str, str]]:
    """Where a block has its Linears: parent, name, and the side of the Linear that is divided."""
    for where, names in LINEARS.items():
        for name in names:
            yield getattr(block, where), name, divided_side(name)


def adapters(block: Any) -> Iterator[tuple[Any, str]]:
    """Layers that stand at the place of a Linear and are more than that, with the divided side of their Linear."""
    for parent, name, side in _places(block):
        layer = getattr(parent, name)
        if not isinstance(layer, paddle.nn.Linear) and not hasattr(layer, "dequantize"):
            yield layer, side

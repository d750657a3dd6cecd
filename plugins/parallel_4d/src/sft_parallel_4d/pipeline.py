"""Pipeline parallelism: each stage has some of the blocks, and micro-batches go through them by fleet's schedules
(``fleet.py``): one forward, one backward, or interleaved where a stage has several parts of the model, not one.

Stages are the ordinary decoder with the blocks of other stages left out, so names, adapters and attention are
those of one process. What goes from part to part is the residual stream, of a shape that both ends know from the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import paddle

from sft import Batch
from sft.parallel import mark_stage, stage_of
from sft_parallel_4d.fleet import Schedule
from sft_parallel_4d.meeting import BlockMeeting
from sft_parallel_4d.model_size import cut
from sft_parallel_4d.topology import Axis


class Pipeline:
    """The stage of this process along ``axis``. Of the model's parts, which follow each other from stage to stage, each
    stage has ``chunks``.

    Attributes:
        first: Whether the first part of the model is here; while a chunk computes, whether it is that.
        last: Likewise.
    """

    def __init__(self, axis: Axis, blocks: int, chunks: int = 1) -> None:
        self._axis, self._chunks = axis, chunks
        parts = axis.size * chunks
        bounds = cut(blocks, parts)
        where = [part for part in range(parts) for _ in range(bounds[part], bounds[part + 1])]
        self._stages, self._chunk_of = [part % axis.size for part in where], [part // axis.size for part in where]
        self.first, self.last = axis.rank == 0, axis.rank == axis.size - 1
        self._tied_weight: Any = None
        """Of a model whose lm_head is the embedding."""

    # --- what is here ---

    def divide(self, model: Any) -> None:
        """Mark the parameters of other stages; nothing is allocated."""
        backbone = model.model
        places = [(block, self._stages[number]) for number, block in enumerate(backbone.layers)]
        places += [(backbone.embed_tokens, 0), (backbone.norm, self._axis.size - 1)]
        places += [(model.lm_head, self._axis.size - 1)]
        for layer, stage in places:
            for marked in (*layer.sublayers(include_self=True), *layer.parameters()):
                mark_stage(marked, stage, here=stage == self._axis.rank)
        if model.lm_head.weight is backbone.embed_tokens.weight:
            # The last loop took it for lm_head's: it is in the first stage, and in the last.
            mark_stage(backbone.embed_tokens.weight, 0, here=self.first or self.last)
            self._tied_weight = backbone.embed_tokens.weight

    def is_tied(self, parameter: Any) -> bool:
        """Whether the first and the last stage have this parameter, as embedding and as lm_head."""
        return parameter is self._tied_weight

    def stage_of(self, marked: Any) -> int:
        """The stage that holds a parameter (the first one, of a tied matrix) or a Linear."""
        return stage_of(marked) or 0

    def leave_out(self, model: Any, meeting: BlockMeeting | None) -> None:
        """Take the layers of other stages out of ``model``, whose blocks meet at ``meeting`` if they are divided."""
        backbone = model.model
        for number, stage in enumerate(self._stages):
            if stage != self._axis.rank:
                del backbone.layers._sub_layers[str(number)]
        if not self.first and not (self.last and self._tied_weight is not None):
            del backbone._sub_layers["embed_tokens"]
        if not self.last:
            backbone.norm = paddle.nn.Identity()
            del model._sub_layers["lm_head"]
        self._model, self._meeting = model, meeting
        own = backbone.layers._sub_layers
        self._no_norm = paddle.nn.Identity()
        self._runs = [paddle.nn.LayerList() for _ in range(self._chunks)]
        for name, block in own.items():
            self._runs[self._chunk_of[int(name)]]._sub_layers[name] = block

    @contextlib.contextmanager
    def _at(self, chunk: int) -> Iterator[None]:
        """Within it, the model has the blocks of this chunk alone, and its ends where they are its."""
        backbone, first, last = self._model.model, self.first, self.last
        blocks, norm = backbone.layers, backbone.norm
        self.first, self.last = first and chunk == 0, last and chunk == self._chunks - 1
        backbone.layers = self._runs[chunk]
        if self._meeting is not None:
            self._meeting.first, self._meeting.last = self.first, self.last
        if last and not self.last:
            backbone.norm = self._no_norm
        try:
            yield
        finally:
            self.first, self.last = first, last
            backbone.layers, backbone.norm = blocks, norm

    # --- a step ---

    @cached_property
    def _schedule(self) -> Schedule:
        return Schedule(self._axis.size, self._chunks, self._go, self._go_back)

    @property
    def least(self) -> int:
        """The fewest micro-batches of a step, if there are any."""
        return self._schedule.least

    def train(
        self, batches: Sequence[Batch], shape: Callable[[Batch], list[int]], dtype: str,
        forward: Callable[[Batch, Any], Any], backward: Callable[[Any, Batch, Any], None],
    ) -> None:  # fmt: skip
        """Forward and backward of ``batches``: ``forward(batch, received)`` gives what the next part gets, of
        ``shape(batch)`` (in the last part: the loss). ``backward(output, batch, gradient)`` goes back from there, with
        the ``gradient`` of what the next part got (in the last one: None)."""
        if batches:
            self._begin(batches, forward)
            self._backward = backward
            self._schedule.train([shape(batch) for batch in batches], dtype)

    def measure(
        self, batches: Sequence[Batch], shape: Callable[[Batch], list[int]], dtype: str,
        forward: Callable[[Batch, Any], Any],
    ) -> None:  # fmt: skip
        """Forward alone, without gradients; what it gives in the last part is not looked at."""
        if batches:
            self._begin(batches, lambda batch, received: self._sent(forward(batch, received)))
            self._schedule.measure([shape(batch) for batch in batches], dtype)

    def _sent(self, output: Any) -> Any:
        return paddle.zeros([]) if self.last else output

    def _begin(self, batches: Sequence[Batch], forward: Callable[[Batch, Any], Any]) -> None:
        self._forward = forward
        self._coming, self._returning = ([iter(batches) for _ in range(self._chunks)] for _ in range(2))

    def _go(self, chunk: int, received: Any) -> Any:
        with self._at(chunk):
            output = self._forward(next(self._coming[chunk]), received)
        if paddle.is_grad_enabled():
            output.stop_gradient = False  # where nothing trains yet, too: the next part sends a gradient all the same
        return output

    def _go_back(self, chunk: int, output: Any, gradient: Any) -> None:
        self._backward(output, next(self._returning[chunk]), gradient)

    # --- answers ---

    @contextlib.contextmanager
    def answering(self, dtype: str) -> Iterator[None]:
        """Within it, the model computes in all stages at once, each of which gets the logits: a token is known to all
        when the next is due. ``dtype`` is that of the residual stream."""
        model, own = self._model, self._model.hidden_states
        head, embed, first = getattr(model, "lm_head", None), model.embed, self.first

        def hidden_states(hidden: Any, reading: Any) -> Any:
            for chunk in range(self._chunks):
                with self._at(chunk):
                    if not self.first:
                        self._axis.exchange([], [(hidden, (self._axis.rank - 1) % self._axis.size)])
                    hidden = own(hidden, reading).astype(dtype)
                    if not self.last:
                        self._axis.exchange([(hidden, (self._axis.rank + 1) % self._axis.size)], [])
            return hidden

        def embedded(tokens: Any) -> Any:
            size = [*tokens.shape, model.architecture.hidden]
            return embed(tokens) if first else paddle.empty(size, dtype=dtype)

        model.embed, model.hidden_states = embedded, hidden_states
        model.lm_head = _EveryHead(head, self._axis, model.architecture.vocabulary)
        try:
            yield
        finally:
            del model.embed, model.hidden_states, model.lm_head
            if head is not None:
                model.lm_head = head


class _EveryHead(paddle.nn.Layer):
    """lm_head in all stages, of which the last has it."""

    def __init__(self, head: Any | None, axis: Axis, columns: int) -> None:
        super().__init__()
        self._head, self._axis, self._columns = head, axis, columns

    def forward(self, hidden: Any) -> Any:
        """[..., hidden], which counts in the last stage alone → logits float32 [..., V]."""
        if self._head is None:
            logits = paddle.empty([*hidden.shape[:-1], self._columns], dtype="float32")
        else:
            logits = self._head(hidden).astype("float32")
        return self._axis.broadcast(logits, self._axis.size - 1)

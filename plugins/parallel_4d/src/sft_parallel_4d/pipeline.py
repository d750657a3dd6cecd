"""Pipeline parallelism: each stage has some of the blocks, and micro-batches go through them one forward, one backward
(1F1B; arXiv 1811.06965, 2104.04473).

Stages are the ordinary decoder with the blocks of other stages left out, so names, adapters and attention are
those of one process. What goes from stage to stage is the residual stream, of a shape that both know from the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import paddle

from sft import Batch
from sft.parallel import mark_stage, stage_of
from sft_parallel_4d.model_size import cut
from sft_parallel_4d.topology import Axis


class Pipeline:
    """The stage of this process along ``axis``."""

    def __init__(self, axis: Axis, blocks: int) -> None:
        self._axis = axis
        bounds = cut(blocks, axis.size)
        self._stages = [stage for stage in range(axis.size) for _ in range(bounds[stage], bounds[stage + 1])]
        self.first, self.last = axis.rank == 0, axis.rank == axis.size - 1
        self.tied = False
        self._tied_weight: Any = None

    # --- what is here ---

    def divide(self, model: Any) -> None:
        """Mark the parameters of other stages; nothing is allocated."""
        backbone = model.model
        self.tied = model.lm_head.weight is backbone.embed_tokens.weight
        places = [(block, self._stages[number]) for number, block in enumerate(backbone.layers)]
        places += [(backbone.embed_tokens, 0), (backbone.norm, self._axis.size - 1)]
        places += [(model.lm_head, self._axis.size - 1)]
        for layer, stage in places:
            for marked in (*layer.sublayers(include_self=True), *layer.parameters()):
                mark_stage(marked, stage, here=stage == self._axis.rank)
        if self.tied:  # the last loop took it for lm_head's: it is in the first stage, and in the last
            mark_stage(backbone.embed_tokens.weight, 0, here=self.first or self.last)
            self._tied_weight = backbone.embed_tokens.weight

    def is_tied(self, parameter: Any) -> bool:
        """Whether the first and the last stage have this parameter, as embedding and as lm_head."""
        return parameter is self._tied_weight

    def stage_of(self, marked: Any) -> int:
        """The stage that holds a parameter (the first one, of a tied matrix) or a Linear."""
        return stage_of(marked) or 0

    def blocks(self, model: Any) -> Iterator[tuple[Any, int]]:
        """The blocks of the whole model and their stages, while all are there."""
        backbone = model.model
        return zip(backbone.layers, self._stages, strict=True)

    def leave_out(self, model: Any) -> None:
        """Take the layers of other stages out of ``model``."""
        backbone = model.model
        for number, stage in enumerate(self._stages):
            if stage != self._axis.rank:
                del backbone.layers._sub_layers[str(number)]
        if not self.first and not (self.last and self.tied):
            del backbone._sub_layers["embed_tokens"]
        if not self.last:
            backbone.norm = paddle.nn.Identity()
            del model._sub_layers["lm_head"]

    # --- a step ---

    def train(
        self, batches: Sequence[Batch], shape: Callable[[Batch], list[int]], dtype: str,
        forward: Callable[[Batch, Any], Any], backward: Callable[[Any, Batch], None],
    ) -> None:  # fmt: skip
        """Forward and backward of ``batches``: ``forward(batch, received)`` gives what the next stage gets, of
        ``shape(batch)`` (in the last stage: the loss, from which ``backward(loss, batch)`` begins)."""
        count, stage, stages = len(batches), self._axis.rank, self._axis.size
        before, after = (stage - 1 if not self.first else None), (stage + 1 if not self.last else None)
        open_: deque[tuple[Batch, Any, Any]] = deque()

        def receives(batch: Batch | None) -> Any:
            if batch is None or before is None:
                return None
            return paddle.empty(shape(batch), dtype=dtype)

        def meet(sends: list[tuple[Any, int | None]], takes: list[tuple[Any, int | None]]) -> None:
            self._axis.exchange(
                [(tensor, place) for tensor, place in sends if tensor is not None and place is not None],
                [(tensor, place) for tensor, place in takes if tensor is not None and place is not None],
            )

        def go(batch: Batch, received: Any) -> Any:
            if received is not None:
                received.stop_gradient = False
            output = forward(batch, received)
            open_.append((batch, received, output))
            return output.detach() if after is not None else None

        def back(upstream: Any) -> Any:
            batch, received, output = open_.popleft()
            if after is None:
                backward(output, batch)
            elif not output.stop_gradient:
                paddle.autograd.backward([output], [upstream])
            if received is None:
                return None
            return received.grad if received.grad is not None else paddle.zeros_like(received)

        def gradient() -> Any:
            return paddle.empty(shape(open_[0][0]), dtype=dtype) if after is not None else None

        ahead = min(stages - stage - 1, count)
        for batch in batches[:ahead]:
            received = receives(batch)
            meet([], [(received, before)])
            meet([(go(batch, received), after)], [])
        received = receives(batches[ahead]) if ahead < count else None
        meet([], [(received, before)])
        for number in range(ahead, count):
            sent = go(batches[number], received)
            upstream = gradient()
            meet([(sent, after)], [(upstream, after)])
            downstream = back(upstream)
            received = receives(batches[number + 1]) if number + 1 < count else None
            meet([(downstream, before)], [(received, before)])
        for _ in range(ahead):
            upstream = gradient()
            meet([], [(upstream, after)])
            meet([(back(upstream), before)], [])

    def measure(
        self, batches: Sequence[Batch], shape: Callable[[Batch], list[int]], dtype: str,
        forward: Callable[[Batch, Any], Any],
    ) -> None:  # fmt: skip
        """Forward alone, without gradients."""
        for batch in batches:
            received = None
            if not self.first:
                received = paddle.empty(shape(batch), dtype=dtype)
                self._axis.exchange([], [(received, self._axis.rank - 1)])
            output = forward(batch, received)
            if not self.last:
                self._axis.exchange([(output.detach(), self._axis.rank + 1)], [])

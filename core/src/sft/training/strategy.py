"""The parallel strategy of a run that has one process: everything is here and whole."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import paddle

from sft.distributed.parts import Part
from sft.distributed.pieces import Piece
from sft.distributed.whole import WholeModel
from sft.models.forward import hidden_states
from sft.models.layers import linear_weight
from sft.models.sums import row_sums
from sft.seams import Batch, ParameterGroup
from sft.training.loss import target_loss, target_scores

if TYPE_CHECKING:
    from sft.context import Run


def batch_loss(model: Any, batch: Batch) -> Any:
    """Summed loss of a batch's target tokens, a scalar tensor."""
    return target_loss(hidden_states(model, batch), paddle.to_tensor(batch.labels), model.lm_head)


class SingleProcess(WholeModel):
    """See :class:`sft.ParallelStrategy` for what each member means. ``run`` may be None where nothing is trained."""

    data_rank = 0
    data_world = 1
    draw_rank = 0
    is_main = True
    is_first = True

    def __init__(self, run: Run | None) -> None:
        self._run = run

    def linear_weight(self, layer: Any) -> Any:
        return linear_weight(layer)

    def connect(self, model: Any) -> None:
        pass

    def share(self, groups: list[ParameterGroup]) -> list[ParameterGroup]:
        return groups

    def backward(self, model: Any, batches: Sequence[Batch], loss_scale: float) -> float:
        assert self._run is not None
        total = 0.0
        for batch in batches:
            self._run.hook.sft_micro_batch(run=self._run, batch=batch)
            with self._run.precision.autocast():
                loss = batch_loss(model, batch)
            (loss * loss_scale).backward()
            total += float(loss)
        return total

    def grad_norm(self, stepped: Mapping[str, Any]) -> float:
        return math.sqrt(squared_gradients(stepped.values()))

    def updated(self) -> None:
        pass

    def scores(self, model: Any, batches: Sequence[Batch]) -> tuple[float, int]:
        found = [batch_scores(model, batch) for batch in batches]
        return sum(loss for loss, _ in found), sum(correct for _, correct in found)

    def answering(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        return contextlib.nullcontext(lambda: None)

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def largest(self, value: float) -> float:
        return value

    def whole(self, parameters: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        return iter(parameters)

    def assembled(self, model: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def pieces(self, stepped: Mapping[str, Any]) -> Mapping[str, Piece]:
        return {name: Piece(Part(tuple(p.shape), 0, 0, 1), 0, int(p.size)) for name, p in stepped.items()}

    def own_file(self, stem: str) -> str:
        return stem

    def wait(self) -> None:
        pass


def batch_scores(model: Any, batch: Batch) -> tuple[float, int]:
    """Summed loss of a batch's target tokens, and how many of them are the likeliest token."""
    return target_scores(hidden_states(model, batch), paddle.to_tensor(batch.labels), model.lm_head)


@paddle.no_grad()
def squared_gradients(parameters: Iterable[Any]) -> float:
    """The sum of the squares of all gradients of ``parameters``, in float32; those without one count as zero."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [row_sums(gradient.astype("float32").square().reshape([1, -1])) for gradient in gradients]
    return paddle.add_n([part.astype("float64") for part in parts]).item() if parts else 0.0

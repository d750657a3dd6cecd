"""The parallel strategy of a run that has one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import paddle

from sft.models.attention import hidden_states
from sft.seams import Batch
from sft.training.loss import target_loss

if TYPE_CHECKING:
    from sft.running import Run


def batch_loss(model: Any, batch: Batch) -> Any:
    """Summed loss of a batch's target tokens, a scalar tensor."""
    return target_loss(hidden_states(model, batch), paddle.to_tensor(batch.labels), model.lm_head)


class SingleProcess:
    """Everything happens here; see :class:`sft.ParallelStrategy` for what each member means."""

    data_rank = 0
    data_world = 1
    is_main = True

    def __init__(self, run: Run) -> None:
        self._run = run

    def wrap(self, model: Any) -> Any:
        return model

    def backward(self, model: Any, batches: Sequence[Batch], loss_scale: float) -> float:
        total = 0.0
        for batch in batches:
            self._run.hook.sft_micro_batch(run=self._run, batch=batch)
            with self._run.precision.autocast():
                loss = batch_loss(model, batch)
            (loss * loss_scale).backward()
            total += float(loss)
        return total

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def grad_norm(self, parameters: Sequence[Any]) -> float:
        return grad_norm(parameters)


@paddle.no_grad()
def grad_norm(parameters: Sequence[Any]) -> float:
    """The norm of all gradients of ``parameters`` together, in float32; those without one count as zero."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = [gradient.astype("float32").square().sum() for gradient in gradients]
    return float(paddle.add_n(squares).sqrt()) if squares else 0.0

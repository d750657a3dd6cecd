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

    def __init__(self, run: Run | None) -> None:
        self._run = run

    def wrap(self, model: Any) -> Any:
        return model

    def backward(self, model: Any, batches: Sequence[Batch], loss_scale: float) -> float:
        total = 0.0
        for batch in batches:
            if self._run is not None:
                self._run.hook.sft_micro_batch(run=self._run, batch=batch)
            loss = batch_loss(model, batch)
            (loss * loss_scale).backward()
            total += float(loss)
        return total

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    @paddle.no_grad()
    def clip(self, parameters: Sequence[Any], max_norm: float) -> float:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        squares = [gradient.astype("float32").square().sum() for gradient in gradients]
        norm = float(paddle.add_n(squares).sqrt()) if squares else 0.0
        if max_norm and norm > max_norm:
            for gradient in gradients:
                gradient.scale_(max_norm / norm)
        return norm

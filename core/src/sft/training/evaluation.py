"""The loss on the dev data, the same way it is trained: target tokens alone, no logits kept."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import paddle

from sft.data.batches import make_batches
from sft.training.strategy import batch_loss

if TYPE_CHECKING:
    from sft.running import Run


def evaluate(run: Run, step: int, epoch: float) -> dict[str, Any]:
    """Mean loss (nats) over all target tokens of the dev data; restores the model's training mode."""
    assert run.dev_data is not None
    started = time.monotonic()
    rows = run.collator.rows(run.dev_data.lengths, None)
    batches = make_batches(run.dev_data, run.collator, rows, run.settings.training.per_device_eval_batch_size)
    mine = batches[run.strategy.data_rank :: run.strategy.data_world]
    was_training = run.model.training
    run.model.eval()
    with paddle.no_grad(), run.precision.autocast():
        loss = sum(float(batch_loss(run.model, batch)) for batch in mine)
    if was_training:
        run.model.train()
    loss, targets = run.strategy.sum([loss, sum(batch.target_tokens for batch in mine)])
    record = {
        "step": step,
        "epoch": round(epoch, 4),
        "eval_loss": loss / targets,
        "eval_seconds": round(time.monotonic() - started, 3),
        "eval_tokens": int(sum(batch.tokens for batch in batches)),
    }
    run.evaluation = record
    run.hook.sft_evaluated(run=run, record=record)
    return record

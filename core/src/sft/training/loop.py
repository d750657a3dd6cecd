"""The training loop. Read this to know what a run does.

It does: shuffle by seed, accumulate micro-batches, normalise the loss by the target tokens of the whole
window (of all processes), clip, step AdamW on the schedule, log, evaluate, checkpoint, resume.
It does not: know any technique (those are in the model, the batches and the optimizer's groups by now), know
other processes (the strategy does), or write final results (``running.py`` does).
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from sft.data.batches import Schedule, make_batches
from sft.errors import SftError
from sft.training import checkpoint
from sft.training.evaluation import evaluate
from sft.training.journal import Journal
from sft.training.optimizer import Optimizer, learning_rate
from sft.training.progress import Display

if TYPE_CHECKING:
    from sft.running import Run


def train(run: Run, optimizer: Optimizer, schedule: Schedule, journal: Journal, display: Display, start: int) -> int:
    """Train from after step ``start`` to the end; returns the number of the last step."""
    settings, strategy = run.settings.training, run.strategy
    model, parameters = strategy.wrap(run.model), list(optimizer.parameters.values())
    total = schedule.total_steps
    model.train()
    journal.start()
    for step, epoch, rows in schedule.iterate(start):
        if step > total:
            break
        began = time.monotonic()
        mine = rows[strategy.data_rank :: strategy.data_world]
        batches = make_batches(schedule.data, schedule.collator, mine, settings.per_device_train_batch_size)
        tokens, targets, padding = map(
            int,
            strategy.sum(
                [sum(getattr(b, kind) for b in batches) for kind in ("tokens", "target_tokens", "padding_tokens")]
            ),
        )
        seed_step(settings.seed, step, strategy.data_rank)
        (loss_sum,) = strategy.sum([strategy.backward(model, batches, 1.0 / max(1, targets))])
        grad_norm = strategy.clip(parameters, settings.max_grad_norm)
        if not math.isfinite(loss_sum) or not math.isfinite(grad_norm):
            raise SftError(
                f"The loss or its gradient is no longer finite at step {step} (loss {loss_sum / max(1, targets)}, "
                f"gradient norm {grad_norm}); lower learning_rate, and resume from a checkpoint before it."
            )
        rate = learning_rate(step, total, settings)
        optimizer.step(rate)

        record = {
            "step": step,
            "epoch": epoch,
            "loss": loss_sum / max(1, targets),
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "target_tokens": targets,
            "padding_tokens": padding,
        }
        journal.add(loss_sum, tokens, targets, padding)
        display.step(record, tokens / (time.monotonic() - began))
        if step % settings.logging_steps == 0 or step in (1, total):
            display.line(journal.step_line(step, epoch, rate, grad_norm))
        run.hook.sft_step_ended(run=run, record=record)

        if run.dev_data is not None and _due(settings.evaluation_strategy, run.eval_steps, step, epoch):
            evaluation = evaluate(run, step, epoch)
            journal.write(evaluation)
            journal.pause(evaluation["eval_seconds"])
            display.evaluation(evaluation)
        if _due(settings.save_strategy, settings.save_steps, step, epoch) and strategy.is_main:
            checkpoint.save(run, optimizer, state_after(run, schedule, journal, step, epoch))
    model.eval()
    return total


def state_after(run: Run, schedule: Schedule, journal: Journal, step: int, epoch: float) -> dict[str, Any]:
    """What ``state.json`` says about the moment after ``step``: enough to find the next batch and draw."""
    return {
        "step": step,
        "epoch": epoch,
        "date": run.tokenizer.now.isoformat(),
        "random": {"seed": run.settings.training.seed, "step": step},
        "data": {
            "fingerprint": schedule.data.fingerprint(),
            "rows_per_step": schedule.rows_per_step,
            "epochs_done": epoch,
        },
        "schedule": {
            "type": run.settings.training.lr_scheduler_type,
            "total_steps": schedule.total_steps,
        },
        "journal": journal.state(),
        "before": run.before,
        "evaluation": run.evaluation,
        "settings": run.settings.flat(),
    }


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make every draw of a step (dropout, noise) a function of seed, step and data rank alone."""
    paddle.seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def _due(strategy: str, steps: int, step: int, epoch: float) -> bool:
    return step % steps == 0 if strategy == "steps" else strategy == "epoch" and epoch.is_integer()

"""The learning rate of each step: a function of its number that a plugin provides, or the core's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from sft.plugins.calls import checking, mistaken
from sft.settings.arguments import TrainingArguments
from sft.settings.words import without_answer

if TYPE_CHECKING:
    from sft.context import CoreRun

Rates = Callable[[int], float]


def learning_rate(step: int, total: int, training: TrainingArguments) -> float:
    """The rate of optimizer step ``step`` (from 1) of ``total``: linear warm-up, then the schedule's decay.

    As in PaddleNLP and Hugging Face: the factor is (step-1)/warmup while warming up; "linear" and "cosine" (of half a
    wave) reach 0 after the last step, "polynomial" reaches ``lr_end``; "constant" has no warm-up.
    """
    peak, kind, done = training.learning_rate, training.lr_scheduler_type, step - 1
    warmup = training.warmup_of(total)
    if kind == "constant":
        return peak
    if done < warmup:
        return peak * done / warmup
    progress = (done - warmup) / max(1, total - warmup)
    if kind == "polynomial":
        return (peak - training.lr_end) * max(0.0, 1.0 - progress) ** training.power + training.lr_end
    shape = {
        "constant_with_warmup": 1.0,
        "linear": max(0.0, 1.0 - progress),
        "cosine": max(0.0, 0.5 * (1.0 + math.cos(2.0 * math.pi * training.num_cycles * min(1.0, progress)))),
    }
    return peak * shape[kind]


def make_rates(run: CoreRun, total: int) -> Rates:
    """The rate of each optimizer step of ``total``, by its number from 1."""
    provided = run.hook.sft_schedule(run=run, total=total)
    if provided is None:
        without_answer(run.settings, "lr_scheduler_type")
        return lambda step: learning_rate(step, total, run.settings.training)
    who = run.plugins.who(str(run.plugins.provider("sft_schedule")))
    ask = checking(provided, float, "the schedule that it gave", who)

    def rate(step: int) -> float:
        value = float(ask(step))
        if not 0 <= value < math.inf:
            raise mistaken(f"a learning rate of {value} for step {step}", "the schedule that it gave", who)
        return value

    return rate

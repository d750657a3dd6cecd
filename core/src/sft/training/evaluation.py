"""The dev data measured: the loss the same way it is trained, and on request the model's own answers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import paddle

from sft.data.batches import make_batch
from sft.data.encoded import Encoded
from sft.data.questions import Question
from sft.models.generation import answers, unit
from sft.seams import Batch
from sft.training import answer_scores
from sft.training.answer_files import GENERATIONS, SAMPLES, file_of, write_answers
from sft.training.divergence import explained
from sft.training.lines import measured, write
from sft.training.progress import figures
from sft.training.shared import shared
from sft.training.strategy import SingleProcess

if TYPE_CHECKING:
    from sft.context import CoreRun

_TOGETHER = 8
"""Batches that processes measure together before progress is shown: enough to keep a pipeline mostly full."""
_LARGEST_EXPONENT = 700.0
"""Its exponential still fits a double; JSON has no infinity."""


def before_or_after(run: CoreRun, step: int, epoch: float, journal: Any) -> dict[str, Any]:
    """Dev loss and sample answers, before or after training."""
    found: dict[str, Any] = {}
    if run.dev_data is not None:
        if run.evaluation.get("step") != step:
            write(run, journal, evaluate(run, step, epoch))
        found["eval_loss"] = run.evaluation["eval_loss"]
        text = f"dev data {'before' if step == 0 else 'after'} training: {figures(run.evaluation)}"
        run.progress.tell("evaluation", run.evaluation, text)
    if run.samples:
        found["samples"] = answer_samples(run, step)
    return found


def evaluate(run: CoreRun, step: int, epoch: float) -> dict[str, Any]:
    """Measure the dev data; the record is described at ``sft_evaluated``. The model's training mode is restored."""
    started = time.monotonic()
    record = {"step": step, "epoch": round(epoch, 4), **dev_loss(run)}
    if run.questions:
        record.update(score(run, file_of(run.output_dir, GENERATIONS, step)))
    record["eval_seconds"] = round(time.monotonic() - started, 3)
    record = measured(run, record)
    run.evaluation = record
    run.hook.sft_evaluated(run=run, record=record)
    return record


def dev_loss(run: CoreRun) -> dict[str, Any]:
    """Loss, perplexity and token accuracy of the dev data, each over all its target tokens; where it is several data
    sets, of each of them too (``eval_sets``)."""
    assert run.dev_data is not None
    was_training = run.model.training
    run.model.eval()
    found = {name: _sums(run, data) for name, data in run.dev_data.sets.items()}
    if was_training:
        run.model.train()
    total = reduce(_Sums.plus, found.values())
    if not math.isfinite(total.mean):
        raise explained(run, f"The dev loss is {'no longer' if run.step else 'not'} finite ({total.mean})")
    if len(found) == 1:
        return total.record()
    return {**total.record(), "eval_sets": {name: sums.record() for name, sums in found.items()}}


class _Sums(NamedTuple):
    """Over all target tokens of some data: the sum of their losses, how many are right, and how many there are; and of
    what else a run minimises."""

    loss: float
    right: float
    targets: float
    tokens: int
    weight: float
    """What its batches count for the objective."""
    more: Mapping[str, float]
    """The sums of the objective and of its values, by name."""

    def plus(self, other: _Sums) -> _Sums:
        more = {name: value + other.more[name] for name, value in self.more.items()}
        loss, right, targets = (a + b for a, b in zip(self[:3], other[:3], strict=True))
        return _Sums(loss, right, targets, self.tokens + other.tokens, self.weight + other.weight, more)

    @property
    def mean(self) -> float:
        return self.loss / self.targets

    def record(self) -> dict[str, Any]:
        return {
            "eval_loss": self.mean,
            "eval_ppl": math.exp(min(self.mean, _LARGEST_EXPONENT)),
            "eval_accuracy": self.right / self.targets,
            "eval_tokens": self.tokens,
            **{f"eval_{name}": value / (self.weight or 1.0) for name, value in self.more.items()},
        }


def _sums(run: CoreRun, data: Encoded) -> _Sums:
    """What all processes find of some data.

    The batches are those that one process would make; the processes that share the data take turns with them.
    """
    size = run.settings.training.per_device_eval_batch_size
    rows, rank, world = run.collator.rows(data.lengths, None), run.strategy.data_rank, run.strategy.data_world
    together = size * world * (1 if type(run.strategy) is SingleProcess else _TOGETHER)
    names = run.objective.measures
    found, targets, weight = [0.0] * (2 + len(names)), 0, 0.0

    def measure(hidden: Any, batch: Batch) -> Sequence[float]:
        return run.objective.measured(hidden, batch, run.model)

    with run.progress.task("measuring dev data", "rows", len(rows)) as task:
        # Each process makes the same number of calls, the last one perhaps with nothing.
        for first in range(0, len(rows), together):
            group = rows[first : first + together]
            starts = range(rank * size, len(group), world * size)
            batches = [make_batch(data, run.collator, group[start : start + size]) for start in starts]
            with paddle.no_grad(), run.precision.autocast():
                scores = run.strategy.scores(run.model, batches, measure, len(found))
            found = [a + b for a, b in zip(found, scores, strict=True)]
            targets += sum(batch.target_tokens for batch in batches)
            weight += sum(map(run.objective.weight, batches))
            task.advance(len(group))
    loss, right, *more, every, weight = run.strategy.sum([*found, targets, weight])
    return _Sums(loss, right, every, int(data.lengths.sum()), weight, dict(zip(names, more, strict=True)))


def score(run: CoreRun, path: Path | None) -> dict[str, float]:
    """Answer this process's share of the questions, write the answers to ``path``, and score those of all processes.

    Where several processes share the data, each share has a file of its own, with its number in the name.
    """
    rank, world = run.strategy.data_rank, run.strategy.data_world
    mine = run.questions[rank::world]
    texts = answer(run, mine)
    if path is not None:
        shared(run.strategy, run.keep_folder)  # answering takes long
    if path is not None and run.strategy.is_first:
        path = path if world == 1 else path.with_name(f"{path.stem}-rank-{rank}{path.suffix}")
        write_answers(path, mine, texts)
    counts = run.strategy.sum(answer_scores.count(texts, [question.reference for question in mine]))
    return {f"eval_{name}": value for name, value in answer_scores.scores(counts).items()}


def answer_samples(run: CoreRun, step: int) -> list[str]:
    """The model's answers to the sample prompts after ``step``, which it is asked once; the main process keeps them in
    a file of that step."""
    if run.answered is None or run.answered[0] != step:
        texts = answer(run, run.samples)

        def keep() -> None:
            if run.strategy.is_main:
                run.keep_folder()
                write_answers(file_of(run.output_dir, SAMPLES, step), run.samples, texts)

        shared(run.strategy, keep)
        run.answered = step, texts
    return run.answered[1]


def answer(run: CoreRun, questions: Sequence[Question]) -> list[str]:
    """The model's answers, ``per_device_eval_batch_size`` at a time."""
    size = run.settings.training.per_device_eval_batch_size
    texts: list[str] = []

    def advanced(tokens: int, answers: float) -> None:
        task.advance(tokens, len(texts) + answers)

    with (
        run.strategy.answering() as gone_on,
        run.progress.task("answering", unit(len(questions)), len(questions), of_units=False) as task,
    ):
        for start in range(0, len(questions), size):
            prompts = [question.ids for question in questions[start : start + size]]
            with run.precision.autocast():
                texts += answers(
                    run.model,
                    run.tokenizer,
                    prompts,
                    run.settings.generation,
                    run.settings.training.seed,
                    advanced=advanced,
                )
            gone_on()
    return texts

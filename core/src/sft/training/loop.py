"""The training loop. Read this to know what a run does.

It does: shuffle by seed, accumulate micro-batches, normalise the loss by what the batches of the whole window weigh (of
all processes: their target tokens, or what else the objective counts), clip, step the optimizer at the schedule's rate
(skip a step that overflows in float16), log, evaluate, checkpoint, resume, and what hooks and files ask of it.
It does not: know any technique (those are in the model, the batches and the optimizer's groups by now), know
other processes (the strategy does), or write final results (``training/result.py`` does).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from sft.data.ahead import one_ahead
from sft.data.batches import Schedule, Step
from sft.errors import SignalError
from sft.freed_memory import give_back_holes
from sft.models.forward import hidden_states
from sft.models.layers import trainable
from sft.optimizer import Optimizer
from sft.seams import Batch
from sft.training import checkpoint
from sft.training.best import better
from sft.training.divergence import left_out, untried
from sft.training.evaluation import answer_samples, evaluate
from sft.training.first_rows import FirstRows
from sft.training.journal import Journal
from sft.training.lines import measured, write
from sft.training.precision import LossScale
from sft.training.progress import Display
from sft.training.rates import Rates
from sft.training.repeats import check_repeats
from sft.training.strategy import outcome
from sft.training.wide_sums import WideSums

if TYPE_CHECKING:
    from sft.context import CoreRun
    from sft.training.wishes import Wishes


_SUMMED = ("tokens", "target_tokens", "padding_tokens")


@dataclass(frozen=True)
class Learning:
    """What a step does with each of its micro-batches: forward, loss, backward. Gradients add up in the parameters.

    ``run.strategy.accumulate`` calls the three for all micro-batches of a step: on one process one micro-batch after
    the other (``training/strategy.py``), in a pipeline as its stages hand them on. Described at :class:`sft.Learning`.
    """

    run: CoreRun
    weight: float
    """What each summed loss counts: the loss scale, divided by the weights of all batches of the step."""
    is_idle: bool = False
    sums: WideSums = field(default_factory=lambda: WideSums(()))
    """Where gradients of 16-bit parameters add up."""
    values: list[float] = field(default_factory=list)
    """The sums of what the objective has a name for."""
    most: int = 0
    """Micro-batches of the process that has most of them in this step."""

    def forward(self, batch: Batch, received: Any | None = None, told: Callable[[], None] | None = None) -> Any:
        if not self.is_idle:
            self.run.hook.sft_micro_batch(run=self.run, batch=batch)
        if told is not None:
            told()
        with self.run.precision.autocast():
            return hidden_states(self.run.model, batch, received)

    def loss(self, hidden: Any, batch: Batch) -> Any:
        if hidden.place.is_cpu_place():
            give_back_holes()  # all that backward needs is held now
        with self.run.precision.autocast():
            loss, values = self.run.objective.loss(self.run.model, self.weight or 1.0, hidden, batch)
        if not self.is_idle and values:
            self.values[:] = [a + b for a, b in zip(self.values or [0.0] * len(values), values, strict=True)]
        return loss

    def backward(self, loss: Any, upstream: Any | None = None) -> None:
        with self.sums.backward():
            if upstream is None:
                (loss * self.weight).backward()
            else:
                paddle.autograd.backward([loss], [upstream])

    def idle(self) -> Learning:
        return replace(self, weight=0.0, is_idle=True)


def train(
    run: CoreRun,
    optimizer: Optimizer,
    rates: Rates,
    schedule: Schedule,
    journal: Journal,
    display: Display,
    wishes: Wishes,
    state: dict[str, Any] | None,
    until: int | None = None,
) -> tuple[int, float]:
    """Train to the end, from the moment of a checkpoint's ``state`` on if there is one; the last step and epoch.

    The end is that of the schedule, or where somebody asks for it (``run.stopped_early``); or the step ``until``, for a
    replay, which goes no further."""
    settings, strategy = run.settings.training, run.strategy
    total = schedule.total_steps
    start, epoch, place, scale = 0, 0.0, None, LossScale(run.precision, settings.scale_loss)
    if state is not None:
        start, epoch, place = state["step"], state["epoch"], state["data"]["place"]
        scale.load(state["loss_scale"])
    run.model.train()
    sums = WideSums(trainable(run.model).values())
    journal.start()
    size, rank, world = settings.per_device_train_batch_size, strategy.data_rank, strategy.data_world
    left = (until or total) - start if run.stopped_early is None else 0
    steps = islice(schedule.batches(start, place, rank, world, size), left)  # one more may be a window more
    step, was_saved, first_rows = start, start, FirstRows(run, run.output_dir)
    run.stop.waits_for(_before_stopping(start + 1, settings.save_strategy, until))
    for at, batches in one_ahead(steps):
        began, step, epoch = time.monotonic(), at.number, at.epoch

        first_rows.see(at, batches)

        # The tokens in the micro-batches of all processes, and what the targets among them weigh.
        own = [sum(getattr(batch, kind) for batch in batches) for kind in _SUMMED]
        *counts, weight = strategy.sum([*own, sum(map(run.objective.weight, batches))])
        tokens, targets, padding = map(int, counts)
        share = weight or 1.0  # where there is no target there is no loss

        if settings.deterministic and step == start + 1:
            unheard = Learning(run, scale.value / share, is_idle=True, sums=sums, most=1)

            def once(step: int = step, first: list[Batch] = batches[:1], learning: Learning = unheard) -> float:
                seed_step(settings.seed, step, strategy.draw_rank)
                return float(strategy.accumulate(learning, first))

            check_repeats(run, once, optimizer.parameters)

        # Forward, loss and backward of each; the gradients add up to that of the weighted mean over the step's targets.
        run.at = at
        seed_step(settings.seed, step, strategy.draw_rank)
        learning = Learning(run, scale.value / share, sums=sums, most=-(-len(at.rows[::world]) // size))
        names = run.objective.values
        with display.within(step, len(batches)):
            own_loss = strategy.accumulate(learning, batches)
            own_values = learning.values or [0.0] * len(names)
            loss_sum, *sums_of, grad_norm = outcome(strategy, own_loss, own_values, optimizer.parameters)
        values = dict(zip(names, sums_of, strict=True))

        # The optimizer's step: clip, then step at the schedule's rate.
        grad_norm /= scale.value
        rate, unscaled = rates(step), 1.0 / scale.value
        journal.due |= step % settings.logging_steps == 0 or step in (1, total)
        journal.steps.add(step, loss_sum / share, grad_norm)
        if scale.accepts(loss_sum, grad_norm):
            optimizer.step(rate, unscaled * clip_factor(grad_norm, settings.max_grad_norm))
            strategy.updated()
            run.step = run.taken = step
            journal.skipped_in_a_row = 0
            record = {
                "step": step,
                "epoch": epoch,
                "loss": loss_sum / share,
                "learning_rate": rate,
                "grad_norm": grad_norm,
                "tokens": tokens,
                "target_tokens": targets,
                "padding_tokens": padding,
                **{name: value / share for name, value in values.items()},
            }
            if was_saved:  # and is good to train on, so older ones may go
                checkpoint.drop_old(run, was_saved)
                was_saved = 0
            journal.add(loss_sum, weight, tokens, targets, padding, len(at.rows), grad_norm, values)
            speed = tokens / (time.monotonic() - began)
            display.step(record, speed)
            run.hook.sft_step_ended(run=run, record=record)
            if journal.due:
                _log(run, journal, display, step, epoch, rate)
            else:
                display.between(record, speed)
        else:
            if scale.gives_up:
                display.skipped(step, left_out(run, at, journal, f"loss {loss_sum / share}, gradient norm {grad_norm}"))
            else:
                text = f"step {step}: float16 overflow, skipped; the loss scale is now {scale.value:g}"
                display.skipped(step, text)
            optimizer.clear()
            journal.skipped_steps += 1

        # Evaluation and checkpoint, where they are due or asked for; whoever asks may have seen the evaluation.
        wishes.hear()
        ends, evaluation = step == total or wishes.stops is not None, None
        is_due = run.dev_data is not None and _due(settings.evaluation_strategy, run.eval_steps, at, ends)
        if is_due or wishes.evaluates:
            paused = time.monotonic()
            evaluation = evaluate(run, step, epoch)
            write(run, journal, evaluation)
            if run.samples:
                answer_samples(run, step)
            journal.pause(time.monotonic() - paused)
            display.evaluation(evaluation)
            wishes.evaluated()
            wishes.hear()
            ends |= wishes.stops is not None
        if ends and journal.window.rows:  # no step comes that could take along what is not written yet
            _log(run, journal, display, step, epoch, rate)
        if wishes.stops is not None and step < total:
            run.stopped_early = {"step": step, "reason": wishes.stops}
            display.say(f"step {step}/{total}: the run ends early ({wishes.stops})", "warning")
        saves = wishes.saves or _due(settings.save_strategy, settings.save_steps, at, ends)
        if saves:
            run.best = better(run, evaluation) if evaluation is not None else run.best
            folder = checkpoint.save(run, optimizer, state_after(run, schedule, journal, at, scale))
            was_saved = step
            display.saved(folder)
            wishes.saved(folder)
            wishes.hear()  # a signal that has come meanwhile need not wait for another step
        if ends:  # with a result
            break
        if wishes.signal:
            if not saves and settings.save_strategy != "no":
                display.saved(checkpoint.save(run, optimizer, state_after(run, schedule, journal, at, scale)))
            raise SignalError(wishes.signal, f"after step {step}")
        run.stop.waits_for(_before_stopping(step + 1, settings.save_strategy, until))
    if was_saved:
        checkpoint.drop_old(run, was_saved, is_end=not journal.skipped_in_a_row)
    if journal.skipped_in_a_row and until is None:
        display.say(untried(run, journal), "warning")
    run.model.eval()
    return step, epoch


def _log(run: CoreRun, journal: Journal, display: Display, step: int, epoch: float, rate: float) -> None:
    line = measured(run, journal.step_line(step, epoch, rate))
    write(run, journal, line)
    display.line(line)


def state_after(run: CoreRun, schedule: Schedule, journal: Journal, at: Step, scale: LossScale) -> dict[str, Any]:
    """What ``state.json`` says about the moment after a step: enough to find the next batch and draw."""
    return {
        "step": at.number,
        "epoch": at.epoch,
        "date": run.tokenizer.now.isoformat(),
        "seed": run.settings.training.seed,
        "data": {
            "fingerprint": schedule.data.fingerprint(),
            "rows_per_step": schedule.rows_per_step,
            "place": at.place,
            "dev": run.dev_data.fingerprint() if run.dev_data is not None else None,
        },
        "loss_scale": scale.state(),
        "journal": journal.state(),
        "steps": journal.steps.state(),
        "before": run.before,
        "evaluation": run.evaluation,
        "best": run.best,
        "settings": run.settings.written(),
        "shaping": run.shaping(),
        "plugin_files": run.plugins.files_written(),
        "arithmetic": run.arithmetic,
        **({"other_arithmetic": run.other_arithmetic} if run.other_arithmetic else {}),
        **({"earlier": run.earlier} if run.earlier else {}),
        **({"stopped_early": run.stopped_early} if run.stopped_early else {}),
    }


def _before_stopping(step: int, save_strategy: str, until: int | None) -> str:
    if until is not None:
        return f"finishing step {step}"
    if save_strategy != "no":
        return f"finishing step {step} and saving"
    return f"finishing step {step}; save_strategy is no, so what the run has learned is not kept"


def check_stop(run: CoreRun, moment: str) -> None:
    """Raise :class:`SignalError` if any process of the run has been asked to stop. From now on signals do not wait."""
    signal = int(run.strategy.largest(run.stop.asked))
    run.stop.waits_for("")
    if signal:
        raise SignalError(signal, moment)


def clip_factor(norm: float, max_norm: float) -> float:
    """The factor that scales gradients of global norm ``norm`` down to ``max_norm`` (0: no clipping)."""
    return max_norm / norm if max_norm and norm > max_norm else 1.0


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make every draw of a step (dropout, noise) a function of seed, step and the process's draw rank alone."""
    paddle.seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def _due(strategy: str, steps: int, at: Step, ends: bool) -> bool:
    """An epoch that the run's end cuts short ends there, as in PaddleNLP."""
    if strategy == "epoch":
        return at.ends_pass or ends
    return strategy == "steps" and at.number % steps == 0

"""What the user sees of the training itself: a bar of its steps in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.durations import duration
from sft.foreign_text import shown
from sft.plugins.marks import hookimpl
from sft.progress import BAR_AFTER, Progress
from sft.settings.best_metric import ANSWER_SCORES
from sft.training.pace import Pace, Pauses

if TYPE_CHECKING:
    from sft.seams import Batch

LINE_EVERY = 60.0
"""After so many seconds without a line, a step is shown although ``logging_steps`` does not ask for it yet."""
TOLD_AFTER = 10.0
"""Seconds of steps after which it is known well enough how long all of them take."""
WORTH_TELLING = 60.0
"""Seconds that must be left for that to be told."""


def figures(record: dict[str, Any]) -> str:
    """The results of an evaluation as text: loss, perplexity, accuracy, the losses of several data sets, the scores of
    answers if there are any, and the objective where it is another."""
    text = f"loss {record['eval_loss']:.4f}  ppl {_short(record['eval_ppl'])}  accuracy {record['eval_accuracy']:.4f}"
    answers = [f"{name} {record[f'eval_{name}']:.4f}" for name in ANSWER_SCORES if f"eval_{name}" in record]
    sets = [f"loss of {shown(name)} {one['eval_loss']:.4f}" for name, one in record.get("eval_sets", {}).items()]
    objective = [f"objective {record['eval_objective']:.4f}"] if "eval_objective" in record else []
    return "  ".join([text, *objective, *sets, *answers]) + _own(record)


def _own(record: dict[str, Any]) -> str:
    """What plugins measure, and the values of an objective, behind the rest."""
    return "".join(
        f"  {shown(name.removeprefix('eval_'))} {value:.4g}" for name, value in record.items() if "/" in name
    )


def _short(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


class Display:
    """Shows steps, logged lines and evaluations. Registered beside the plugins, it hears of micro-batches too."""

    def __init__(
        self, total: int, done: int, progress: Progress, pauses: Pauses | None = None, evaluated: float | None = None
    ) -> None:
        """``pauses`` are the evaluations and checkpoints to come, ``evaluated`` the seconds of one that was made."""
        self._progress = progress
        self._total, self._done = total, done
        self._began = self._said = time.monotonic()
        self._pace = Pace(total, done, pauses or (lambda step: (0, 0)))
        if evaluated is not None:
            self._pace.evaluated(evaluated)
        self._told = False
        self._figures: list[str] = []
        self._step, self._step_began, self._batches = done, self._began, 0
        self._begun: set[int] = set()
        """Which micro-batches of the step have begun, by their ids: the loop holds them all until the step is done, so
        none gets the id of another. A set, for a stage of several parts is told of one before each of them."""
        self._bar = progress.show("step", total, [f"{done}/{total}"], self._began) if progress.has_bars else None
        self._move(done)

    def say(self, text: str, level: str = "info") -> None:
        """A line of its own, above the bar if there is one."""
        self._tell("note" if level == "warning" else "line", {"text": text}, text, level)

    def _tell(self, event: str, values: dict[str, Any], text: str, level: str = "info") -> None:
        self._said = time.monotonic()
        self._progress.tell(event, values, text, level)

    def step(self, record: dict[str, Any], tokens_per_second: float) -> None:
        """An optimizer step is done."""
        self._figures = [
            f"loss {record['loss']:.4f}",
            f"{tokens_per_second:,.0f} tokens/s",
            f"lr {record['learning_rate']:.2e}",
        ]
        self._passed(record["step"])

    def skipped(self, step: int, text: str) -> None:
        """A step has changed nothing, which ``text`` says."""
        self.say(text, "warning")
        self._passed(step)

    def _passed(self, step: int) -> None:
        self._done = step
        self._pace.step(step)
        self._move(step)
        left = self._pace.left
        is_known = self._pace.timed >= 2 and time.monotonic() - self._began >= TOLD_AFTER
        if not self._told and is_known and left is not None:
            self._told = True
            if left >= WORTH_TELLING:
                self._tell_time(left)

    def _tell_time(self, left: float) -> None:
        """How long the run will take, once that is known."""
        ends = datetime.now().astimezone() + timedelta(seconds=left)
        a_step = self._pace.seconds_a_step
        assert a_step is not None
        day = "" if left < 20 * 3600 else f"{ends:%Y-%m-%d} "
        self._tell(
            "time",
            {"seconds_left": left, "seconds_a_step": a_step, "ends": ends.isoformat(timespec="seconds")},
            f"time: about {duration(left)} for {self._total - self._done:,} more steps ({a_step:.3g} s each), until "
            f"{day}{ends:%H:%M}",
        )

    def _move(self, done: float, within: str = "") -> None:
        """The bar, if there is one, to ``done`` steps; ``within`` says how far the step that is under way is."""
        if self._bar is not None:
            left = self._pace.left
            ends = None if left is None else time.monotonic() + left
            texts = [f"{self._done}/{self._total}{within}", *self._figures]
            self._progress.update(self._bar, done, texts, ends)

    @contextmanager
    def within(self, step: int, batches: int) -> Iterator[None]:
        """A context in which the ``batches`` micro-batches of a step are computed; if that takes long, it is shown."""
        with self._progress.lock:
            self._step, self._step_began, self._batches = step, time.monotonic(), batches
            self._begun = set()
        with self._progress.looking_after(self):
            yield

    @hookimpl
    def sft_micro_batch(self, batch: Batch) -> None:
        with self._progress.lock:
            self._begun.add(id(batch))
            if len(self._begun) > 1:  # a step that has only begun shows nothing by itself
                self.look()

    def look(self) -> None:
        """Show how far the step has come, if it is time to."""
        now, begun = time.monotonic(), len(self._begun)
        if self._bar is not None:
            if now - self._step_began >= BAR_AFTER and 0 < begun <= self._batches and self._batches > 1:
                done = self._done + (begun - 1) / self._batches
                self._move(done, f", micro-batch {begun}/{self._batches}")
        elif now - max(self._said, self._step_began) >= LINE_EVERY:
            batch, took = max(1, begun), now - self._step_began
            self._tell(
                "micro_batch",
                {"step": self._step, "total": self._total, "micro_batch": batch, "micro_batches": self._batches}
                | {"seconds": round(took, 1)},
                f"step {self._step}/{self._total}: micro-batch {batch} of {self._batches}, {duration(took)} so far",
            )

    def line(self, line: dict[str, Any]) -> None:
        """A logged step, in plain text (the bar shows the same figures at every step)."""
        speed = line["tokens"] / max(line["seconds"], 1e-9)
        text = (
            f"step {line['step']}/{self._total}  epoch {line['epoch']:.2f}  loss {line['loss']:.4f}  "
            f"lr {line['learning_rate']:.2e}  grad norm {line['grad_norm']:.3f}  {speed:,.0f} tokens/s  "
            f"ETA {self._eta()}{_own(line)}"
        )
        if self._bar is None:
            self._tell("step", self._at(line), text)
        else:
            self._progress.note(text)

    def between(self, record: dict[str, Any], tokens_per_second: float) -> None:
        """A step that is not logged. It is shown if no line has come for long, so that slow training is not silent."""
        if self._bar is None and time.monotonic() - self._said >= LINE_EVERY:
            self._tell(
                "between",
                self._at(record),
                f"step {record['step']}/{self._total}  epoch {record['epoch']:.2f}  loss {record['loss']:.4f} (of this "
                f"step)  {tokens_per_second:,.0f} tokens/s  ETA {self._eta()}",
            )

    def evaluation(self, record: dict[str, Any]) -> None:
        self._pace.evaluated()
        self._tell("evaluation", self._at(record), f"step {record['step']}/{self._total}  dev {figures(record)}")

    def saved(self, folder: Path) -> None:
        """A checkpoint has been written."""
        self._pace.saved()
        self._progress.tell("checkpoint", {"step": self._done, "folder": str(folder)}, None)

    def close(self) -> None:
        if self._bar is not None:
            self._progress.keep(self._bar)
            self._bar = None

    def _at(self, record: dict[str, Any]) -> dict[str, Any]:
        return {**record, "total": self._total, "seconds_left": self._pace.left}

    def _eta(self) -> str:
        return duration(self._pace.left or 0.0)

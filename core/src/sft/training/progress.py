"""What the user sees of the training itself: a bar of its steps in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sft.foreign_text import shown
from sft.plugins.marks import hookimpl
from sft.progress import BAR_AFTER, Progress, duration
from sft.settings.best_metric import ANSWER_SCORES

LINE_EVERY = 60.0
"""After so many seconds without a line, a step is shown although ``logging_steps`` does not ask for it yet."""


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

    def __init__(self, total: int, done: int, progress: Progress) -> None:
        self._progress = progress
        self._total, self._first, self._done = total, done, done
        self._began = self._said = time.monotonic()
        self._bar = progress.show("step", total) if progress.has_bars else None
        self._figures = ""
        self._step, self._step_began, self._batch, self._batches = done, self._began, 0, 0
        if self._bar is not None:
            progress.update(self._bar, done, f"{done}/{total}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        self._said = time.monotonic()
        self._progress.say(text)

    def step(self, record: dict[str, Any], tokens_per_second: float) -> None:
        """An optimizer step is done."""
        self._done = record["step"]
        figures = f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  {tokens_per_second:,.0f} tokens/s"
        self._figures = f"  {figures}"
        if self._bar is not None:
            self._progress.update(self._bar, self._done, f"{self._done}/{self._total}{self._figures}")

    @contextmanager
    def within(self, step: int, batches: int) -> Iterator[None]:
        """A context in which the ``batches`` micro-batches of a step are computed; if that takes long, it is shown."""
        with self._progress.lock:
            self._step, self._step_began, self._batch, self._batches = step, time.monotonic(), 0, batches
        with self._progress.looking_after(self):
            yield

    @hookimpl
    def sft_micro_batch(self) -> None:
        with self._progress.lock:
            self._batch += 1
            if self._batch > 1:  # a step that has only begun shows nothing by itself
                self.look()

    def look(self) -> None:
        """Show how far the step has come, if it is time to."""
        now = time.monotonic()
        if self._bar is not None:
            if now - self._step_began >= BAR_AFTER and 0 < self._batch <= self._batches and self._batches > 1:
                done = self._done + (self._batch - 1) / self._batches
                at = f"{self._done}/{self._total}, micro-batch {self._batch}/{self._batches}"
                self._progress.update(self._bar, done, f"{at}{self._figures}")
        elif now - max(self._said, self._step_began) >= LINE_EVERY:
            self.say(
                f"step {self._step}/{self._total}: micro-batch {max(1, self._batch)} of {self._batches}, "
                f"{duration(now - self._step_began)} so far"
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
            self.say(text)
        else:
            self._progress.note(text)

    def between(self, record: dict[str, Any], tokens_per_second: float) -> None:
        """A step that is not logged. It is shown if no line has come for long, so that slow training is not silent."""
        if self._bar is None and time.monotonic() - self._said >= LINE_EVERY:
            self.say(
                f"step {record['step']}/{self._total}  epoch {record['epoch']:.2f}  loss {record['loss']:.4f} (of this "
                f"step)  {tokens_per_second:,.0f} tokens/s  ETA {self._eta()}"
            )

    def evaluation(self, record: dict[str, Any]) -> None:
        self.say(f"step {record['step']}/{self._total}  dev {figures(record)}")

    def close(self) -> None:
        if self._bar is not None:
            self._progress.keep(self._bar)
            self._bar = None

    def _eta(self) -> str:
        rate = (time.monotonic() - self._began) / max(1, self._done - self._first)
        return duration(rate * (self._total - self._done))

"""What a person sees while a run goes on: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sft.metrics import NAMES as ANSWER_SCORES


def figures(record: dict[str, Any]) -> str:
    """What an evaluation found, for a line: loss, perplexity, accuracy, and the scores of answers if there are any."""
    text = f"loss {record['eval_loss']:.4f}  ppl {_short(record['eval_ppl'])}  accuracy {record['eval_accuracy']:.4f}"
    answers = [f"{name} {record[f'eval_{name}']:.4f}" for name in ANSWER_SCORES if f"eval_{name}" in record]
    return "  ".join([text, *answers])


def _short(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


class Display:
    """Shows steps, logged lines and evaluations. ``bar`` off, or no terminal: lines only."""

    def __init__(self, total: int, done: int, bar: bool, say: Callable[[str], None]) -> None:
        self._console, self._say = Console(highlight=False, soft_wrap=True), say
        self._progress: Progress | None = None
        self._total, self._first, self._done = total, done, done
        self._began = time.monotonic()
        if bar and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("train", total=total, completed=done, figures="")
            self._progress.start()

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._progress is not None:
            self._console.print(text, markup=False)
        else:
            self._say(text)

    def step(self, record: dict[str, Any], tokens_per_second: float) -> None:
        """An optimizer step is done."""
        self._done = record["step"]
        if self._progress is not None:
            figures = f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  {tokens_per_second:,.0f} tokens/s"
            self._progress.update(self._task, completed=record["step"], figures=figures)

    def line(self, line: dict[str, Any]) -> None:
        """A logged step, in plain text (the bar shows the same figures at every step)."""
        if self._progress is None:
            speed = line["tokens"] / max(line["seconds"], 1e-9)
            self.say(
                f"step {line['step']}/{self._total}  epoch {line['epoch']:.2f}  loss {line['loss']:.4f}  "
                f"lr {line['learning_rate']:.2e}  grad norm {line['grad_norm']:.3f}  {speed:,.0f} tokens/s  "
                f"ETA {self._eta()}"
            )

    def evaluation(self, record: dict[str, Any]) -> None:
        self.say(f"step {record['step']}/{self._total}  dev {figures(record)}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _eta(self) -> str:
        rate = (time.monotonic() - self._began) / max(1, self._done - self._first)
        seconds = int(rate * (self._total - self._done))
        return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"

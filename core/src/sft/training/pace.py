"""How fast a run goes, and so when its last step will be done."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sft.context import CoreRun
    from sft.data.batches import Schedule

RECENT = 200
"""Steps whose mean says how long one takes: a run may become slower, or faster."""

Pauses = Callable[[int], tuple[int, int]]
"""Step → how many evaluations and checkpoints come after it, up to the end of the last step."""


class Pace:
    """The seconds of steps, and of the evaluations and checkpoints between them.

    The first step of a process is left out as soon as there is another: it also waits for what is made once. An
    evaluation or a checkpoint costs nothing until one has been seen.
    """

    def __init__(self, total: int, done: int, pauses: Pauses = lambda step: (0, 0)) -> None:
        self._total, self._done, self._pauses = total, done, pauses
        self._mark = time.monotonic()
        self._first: float | None = None
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._evaluations: list[float] = []
        self._checkpoints: list[float] = []

    def step(self, number: int) -> None:
        """Step ``number`` has been made, or left out."""
        seconds, self._done = self._since(), number
        if self._first is None:
            self._first = seconds
        else:
            self._steps.append(seconds)

    def evaluated(self, seconds: float | None = None) -> None:
        """An evaluation has been made since what came last; or, before the first step, one of ``seconds``."""
        self._evaluations.append(self._since() if seconds is None else seconds)

    def saved(self) -> None:
        """A checkpoint has been written since what came last."""
        self._checkpoints.append(self._since())

    def _since(self) -> float:
        before, self._mark = self._mark, time.monotonic()
        return self._mark - before

    @property
    def timed(self) -> int:
        """How many steps are known beside the first."""
        return len(self._steps)

    @property
    def seconds_a_step(self) -> float | None:
        """None before there was a step."""
        return sum(self._steps) / len(self._steps) if self._steps else self._first

    @property
    def left(self) -> float | None:
        """Seconds until the last step, with what is due after it, is done; None before there was a step."""
        a_step = self.seconds_a_step
        if a_step is None:
            return None
        evaluations, checkpoints = self._pauses(self._done)
        pauses = evaluations * _mean(self._evaluations) + checkpoints * _mean(self._checkpoints)
        return a_step * (self._total - self._done) + pauses


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def pauses_of(run: CoreRun, schedule: Schedule) -> Pauses:
    """What the settings of a run ask for after each step; what hooks ask for is not known beforehand."""
    training, total = run.settings.training, schedule.total_steps
    per_pass = None
    if "epoch" in (training.evaluation_strategy, training.save_strategy) and not run.settings.data.lazy:
        per_pass = math.ceil(len(schedule.first_rows) / schedule.rows_per_step)

    def times(strategy: str, every: int, done: int) -> int:
        if strategy == "steps":
            return total // every - done // every
        if strategy == "epoch" and per_pass is not None:  # also where the end cuts a pass short
            return math.ceil(total / per_pass) - done // per_pass
        return 0

    def pauses(done: int) -> tuple[int, int]:
        evaluations = times(training.evaluation_strategy, run.eval_steps, done) if run.dev_data is not None else 0
        return evaluations, times(training.save_strategy, training.save_steps, done)

    return pauses

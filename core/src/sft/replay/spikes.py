"""Steps whose figures stand out among those around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sft.training.steps_file import StepFigures

AROUND = 12
"""Steps on each side whose median is what is usual. Near an end of the run there are as many on one side as are left
on the other, so that a loss that falls makes no spike of its first steps; the very first and last have none."""
WIDE = 50
"""Steps on each side by which it is judged how much figures differ anyway."""
LEAST = 5.0
"""How many of these differences (robust standard deviations) make a spike."""
_MAD = 1.4826
"""A median of absolute deviations times this is the standard deviation of a normal distribution."""
_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Spike:
    """A step that stands out.

    Attributes:
        loss, usual_loss: Of the step, and the median of those around it.
        loss_score: How many robust standard deviations lie between them, below 0 for a loss that is lower than usual.
        grad_norm, usual_grad_norm, norm_score: Likewise; norms are compared by their logarithms.
    """

    step: int
    loss: float
    usual_loss: float
    loss_score: float
    grad_norm: float
    usual_grad_norm: float
    norm_score: float

    @property
    def score(self) -> float:
        """How much it stands out: infinitely, where the step was skipped. Gradients that are smaller than usual are no
        spike by themselves."""
        return max(abs(self.loss_score), self.norm_score)

    @property
    def direction(self) -> int:
        """1 or -1: its loss is higher, or lower, than usual; 0: it is the gradients that stand out."""
        return 0 if abs(self.loss_score) < self.norm_score else int(math.copysign(1, self.loss_score))


def spikes(figures: StepFigures, most: int) -> list[Spike]:
    """The ``most`` steps that stand out most, of those that do by :data:`LEAST`; those that stand out more come
    first."""
    taken = np.flatnonzero(figures.taken)
    if not len(taken):
        return []
    losses, norms = figures.loss[taken], np.log(np.maximum(figures.grad_norm[taken], np.finfo(np.float64).tiny))
    usual_loss, loss_scores = scores(losses)
    usual_norm, norm_scores = scores(norms)
    found = [
        Spike(
            int(taken[at]) + 1,
            float(losses[at]),
            float(usual_loss[at]),
            float(loss_scores[at]),
            float(figures.grad_norm[taken[at]]),
            float(np.exp(usual_norm[at])),
            float(norm_scores[at]),
        )
        for at in np.flatnonzero(np.maximum(np.abs(loss_scores), norm_scores) >= LEAST)
    ]
    for skipped in np.flatnonzero(figures.known & ~figures.taken):
        before = max(0, int(np.searchsorted(taken, skipped)) - 1)
        loss, norm = float(figures.loss[skipped]), float(figures.grad_norm[skipped])
        usual = float(usual_loss[before]), float(np.exp(usual_norm[before]))
        found.append(Spike(int(skipped) + 1, loss, usual[0], math.inf, norm, usual[1], math.inf))
    return sorted(found, key=lambda one: (-one.score, one.step))[:most]


def scores(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of float64 [n] what is usual around each value, and by how many robust standard deviations it is above that."""
    usual = median_around(values, AROUND, symmetric=True)
    differences = values - usual
    spread = _MAD * median_around(np.abs(differences), WIDE, symmetric=False)
    least = 1e-9 * np.maximum(1.0, np.abs(usual))  # what rounding alone makes is no spread
    return usual, differences / np.maximum(spread, least)


def median_around(values: np.ndarray, width: int, symmetric: bool) -> np.ndarray:
    """Of each value of float64 [n] the median of ``width`` on each side of it: near an end, of as many as there are,
    or, if it is to be ``symmetric``, of equally many on both sides. Where there are none, the value.

    The value itself is not among them: where a loss only falls it would be its own median, and nothing would differ.
    """
    count = len(values)
    found = np.empty(count)
    inner = range(width, count - width)
    if len(inner):
        windows = np.lib.stride_tricks.sliding_window_view(values, 2 * width + 1)
        for first in range(0, len(windows), _AT_ONCE):
            part = windows[first : first + _AT_ONCE]
            found[width + first : width + first + len(part)] = np.median(np.delete(part, width, axis=1), axis=1)
    for at in (*range(min(width, count)), *range(max(width, count - width), count)):
        before = min(at, width, count - 1 - at) if symmetric else min(at, width)
        after = before if symmetric else min(count - 1 - at, width)
        others = np.delete(values[at - before : at + after + 1], before)
        found[at] = np.median(others) if len(others) else values[at]
    return found

"""Steps that stand out: which figures make one, and which do not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sft.replay.spikes import AROUND, LEAST, WIDE, median_around, scores, spikes
from sft.training.steps_file import StepFigures


def figures(loss: np.ndarray, norm: np.ndarray | None = None) -> StepFigures:
    norm = np.ones(len(loss)) if norm is None else norm
    return StepFigures(loss, norm, np.ones(len(loss), bool))


def falling(count: int, noise: float = 0.05, seed: int = 0) -> np.ndarray:
    """A loss as runs have it: it falls fast, then slowly, with noise."""
    draw = np.random.default_rng(seed)
    steps = np.arange(count)
    return 1.5 + 3 * np.exp(-steps / 30) + noise * draw.standard_normal(count)


@pytest.mark.parametrize("count", [1, 2, 5, 2 * AROUND, 2 * AROUND + 1, 97])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_median_is_that_of_the_others_around(count: int, symmetric: bool) -> None:
    values = np.random.default_rng(count).standard_normal(count)
    expected = []
    for at in range(count):
        before, after = min(at, AROUND), min(count - 1 - at, AROUND)
        if symmetric:
            before = after = min(before, after)
        expected.append(sorted([*values[at - before : at], *values[at + 1 : at + after + 1]] or [values[at]]))
    medians = [(one[(len(one) - 1) // 2] + one[len(one) // 2]) / 2 for one in expected]
    np.testing.assert_allclose(median_around(values, AROUND, symmetric), medians, rtol=0, atol=1e-15)


def test_scores_are_standard_deviations() -> None:
    values = np.random.default_rng(0).standard_normal(20_000)
    _, found = scores(values)
    assert abs(found[WIDE:-WIDE].std() - 1) < 0.1


def test_a_loss_that_falls_is_no_spike() -> None:
    assert spikes(figures(falling(600)), 100) == []
    assert spikes(figures(np.linspace(5, 1, 50)), 100) == []
    assert spikes(figures(np.full(50, 1.25)), 100) == []
    assert spikes(figures(np.zeros(0)), 100) == []


@pytest.mark.parametrize("at", [3, 40, 300, 590])
@pytest.mark.parametrize("kind", ["up", "down", "norm"])
def test_one_step_that_stands_out_is_the_one(at: int, kind: str) -> None:
    loss, norm = falling(600), np.exp(0.1 * np.random.default_rng(1).standard_normal(600))
    if kind == "norm":
        norm[at] *= 6
    else:
        loss[at] += 1.5 if kind == "up" else -1.2
    (found,) = spikes(figures(loss, norm), 100)
    assert (found.step, found.loss, found.grad_norm) == (at + 1, loss[at], norm[at])
    assert found.direction == {"up": 1, "down": -1, "norm": 0}[kind]
    assert found.score >= LEAST
    assert abs(found.usual_loss - (1.5 + 3 * math.exp(-at / 30))) < 0.2


def test_gradients_that_are_small_are_no_spike() -> None:
    norm = np.exp(0.1 * np.random.default_rng(1).standard_normal(200))
    norm[100] = 1e-3
    assert spikes(figures(falling(200), norm), 10) == []


def test_those_that_stand_out_more_come_first_and_no_more_than_asked_for() -> None:
    loss = falling(600)
    for at, height in ((100, 2.0), (200, 4.0), (300, 3.0)):
        loss[at] += height
    assert [one.step for one in spikes(figures(loss), 10)] == [201, 301, 101]
    assert [one.step for one in spikes(figures(loss), 2)] == [201, 301]


def test_steps_that_were_skipped_come_before_all_others_and_steps_that_are_not_known_are_passed_over() -> None:
    loss, norm, known = falling(200), np.ones(200), np.ones(200, bool)
    loss[50] += 3
    loss[120], norm[130] = math.nan, math.inf
    known[:10], loss[:10], norm[:10] = False, math.nan, math.nan
    found = spikes(StepFigures(loss, norm, known), 10)
    assert [one.step for one in found] == [121, 131, 51]
    assert [math.isinf(one.score) for one in found] == [True, True, False]

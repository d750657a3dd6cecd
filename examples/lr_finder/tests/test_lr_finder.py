"""What the README promises: rates, the average of the formula, the end, and a resumed run."""

import numpy as np
import pytest

import sft
from sft.testing import suite
from sft_lr_finder import steepest

TestLrFinder = suite("lr-finder")


@pytest.fixture(scope="session")
def run_settings():
    return {"plugin": ["lr-finder"], "max_steps": 8, "logging_steps": 1, "lr_finder_low": 1e-4, "lr_finder_high": 1e3}


def logged(metrics, folder):
    return [line for line in metrics(folder) if "loss" in line]


def test_rates_grow_by_one_factor_and_losses_are_averaged(train, metrics, tmp_path):
    train(lr_finder_high=1e-2, lr_finder_smoothing=0.5)
    lines = logged(metrics, tmp_path / "out")
    np.testing.assert_allclose([line["learning_rate"] for line in lines], np.logspace(-4, -2, 8), rtol=1e-12)
    for number, line in enumerate(lines, start=1):
        weights = 0.5 ** np.arange(number)[::-1]
        expected = np.average([one["loss"] for one in lines[:number]], weights=weights)
        assert line["lr-finder/smoothed"] == pytest.approx(expected, rel=1e-12)


def test_a_run_that_diverges_ends_and_names_a_rate(train, metrics, tmp_path):
    said = []
    summary = train(say=said.append, lr_finder_diverged=1.05, lr_finder_smoothing=0)
    lines = logged(metrics, tmp_path / "out")
    assert summary.stopped_early["step"] == lines[-1]["step"] < 8
    losses = [line["loss"] for line in lines]
    assert [loss > 1.05 * min(losses[: n + 1]) for n, loss in enumerate(losses)] == [False] * (len(losses) - 1) + [True]
    (found,) = [text for text in said if text.startswith("lr-finder: ")]
    assert f"({len(lines)} steps)" in found


def test_the_steepest_place_of_a_known_curve():
    rates = np.logspace(-6, 0, 601)
    # log10 of the rate from -6 to 0: a sigmoid that falls fastest at 10^-3
    losses = 3 / (1 + np.exp(4 * (np.log10(rates) + 3)))
    assert steepest(list(zip(rates, losses, strict=True))) == pytest.approx(1e-3, rel=0.03)
    assert steepest([[1e-3, 1.0], [1e-2, 2.0]]) is None
    assert steepest([[1e-3, 1.0]]) is None


def test_a_resumed_run_has_the_whole_curve(train, metrics, tmp_path):
    steps = {"lr_finder_high": 1e-2, "save_strategy": "steps", "save_steps": 3}
    train("whole", **steps)
    train("resumed", **steps, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    whole, resumed = (logged(metrics, tmp_path / name) for name in ("whole", "resumed"))
    smoothed = {line["step"]: line["lr-finder/smoothed"] for line in whole}
    assert [line["step"] for line in resumed][-1] == 8
    assert all(line["lr-finder/smoothed"] == smoothed[line["step"]] for line in resumed)


def test_a_low_that_is_high_is_refused(train):
    with pytest.raises(sft.UsageError, match=r"lr_finder_low 1 is not below lr_finder_high 0\.1"):
        train(lr_finder_low=1, lr_finder_high=0.1)

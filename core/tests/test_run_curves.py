"""Curves of a run, from lines as `metrics.jsonl` has them."""

from __future__ import annotations

import numpy as np

from sft.run_report.curves import curves_of, moments_of, thinned


def test_a_long_curve_keeps_its_spikes() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[[31_234, 77_777]] = 50.0, -50.0
    steps, kept = thinned(list(range(1, 100_001)), values.tolist(), 2000)
    assert len(steps) <= 2002
    assert (steps[0], steps[-1]) == (1, 100_000)
    assert steps == sorted(set(steps))
    assert {31_235, 77_778} <= set(steps)
    assert [values[step - 1] for step in steps] == kept
    # Each stretch still reaches as far up and down.
    for start in range(0, 100_000, 5_000):
        inside = [value for step, value in zip(steps, kept, strict=True) if start < step <= start + 5_000]
        stretch = values[start : start + 5_000]
        assert (min(inside), max(inside)) == (stretch.min(), stretch.max())


def test_each_dev_set_and_each_number_of_a_plugin_has_a_curve() -> None:
    lines = [
        {"step": 0, "eval_loss": 2.0, "eval_sets": {"a": {"eval_loss": 1.0}, "b": {"eval_loss": 3.0}}},
        {"step": 1, "loss": 4.0, "tokens": 6, "seconds": 0.0, "padding_tokens": 2, "toy/rate": 0.5},
        {"step": 1, "eval_loss": 1.0, "eval_toy/rate": 0.25, "eval_bleu4": 0.125, "eval_objective": 9.0},
    ]
    found = {(one.chart, one.name): (one.steps, one.values) for one in curves_of(lines)}
    assert found == {
        ("loss", "train"): ([1], [4.0]),
        ("loss", "dev"): ([0, 1], [2.0, 1.0]),
        ("loss", "dev a"): ([0], [1.0]),
        ("loss", "dev b"): ([0], [3.0]),
        ("padding", "train"): ([1], [0.25]),
        ("objective", "dev"): ([1], [9.0]),
        ("answers", "bleu4"): ([1], [0.125]),
        ("toy/rate", "train"): ([1], [0.5]),
        ("toy/rate", "dev"): ([1], [0.25]),
    }
    assert moments_of(lines).tokens == [6]

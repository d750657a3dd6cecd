"""The paper's formula, tried by `sft certify` on a small run: the group ``sft.certify`` in pyproject.toml."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import sft

PREFIX, END = "base_model.model.", ".vera_lambda_d"


def check_adds_its_update(lab: Any) -> None:
    """y = x·W + ((x·A) ⊙ d)·B ⊙ b (arXiv 2310.11454, equation 2) with one pair A, B for all layers, of the files."""
    import paddle

    outcome = lab.run(started=lambda run: run.model, vera_rank=4)
    _, tensors = sft.read_adapter(outcome.folder)
    layers = dict(outcome.started.named_sublayers())
    shared_a, shared_b = (tensors[f"base_model.vera_{half}"].astype(np.float64).T for half in "AB")
    names = [name for name in tensors if name.endswith(END)]
    assert names, "no vector d is written"
    for name in names:
        layer = layers[name.removeprefix(PREFIX).removesuffix(END)]
        d, b = (tensors[name[:-1] + which].astype(np.float64) for which in "db")
        weight = sft.linear_weight(layer.base).numpy().astype(np.float64)
        x = np.random.default_rng(0).standard_normal((5, weight.shape[0])).astype(np.float32)
        expected = x @ weight + ((x @ shared_a[: x.shape[1]]) * d) @ shared_b[:, : len(b)] * b
        off = np.abs(layer(paddle.to_tensor(x)).numpy() - expected).max()
        assert off <= 1e-5 * np.abs(expected).max(), f"{name}: {off:.2e} apart"


def check_begins_as_the_paper_says(lab: Any) -> None:
    """A and B are Kaiming-uniform, U(±√(6/fan)); d is 0.1 and b zero."""

    def look(run: sft.Run) -> dict[str, np.ndarray]:
        return {name: one.numpy() for name, one in run.model.named_parameters() if "vera_" in name}

    outcome = lab.run(started=look, vera_rank=16)
    for name, value in outcome.started.items():
        expected = 0.1 if name.endswith("vera_d") else 0.0
        assert np.allclose(value, expected), f"{name} does not begin at {expected}"
    _, tensors = sft.read_adapter(outcome.folder)
    for half in "AB":
        pair = tensors[f"base_model.vera_{half}"]
        values = pair.reshape(-1) * math.sqrt(pair.shape[1] / 6)
        assert np.abs(values).max() <= 1 + 1e-6, f"{half} reaches {np.abs(values).max():.2f} times √(6/fan)"
        assert abs(values.std() * math.sqrt(3) - 1) < 0.1, f"{half} is not uniform to √(6/fan)"


VERA = (check_adds_its_update, check_begins_as_the_paper_says)

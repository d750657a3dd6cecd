"""The losses of tokens: against their formulas in float64 by autograd over whole logits, and against torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.testing import token_loss
from sft_objectives.focal_loss import Focal
from sft_objectives.label_smoothing import Smoothed
from sft_objectives.z_loss import Normalised

FIXTURES = Path(__file__).parent / "fixtures"


def logits_and_labels() -> tuple[np.ndarray, np.ndarray]:
    """Float32 [12, 37] of up to ±12, one of them a certainty; two positions have no label."""
    generator = np.random.default_rng(3)
    logits = (4 * generator.standard_normal((12, 37))).astype(np.float32)
    labels = generator.integers(0, 37, 12)
    logits[4, labels[4]] = 60.0
    labels[[2, 9]] = -100
    return logits, labels


def in_float64(paddle: Any, formula: Callable[..., Any]) -> tuple[float, np.ndarray]:
    """Σ ``formula(−log p [n, 1], logits [n, V])`` over the labels, and its gradient in the logits."""
    logits, labels = logits_and_labels()
    wide = paddle.to_tensor(logits.astype(np.float64), stop_gradient=False)
    kept = paddle.gather(wide, paddle.to_tensor(np.flatnonzero(labels != -100)))
    label = paddle.to_tensor(labels[labels != -100])[:, None]
    cross_entropy = -paddle.take_along_axis(paddle.nn.functional.log_softmax(kept, axis=-1), label, axis=-1)
    found = formula(cross_entropy, kept).sum()
    found.backward()
    return float(found), wide.grad.numpy()


FORMULAS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "smoothing": (
        Smoothed(0.2),
        lambda nats, z: 0.8 * nats + 0.2 * (z.exp().sum(-1, keepdim=True).log() - z.mean(-1, keepdim=True)),
    ),
    "focal 2": (Focal(2.0), lambda nats, z: (1 - (-nats).exp()) ** 2 * nats),
    "focal 1.5": (Focal(1.5), lambda nats, z: (1 - (-nats).exp()).clip(min=1e-12) ** 1.5 * nats),
    "focal 0": (Focal(0.0), lambda nats, z: nats),
    "z": (Normalised(0.01), lambda nats, z: nats + 0.01 * z.exp().sum(-1, keepdim=True).log() ** 2),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient_are_those_of_the_formula(paddle: Any, name: str) -> None:
    part, formula = FORMULAS[name]
    expected, gradient = in_float64(paddle, formula)
    value, found = token_loss(part, *logits_and_labels())
    assert value == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(found, gradient, atol=2e-6, rtol=0)
    assert not found[[2, 9]].any()


def test_smoothing_is_torchs(paddle: Any) -> None:
    """``F.cross_entropy(…, label_smoothing=0.1)`` in float64: fixtures/make_smoothing.py."""
    with np.load(FIXTURES / "smoothing.npz") as torch:
        value, gradient = token_loss(Smoothed(0.1), torch["logits"], torch["labels"])
        assert value == pytest.approx(float(torch["loss"]), rel=1e-6)
        np.testing.assert_allclose(gradient, torch["gradient"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_a_token_that_is_certain_learns_nothing_and_breaks_nothing(paddle: Any, gamma: float) -> None:
    """Its probability is 1 to the last bit, where 1 − p has no slope for γ < 1."""
    logits = np.array([[200.0, 0.0, 0.0]], np.float32)
    value, gradient = token_loss(Focal(gamma), logits, np.array([0]))
    assert value == 0.0
    assert np.abs(gradient).max() < 1e-5


@pytest.mark.parametrize(
    "asked",
    ["z-loss focal-loss label-smoothing", pytest.param("label-smoothing focal-loss z-loss", marks=pytest.mark.slow)],
)
def test_a_run_learns_them_in_their_order(train: Any, metrics: Any, tmp_path: Path, asked: str) -> None:
    """Together, whatever the order in which they are asked for: smoothing, then focal, then z. Options decide."""
    given = {"label_smoothing_factor": 0.3, "focal_loss_gamma": 1.0, "z_loss_weight": 0.5, "max_steps": 1}
    settings = {**given, "do_eval": False, "per_device_train_batch_size": 2, "max_grad_norm": 0}
    seen: list[tuple[Any, np.ndarray]] = []

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_micro_batch(self, run: sft.Run, batch: sft.Batch) -> None:
            import paddle

            from sft.parallel import hidden_states

            with paddle.no_grad():
                seen.append((run.model.lm_head(hidden_states(run.model, batch)).numpy(), batch.labels))

    train("out", (Look,), plugin=asked.split(), **settings)
    [(logits, labels)] = seen
    z = logits[labels != -100].astype(np.float64)
    normaliser = np.log(np.exp(z).sum(-1))
    own = normaliser - z[np.arange(len(z)), labels[labels != -100]]
    expected = (1 - np.exp(-own)) * (0.7 * own + 0.3 * (normaliser - z.mean(-1))) + 0.5 * normaliser**2
    [line] = metrics(tmp_path / "out")
    assert line["loss"] == pytest.approx(expected.mean(), rel=1e-5)


@pytest.mark.slow
def test_a_setting_asks_for_smoothing_and_cross_entropy_is_measured(train: Any, metrics: Any, tmp_path: Path) -> None:
    """Before training, of equal models: the same dev loss; the objective beside it."""
    train("smoothed", label_smoothing_factor=0.1, max_steps=1)
    train("plain", max_steps=1)
    smoothed, plain = metrics(tmp_path / "smoothed"), metrics(tmp_path / "plain")
    assert smoothed[0]["eval_loss"] == plain[0]["eval_loss"]
    assert smoothed[0]["eval_objective"] > smoothed[0]["eval_loss"] * 0.9
    assert json.loads((tmp_path / "smoothed" / "run.json").read_text())["settings"]["plugin"][0] == "label-smoothing"


@pytest.mark.slow
def test_another_factor_is_no_run_to_go_on_with(train: Any, tmp_path: Path) -> None:
    settings = {"label_smoothing_factor": 0.1, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train("out", **settings)
    with pytest.raises(sft.UsageError, match="label_smoothing_factor"):
        train("out", **{**settings, "label_smoothing_factor": 0.2, "resume_from_checkpoint": "auto", "max_steps": 3})

"""The norm of all gradients together, and clipping by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from adamw import gradients_of, parameters_of

from sft.settings.arguments import TrainingArguments


@pytest.mark.parametrize("max_norm", [0.5, 2.0, 1e6, 0.0])
def test_clipping_is_by_the_global_norm(paddle: Any, max_norm: float) -> None:
    """One step of AdamW sees the clipped gradients in its first moment."""
    from sft.training.adamw import AdamW
    from sft.training.groups import default_groups
    from sft.training.loop import clip_factor
    from sft.training.strategy import SingleProcess

    parameters, gradients = parameters_of(paddle), gradients_of(1)
    optimizer = AdamW(default_groups(parameters, 0.0), TrainingArguments())
    for name, parameter in parameters.items():
        parameter.grad = paddle.to_tensor(gradients[name][0])
    idle = paddle.create_parameter([2], "float32")
    norm = np.sqrt(sum((gradients[name][0].astype(np.float64) ** 2).sum() for name in parameters))
    found = SingleProcess().grad_norm({**parameters, "idle": idle})
    assert found == pytest.approx(norm, rel=1e-6)
    optimizer.step(0.1, clip_factor(found, max_norm))
    factor = min(1.0, max_norm / norm) if max_norm else 1.0
    for name in parameters:
        expected = 0.1 * gradients[name][0] * factor
        np.testing.assert_allclose(optimizer.state()[f"{name}.moment1"], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("few", "lot", "calls"), [(16384, 1 << 20, 2), (16384, 200, 3), (0, 1 << 20, 9)])
def test_small_gradients_are_measured_together(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, few: int, lot: int, calls: int
) -> None:
    """And one of 20,000 values alone: ``calls`` parts, of which each has 1e-7."""
    from sft.training import strategy

    monkeypatch.setattr(strategy, "FEW", few)
    monkeypatch.setattr(strategy, "LOT", lot)
    own, measured = strategy._squared, []
    monkeypatch.setattr(strategy, "_squared", lambda part: (measured.append(part.size), own(part))[1])
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape).astype(np.float32) for shape in [(8, 9)] * 4 + [(20, 1000)] + [(7,)] * 4]
    parameters = [paddle.create_parameter(value.shape, "float32") for value in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = paddle.to_tensor(value)
    found = strategy.squared_gradients(parameters)
    assert len(measured) == calls
    assert sum(measured) == sum(value.size for value in values)
    assert found == pytest.approx(sum((value.astype(np.float64) ** 2).sum() for value in values), rel=3e-7)


def test_without_gradients_the_norm_is_zero(paddle: Any) -> None:
    from sft.training.strategy import SingleProcess

    assert SingleProcess().grad_norm({"w": paddle.create_parameter([2], "float32")}) == 0.0

"""The norm of all gradients together, and clipping by it."""

from __future__ import annotations

from types import SimpleNamespace
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


def test_a_step_is_read_as_its_parts_are(paddle: Any) -> None:
    """By one process; and by those of subclasses that sum over processes or have a norm of their own, whatever they
    inherit: two processes would each have half the loss, or half the squares."""
    from sft.training.strategy import SingleProcess, outcome

    class Sums(SingleProcess):
        def sum(self, values: Any) -> list[float]:
            assert all(isinstance(value, float) for value in values)
            return [2 * value for value in values]

    class Norms(SingleProcess):
        def grad_norm(self, stepped: Any) -> float:
            return 2 * super().grad_norm(stepped)

    weight = paddle.create_parameter([2, 2], "float32")
    weight.grad = paddle.to_tensor([[1.0, 2.0], [2.0, 4.0]])
    stepped = {"weight": weight, "idle": paddle.create_parameter([2], "float32")}
    for loss in (1.5, paddle.to_tensor(1.5, "float64"), paddle.to_tensor([1.5], "float32")):
        assert outcome(SingleProcess(), loss, [3.0], stepped) == [1.5, 3.0, 5.0]
        assert outcome(Sums(), loss, [3.0], stepped) == [3.0, 6.0, 5.0]
        assert outcome(Norms(), loss, [3.0], stepped) == [1.5, 3.0, 10.0]


def test_a_strategy_without_an_outcome_is_asked_for_its_parts() -> None:
    from sft.training.strategy import outcome

    parts: Any = SimpleNamespace(sum=lambda values: [2 * value for value in values], grad_norm=lambda stepped: 7.0)
    assert outcome(parts, 1.5, [3.0], {}) == [3.0, 6.0, 7.0]


def test_without_gradients_the_norm_is_zero(paddle: Any) -> None:
    from sft.training.strategy import SingleProcess

    assert SingleProcess().grad_norm({"w": paddle.create_parameter([2], "float32")}) == 0.0

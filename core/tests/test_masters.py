"""Parameters of 16 bits: the optimizer steps float32 masters of them, which travel with its state."""

from __future__ import annotations

from typing import Any

import numpy as np
from adamw import adamw

from sft.seams import ParameterGroup
from sft.settings.arguments import TrainingArguments


def test_parameters_of_16_bits_are_stepped_as_float32_masters(paddle: Any) -> None:
    """Steps of 1e-4 at values of 1, where bfloat16 resolves 4e-3: the parameters alone would never move."""
    from sft.training.adamw import AdamW
    from sft.training.groups import default_groups

    start = np.linspace(0.5, 1.5, 12, dtype=np.float32).reshape(4, 3)
    narrow = paddle.to_tensor(start).astype("bfloat16")
    exact = narrow.astype("float32").numpy()
    parameter = paddle.base.framework.EagerParamBase.from_tensor(narrow)
    parameter.stop_gradient = False
    training = TrainingArguments()
    optimizer = AdamW(default_groups({"w": parameter}, 0.0), training)
    gradients = np.random.default_rng(3).standard_normal((40, 4, 3)).astype(np.float32) * 0.1 + 1
    rounded = [paddle.to_tensor(g).astype("bfloat16") for g in gradients]
    for gradient in rounded:
        parameter.grad = gradient
        optimizer.step(1e-4, 0.5)
        assert parameter.grad is None or not parameter.grad.astype("float32").numpy().any()
    seen = np.stack([gradient.astype("float32").numpy() for gradient in rounded]) * 0.5
    expected = adamw(exact, list(seen), [1e-4] * 40, 0.0, training)
    np.testing.assert_allclose(optimizer.state()["w.master"], expected, atol=2e-6, rtol=0)
    again = paddle.to_tensor(optimizer.state()["w.master"]).astype("bfloat16").astype("float32").numpy()
    np.testing.assert_array_equal(parameter.astype("float32").numpy(), again)
    assert str(parameter.dtype) == "paddle.bfloat16"
    assert np.abs(parameter.astype("float32").numpy() - exact).max() > 3e-3


def test_masters_travel_with_the_state(paddle: Any) -> None:
    from sft.training.adamw import AdamW
    from sft.training.groups import default_groups

    def make() -> tuple[Any, Any]:
        value = paddle.to_tensor(np.linspace(0.5, 1.5, 6, dtype=np.float32).reshape(2, 3)).astype("bfloat16")
        parameter = paddle.base.framework.EagerParamBase.from_tensor(value)
        parameter.stop_gradient = False
        return parameter, AdamW(default_groups({"w": parameter}, 0.0), TrainingArguments())

    def step(parameter: Any, optimizer: Any) -> None:
        parameter.grad = paddle.ones([2, 3], "bfloat16")
        optimizer.step(1e-4)

    whole, stopped, resumed = make(), make(), make()
    for _ in range(4):
        step(*whole)
    step(*stopped)
    resumed[1].load(stopped[1].state())
    for _ in range(3):
        step(*resumed)
    for key, value in whole[1].state().items():
        np.testing.assert_array_equal(resumed[1].state()[key], value)


def test_micro_batches_of_16_bits_are_stepped_by_their_exact_sum(paddle: Any) -> None:
    """Five steps of eight micro-batches, against the paper's AdamW in float64 on exact sums. In 16 bits they would be
    off by up to 1e-2."""
    from sft.training.adamw import AdamW
    from sft.training.wide_sums import WideSums

    parameter = paddle.base.framework.EagerParamBase.from_tensor(paddle.ones([64]).astype("bfloat16"))
    parameter.stop_gradient = False
    optimizer = AdamW([ParameterGroup("all", {"p": parameter})], TrainingArguments())
    draws = 1 + 0.1 * np.random.default_rng(0).standard_normal((5, 8, 64)).astype(np.float32)
    sums, exact = WideSums([parameter]), []
    for draw in draws:
        gradients = [paddle.to_tensor(one).astype("bfloat16") for one in draw]
        for gradient in gradients:
            with sums.backward():
                (parameter * gradient).sum().backward()
        exact.append(sum(gradient.astype("float64").numpy() for gradient in gradients) / 2)
        optimizer.step(0.01, 0.5)
        assert parameter.grad is None
    expected = adamw(np.ones(64), exact, [0.01] * 5, 0.0, TrainingArguments())
    np.testing.assert_allclose(optimizer.state()["p.master"], expected, rtol=1e-6)

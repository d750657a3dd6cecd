"""Gradients of 16-bit parameters add up in float32, over however many micro-batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def parameter_of(paddle: Any, dtype: str, size: int = 64) -> Any:
    made = paddle.base.framework.EagerParamBase.from_tensor(paddle.ones([size]).astype(dtype))
    made.stop_gradient = False
    return made


def gradients_of(paddle: Any, dtype: str, count: int) -> list[Any]:
    """Near 1, so that a sum of many soon has no room for a summand's bits."""
    draws = 1 + 0.1 * np.random.default_rng(0).standard_normal((count, 64)).astype(np.float32)
    return [paddle.to_tensor(draw).astype(dtype) for draw in draws]


@pytest.mark.parametrize("is_last", [True, False])
@pytest.mark.parametrize("count", [8, 250])
def test_micro_batches_of_16_bits_add_up_as_in_float64(paddle: Any, count: int, is_last: bool) -> None:
    """The gradient of Σ p·g is g. What paddle does by itself is far off. Likewise where p·g goes on to another process,
    from which a gradient of 1 comes back."""
    from sft.training.loop import Learning
    from sft.training.wide_sums import WideSums

    gradients = gradients_of(paddle, "bfloat16", count)
    expected = sum(gradient.astype("float64").numpy() for gradient in gradients)
    summed, plain = (parameter_of(paddle, "bfloat16") for _ in range(2))
    learning: Any = Learning(None, 1.0, sums=WideSums([summed]))  # type: ignore[arg-type]
    for gradient in gradients:
        output = summed * gradient
        learning.backward(*([output.sum()] if is_last else [output, paddle.ones_like(output)]))
        (plain * gradient).sum().backward()
    assert summed.grad.dtype == paddle.float32
    np.testing.assert_allclose(summed.grad.numpy(), expected, rtol=1e-6)
    assert np.abs(plain.grad.astype("float32").numpy() / expected - 1).max() > 3e-3


def test_float32_parameters_are_left_to_paddle(paddle: Any) -> None:
    from sft.training.wide_sums import WideSums

    parameter = parameter_of(paddle, "float32")
    sums = WideSums([parameter])
    for _ in range(2):
        with sums.backward():
            (parameter * 3).sum().backward()
    np.testing.assert_array_equal(parameter.grad.numpy(), 6)


def test_a_parameter_that_a_micro_batch_does_not_reach_keeps_its_sum(paddle: Any) -> None:
    """Experts that no token is led to; and a gradient that was there before, as another hook may take them away."""
    from sft.training.wide_sums import WideSums

    one, other = (parameter_of(paddle, "bfloat16") for _ in range(2))
    sums = WideSums([one, other])
    for reached in ([one, other], [one], [one]):
        with sums.backward():
            paddle.add_n([(parameter * 2).sum() for parameter in reached]).backward()
    np.testing.assert_array_equal(one.grad.numpy(), 6)
    np.testing.assert_array_equal(other.grad.numpy(), 2)

"""Long sums against float64: what is large and what is small by the hundred thousand, in one sum."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

VOCABULARIES = [49_152, 151_936, 256_000, 50_257]
"""SmolLM2's, Qwen2.5's, Gemma's, and GPT-2's, which 16 does not divide."""


def peaked_head(paddle: Any, columns: int, kind: str) -> tuple[Any, np.ndarray]:
    """An lm_head [1, V] of multiples of 1/1024, so that logits of one input are exact, and what it holds."""
    weight = np.zeros((1, columns), np.float32)
    if kind == "spread":
        weight = np.round(np.random.default_rng(0).standard_normal((1, columns)) * 1024).astype(np.float32) / 1024
    weight[0, columns // 3] = 17.375  # e^-17.375 is just below half a unit in 1's last place
    return SimpleNamespace(weight=paddle.to_tensor(weight, stop_gradient=False), transpose_y=False), weight


@pytest.mark.parametrize("kind", ["flat", "spread"])
@pytest.mark.parametrize("columns", VOCABULARIES)
def test_the_loss_of_peaked_logits(paddle: Any, columns: int, kind: str) -> None:
    """In training, its gradients too, and in evaluation. Paddle's own sum is off by 1e-3 to 7e-3 where it is flat."""
    from sft.training.loss import target_loss, target_scores

    lm_head, weight = peaked_head(paddle, columns, kind)
    hidden = np.array([[[1.0], [1.0], [0.5]]], np.float32)
    labels = np.array([[columns // 3, 5, columns - 1]])
    logits = hidden[0].astype(np.float64) @ weight.astype(np.float64)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    difference = exponentials / exponentials.sum(-1, keepdims=True)
    losses = np.log(np.exp(logits).sum(-1)) - logits[range(3), labels[0]]
    difference[range(3), labels[0]] -= 1

    tensor = paddle.to_tensor(hidden, stop_gradient=False)
    loss = target_loss(tensor, labels, lm_head)
    loss.backward()
    assert float(loss) == pytest.approx(losses.sum(), rel=1e-6)
    assert target_scores(tensor, labels, lm_head)[0] == pytest.approx(losses.sum(), rel=1e-6)
    for position in range(3):  # each alone: no error hides behind another
        one = np.full_like(labels, -100)
        one[0, position] = labels[0, position]
        assert target_scores(tensor, one, lm_head)[0] == pytest.approx(losses[position], abs=1e-6)
    expected = hidden[0].astype(np.float64).T @ difference
    np.testing.assert_allclose(lm_head.weight.grad.numpy(), expected, rtol=1e-6, atol=1e-7)
    # A matrix product over V terms, which float32 rounds as often.
    np.testing.assert_allclose(tensor.grad.numpy()[0], difference @ weight[0][:, None], rtol=0, atol=1e-4 * 17.375)


def peaked(length: int) -> np.ndarray:
    """float32: one 1, then terms of which the running sum does not notice any."""
    values = np.full(length, 2.9e-8, np.float32)
    values[1] = 1.0
    return values


@pytest.mark.parametrize("length", [5, 16, 17, 576, 4097, 16_384, 50_257])
def test_rows_and_columns(paddle: Any, length: int) -> None:
    from sft import row_sums
    from sft.models.sums import column_sums

    values = np.stack([peaked(length), np.random.default_rng(0).random(length, np.float32)] * 3)
    expected = values.astype(np.float64).sum(-1)
    rows = row_sums(paddle.to_tensor(values.reshape([2, 3, length])))
    assert rows.shape == [2, 3, 1]
    np.testing.assert_allclose(rows.numpy().ravel(), expected, rtol=1e-6)
    columns = column_sums(paddle.to_tensor(np.ascontiguousarray(values.T)))
    np.testing.assert_allclose(columns.numpy(), expected, rtol=1e-6)


def test_the_norm_of_gradients(paddle: Any) -> None:
    """64 large values among four million: paddle's sum of their squares is off by 1e-5."""
    from sft.training.strategy import SingleProcess

    values = np.full((2048, 2049), 1.7e-4, np.float32)
    values[::32, 7] = 1.0
    parameters = {}
    for name, gradient in (("a", values), ("b", values[:, :5].copy()), ("c", None)):
        parameters[name] = paddle.create_parameter(values.shape if gradient is None else gradient.shape, "float32")
        parameters[name].grad = None if gradient is None else paddle.to_tensor(gradient)
    expected = np.sqrt(sum((part.astype(np.float64) ** 2).sum() for part in (values, values[:, :5])))
    assert SingleProcess().grad_norm(parameters) == pytest.approx(expected, rel=1e-6)


def test_the_norms_of_wide_rows_and_the_gradients_of_many(paddle: Any) -> None:
    """RMSNorm of rows of 16,384 with one large value, and its weight's gradient over 4,001 rows."""
    from sft.models.norms import rms_norm

    def grown(rows: int, size: int, large: float) -> np.ndarray:
        x = np.full((rows, size), 1.7e-4, np.float32)
        x[:, 3] = large
        return x

    wide = grown(2, 16_384, 1.0)
    y = rms_norm(paddle.to_tensor(wide), paddle.ones([16_384]), 0.0)
    root = np.sqrt((wide.astype(np.float64) ** 2).mean(-1, keepdims=True))
    np.testing.assert_allclose(y.numpy(), wide / root, rtol=1e-6)

    rows, size = 4_001, 16
    x, dy = np.ones((rows, size), np.float32), np.full((rows, size), 2.9e-8, np.float32)
    dy[1] = 1.0
    weight = paddle.ones([size])
    weight.stop_gradient = False
    rms_norm(paddle.to_tensor(x, stop_gradient=False), weight, 0.0).backward(paddle.to_tensor(dy))
    np.testing.assert_allclose(weight.grad.numpy(), dy.astype(np.float64).sum(0), rtol=1e-6)

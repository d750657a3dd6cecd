"""The loss where each of several processes has a part of the vocabulary: the value and gradients of the whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from shared_vocabulary import Columns, together

from sft.training.loss import Vocabulary

LENGTH, HIDDEN, VOCABULARY = 14, 8, 24


def head(paddle: Any, weight: np.ndarray, tied: bool, vocabulary: Vocabulary | None = None) -> Any:
    value = paddle.to_tensor(np.ascontiguousarray(weight.T if tied else weight), stop_gradient=False)
    return SimpleNamespace(weight=value, transpose_y=tied, vocabulary=vocabulary)


@pytest.fixture
def example() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """hidden [1, S, h], labels [1, S] with the edges of all parts among them, weight [h, V]."""
    generator = np.random.default_rng(7)
    hidden = generator.standard_normal((1, LENGTH, HIDDEN)).astype(np.float32)
    weight = generator.standard_normal((HIDDEN, VOCABULARY)).astype(np.float32)
    labels = np.array([[0, 7, 8, 11, 12, 15, 16, 23, -100, 3, 19, 12, -100, 5]])
    return hidden, labels, weight


def expected_of(hidden: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss and gradients, from softmax in float64."""
    hidden, weight = hidden[0].astype(np.float64), weight.astype(np.float64)
    exponentials = np.exp(hidden @ weight)
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    counted = labels[0] != -100
    places = np.flatnonzero(counted), labels[0][counted]
    loss, difference = -np.log(probabilities[places]).sum(), probabilities * counted[:, None]
    difference[places] -= 1
    return float(loss), difference @ weight.T, hidden.T @ difference


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("rows", [None, 5], ids=["default", "chunks"])
def test_parts_give_the_loss_and_gradients_of_the_whole(
    paddle: Any, example: Any, monkeypatch: pytest.MonkeyPatch, tied: bool, parts: int, rows: int | None
) -> None:
    """Each has the loss, the gradient of the hidden states, and that of its columns. 12 targets: 5, 5 and 2."""
    from sft.training import loss

    hidden, labels, weight = example
    size = VOCABULARY // parts
    if rows is not None:
        monkeypatch.setattr(loss, "CHUNK_BYTES", rows * size * 4)

    def work(number: int, vocabulary: Columns) -> tuple[float, np.ndarray, np.ndarray]:
        lm_head = head(paddle, np.split(weight, parts, 1)[number], tied, vocabulary)
        tensor = paddle.to_tensor(hidden, stop_gradient=False)
        value = loss.target_loss(tensor, labels, lm_head)
        value.backward()
        grad = lm_head.weight.grad.numpy()
        return float(value), tensor.grad.numpy()[0], grad.T if tied else grad

    expected, hidden_grad, weight_grad = expected_of(hidden, labels, weight)
    found = together(paddle, range(0, VOCABULARY, size), work)
    for (value, own_hidden, own_weight), columns in zip(found, np.split(weight_grad, parts, 1), strict=True):
        assert value == pytest.approx(expected, rel=1e-6)
        np.testing.assert_allclose(own_hidden, hidden_grad, atol=1e-5, rtol=0)
        np.testing.assert_allclose(own_weight, columns, atol=1e-5, rtol=0)


@pytest.mark.parametrize("large", [0, 1])
def test_logits_far_apart_in_two_parts_are_taken_from_one_maximum(paddle: Any, large: int) -> None:
    from sft.training.loss import target_loss

    hidden, labels, weight = np.ones((1, 1, 1), np.float32), np.array([[12 * large]]), np.zeros((1, 24), np.float32)
    weight[0, 12 * large : 12 * large + 12] = 1000.0

    def work(number: int, vocabulary: Columns) -> float:
        lm_head = head(paddle, np.split(weight, 2, 1)[number], False, vocabulary)
        return float(target_loss(paddle.to_tensor(hidden), labels, lm_head))

    assert together(paddle, (0, 12), work) == pytest.approx([np.log(12)] * 2, rel=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_of_equally_likely_tokens_the_first_counts(paddle: Any, parts: int) -> None:
    """Small whole numbers, so that equal logits are equal. Every token has its equals, in its own part and others."""
    from sft.training.loss import target_scores

    generator = np.random.default_rng(8)
    hidden = generator.integers(-2, 3, (1, 40, HIDDEN)).astype(np.float32)
    few = generator.integers(-2, 3, (HIDDEN, 6)).astype(np.float32)
    weight = few[:, generator.integers(0, 6, VOCABULARY)]
    logits = hidden[0] @ weight
    ties = np.argwhere(logits == logits.max(-1, keepdims=True))
    labels = np.array([[ties[ties[:, 0] == row][:, 1][-1 if row % 2 else 0] for row in range(40)]])
    expected = int((logits.argmax(-1) == labels[0]).sum())
    assert 15 < expected < 35

    def work(number: int, vocabulary: Columns) -> tuple[float, int]:
        lm_head = head(paddle, np.split(weight, parts, 1)[number], False, vocabulary)
        return target_scores(paddle.to_tensor(hidden), labels, lm_head)

    loss = expected_of(hidden, labels, weight)[0]
    for found in together(paddle, range(0, VOCABULARY, VOCABULARY // parts), work):
        assert found == (pytest.approx(loss, rel=1e-6), expected)
    assert target_scores(paddle.to_tensor(hidden), labels, head(paddle, weight, False)) == (
        pytest.approx(loss, rel=1e-6),
        expected,
    )

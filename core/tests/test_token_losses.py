"""Losses of tokens that plugins make of cross-entropy: against autograd over whole logits in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from shared_vocabulary import Columns, together

import sft
from sft.training.token_losses import TokenLosses

LENGTH, HIDDEN, VOCABULARY = 14, 8, 24


class Everything:
    """Makes something of all that it is given, the label too."""

    def loss(self, targets: sft.Targets, before: Any) -> Any:
        heavy = 1.0 + (targets.labels > 10).astype("float64")
        rest = targets.log_normaliser.square() * 0.3 + (targets.log_normaliser - targets.mean_logit) * 0.2
        return before * (1.0 - targets.log_probability.exp()) * heavy + rest


class Doubled:
    def loss(self, targets: sft.Targets, before: Any) -> Any:
        return before * 2.0


class Constant:
    def loss(self, targets: sft.Targets, before: Any) -> Any:
        return before.detach() * 0.0 + 3.0


def of_logits(paddle: Any, hidden: Any, weight: Any, labels: np.ndarray, cap: float | None, weights: Any) -> Any:
    """What ``Everything`` and then ``Doubled`` give, Σ over the positions, from logits as a whole."""
    logits = paddle.matmul(hidden, weight)
    logits = logits if cap is None else paddle.tanh(logits / cap) * cap
    kept = paddle.to_tensor(np.flatnonzero(labels != -100))
    logits, label = paddle.gather(logits, kept), paddle.to_tensor(labels[labels != -100])
    chosen = paddle.nn.functional.log_softmax(logits, axis=-1)
    chosen = paddle.take_along_axis(chosen, label.unsqueeze(-1), axis=-1)
    normaliser = paddle.logsumexp(logits, axis=-1, keepdim=True)
    heavy = 1.0 + (label.unsqueeze(-1) > 10).astype("float64")
    every = -chosen * (1.0 - chosen.exp()) * heavy
    every = 2.0 * (every + 0.3 * normaliser**2 + 0.2 * (normaliser - logits.mean(axis=-1, keepdim=True)))
    return (every if weights is None else every * paddle.to_tensor(weights[labels != -100])[:, None]).sum()


@pytest.fixture
def example() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(7)
    hidden = generator.standard_normal((1, LENGTH, HIDDEN)).astype(np.float32)
    weight = generator.standard_normal((HIDDEN, VOCABULARY)).astype(np.float32)
    return hidden, np.array([[0, 7, 8, 11, 12, 15, 16, 23, -100, 3, 19, 12, -100, 5]]), weight


@pytest.mark.parametrize(
    "tied", [pytest.param(False, id="untied"), pytest.param(True, id="tied", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("rows", "cap", "weighs"), [(None, None, False), (5, 3.0, True)], ids=["plain", "all"])
def test_value_and_gradients_are_those_of_whole_logits(
    paddle: Any,
    example: Any,
    monkeypatch: pytest.MonkeyPatch,
    tied: bool,
    parts: int,
    rows: Any,
    cap: Any,
    weighs: bool,
) -> None:
    """On one process and where several share the vocabulary; in chunks; with a cap for the logits; with weights."""
    from sft.training import loss

    hidden, labels, weight = example
    size = VOCABULARY // parts
    weights = np.where(labels == -100, 0, np.linspace(0.5, 2.0, LENGTH)).astype(np.float32) if weighs else None
    if rows is not None:
        monkeypatch.setattr(loss, "CHUNK_BYTES", rows * size * 4)
    other = TokenLosses([("one", Everything()), ("two", Doubled())])

    def work(number: int, vocabulary: Columns) -> tuple[float, np.ndarray, np.ndarray]:
        own = np.split(weight, parts, 1)[number]
        lm_head = SimpleNamespace(
            weight=paddle.to_tensor(np.ascontiguousarray(own.T if tied else own), stop_gradient=False),
            **{"transpose_y": tied, "vocabulary": vocabulary if parts > 1 else None, "cap": cap},
        )
        tensor = paddle.to_tensor(hidden, stop_gradient=False)
        value = loss.target_loss(tensor, labels, lm_head, 1.0, weights, other)
        value.backward()
        grad = lm_head.weight.grad.numpy()
        return float(value), tensor.grad.numpy()[0], grad.T if tied else grad

    wide = [paddle.to_tensor(one.astype(np.float64), stop_gradient=False) for one in (hidden[0], weight)]
    expected = of_logits(paddle, *wide, labels[0], cap, None if weights is None else weights[0].astype(np.float64))
    expected.backward()
    columns = np.split(wide[1].grad.numpy(), parts, 1)
    found = together(paddle, range(0, VOCABULARY, size), work)
    for (value, hidden_grad, weight_grad), own in zip(found, columns, strict=True):
        assert value == pytest.approx(float(expected), rel=1e-6)
        # Gradients of up to 30, in float32.
        np.testing.assert_allclose(hidden_grad, wide[0].grad.numpy(), atol=3e-5, rtol=1e-5)
        np.testing.assert_allclose(weight_grad, own, atol=3e-5, rtol=1e-5)


def test_cross_entropy_through_the_seam_is_cross_entropy(paddle: Any, example: Any) -> None:
    """A loss that changes nothing: the same value, and the gradient to float32."""
    from sft.training.loss import target_loss

    hidden, labels, weight = example
    unchanged = SimpleNamespace(loss=lambda targets, before: before)
    found = []
    for other in (None, TokenLosses([("none", unchanged)])):
        tensor = paddle.to_tensor(hidden, stop_gradient=False)
        lm_head = SimpleNamespace(weight=paddle.to_tensor(weight))
        value = target_loss(tensor, labels, lm_head, 1.0, None, other)
        value.backward()
        found.append((float(value), tensor.grad.numpy()))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-6, rtol=0)


def test_a_loss_that_nothing_learns_from_has_no_gradient(paddle: Any, example: Any) -> None:
    from sft.training.loss import target_loss

    hidden, labels, weight = example
    tensor, lm_head = paddle.to_tensor(hidden, stop_gradient=False), SimpleNamespace(weight=paddle.to_tensor(weight))
    value = target_loss(tensor, labels, lm_head, 1.0, None, TokenLosses([("constant", Constant())]))
    value.backward()
    assert float(value) == 3.0 * 12
    assert not tensor.grad.numpy().any()


def test_each_position_has_its_own_loss(paddle: Any, example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft.training import loss

    hidden, labels, weight = example
    monkeypatch.setattr(loss, "CHUNK_BYTES", 5 * VOCABULARY * 4)
    logits = hidden[0].astype(np.float64) @ weight
    expected = np.log(np.exp(logits).sum(-1)) - logits[np.arange(LENGTH), np.maximum(labels[0], 0)]
    found = loss.target_losses(paddle.to_tensor(hidden), labels, SimpleNamespace(weight=paddle.to_tensor(weight)))
    np.testing.assert_allclose(found[0], np.where(labels[0] == -100, 0, expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda targets, before: before.sum(), "float64 [] where float64 [12, 1] is expected"),
        (lambda targets, before: before.astype("float32"), "float32 [12, 1] where float64 [12, 1]"),
        (lambda targets, before: 1.0, "float where float64 [12, 1]"),
        (lambda targets, before: before.nothing, "AttributeError"),
    ],
)
def test_a_wrong_loss_is_its_plugins_fault(paddle: Any, example: Any, given: Any, said: str) -> None:
    from sft.training.loss import target_loss

    hidden, labels, weight = example
    other = TokenLosses([("Plugin heavy", SimpleNamespace(loss=given))])
    with pytest.raises(sft.PluginError) as caught:
        target_loss(
            paddle.to_tensor(hidden), labels, SimpleNamespace(weight=paddle.to_tensor(weight)), 1.0, None, other
        )
    assert said in str(caught.value).replace("paddle.", "")
    assert str(caught.value).startswith("Plugin heavy ")

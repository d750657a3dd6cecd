"""The loss: against log-softmax over all positions in float64, in value, in gradients and in memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from loss_formula import reference

ROWS, LENGTH, HIDDEN, VOCABULARY = 3, 9, 16, 37


@pytest.fixture
def example() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """hidden [B, S, h], labels [B, S] (13 targets, a row without any), weight [h, V]; logits of up to ±12."""
    generator = np.random.default_rng(5)
    hidden = generator.standard_normal((ROWS, LENGTH, HIDDEN)).astype(np.float32)
    weight = generator.standard_normal((HIDDEN, VOCABULARY)).astype(np.float32)
    labels = np.full((ROWS, LENGTH), -100, np.int64)
    labels[0, 2:] = generator.integers(0, VOCABULARY, LENGTH - 2)
    labels[2, [0, 3, 4, 6, 7, 8]] = [0, VOCABULARY - 1, *generator.integers(0, VOCABULARY, 4)]
    return hidden, labels, weight


def head(paddle: Any, weight: np.ndarray, tied: bool, trains: bool = True) -> Any:
    """A head, as a model's lm_head is one: weight [V, h] when it is the embedding's, else [h, V]."""
    value = paddle.to_tensor(np.ascontiguousarray(weight.T) if tied else weight, stop_gradient=not trains)
    return SimpleNamespace(weight=value, transpose_y=tied)


def small_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    from sft.training import loss

    monkeypatch.setattr(loss, "CHUNK_BYTES", rows * VOCABULARY * 4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rows", [None, 13, 5, 1], ids=["default", "exact", "uneven", "single"])
def test_value_and_gradients(
    paddle: Any, example: Any, monkeypatch: pytest.MonkeyPatch, tied: bool, rows: int | None
) -> None:
    """13 targets in one chunk, in one that just fits, in 5 + 5 + 3 and one by one."""
    from sft.training.loss import target_loss

    hidden, labels, weight = example
    if rows is not None:
        small_chunks(monkeypatch, rows)
    tensor, lm_head = paddle.to_tensor(hidden, stop_gradient=False), head(paddle, weight, tied)
    loss = target_loss(tensor, labels, lm_head)
    loss.backward()
    expected, hidden_grad, weight_grad = reference(hidden, labels, weight)
    assert loss.shape == []
    assert loss.dtype == paddle.float32
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    # Sums of 13 to 37 products of numbers of up to 4: float32 rounds each to 2e-7.
    np.testing.assert_allclose(tensor.grad.numpy(), hidden_grad, atol=1e-5, rtol=0)
    found = lm_head.weight.grad.numpy()
    np.testing.assert_allclose(found.T if tied else found, weight_grad, atol=1e-5, rtol=0)
    assert not tensor.grad.numpy()[labels == -100].any()


@pytest.fixture
def weights(example: Any) -> np.ndarray:
    """What the 13 targets count: from 0.01 to 100, each something else."""
    labels = example[1]
    found = np.zeros(labels.shape, np.float32)
    found[labels != -100] = np.random.default_rng(9).permutation(np.logspace(-2, 2, 13))
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rows", [None, 5], ids=["default", "uneven"])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_weighted_value_and_gradients(
    paddle: Any,
    example: Any,
    weights: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    tied: bool,
    rows: int | None,
    cap: float | None,
) -> None:
    """With a cap, whose slope is another function, against the sum of what each position has alone."""
    from sft.training.loss import target_loss

    hidden, labels, weight = example
    if rows is not None:
        small_chunks(monkeypatch, rows)
    tensor, lm_head = paddle.to_tensor(hidden, stop_gradient=False), head(paddle, weight, tied)
    lm_head.cap = cap
    loss = target_loss(tensor, labels, lm_head, weights=weights)
    loss.backward()
    if cap is None:
        expected, hidden_grad, weight_grad = reference(hidden, labels, weight, weights)
    else:
        expected, hidden_grad, weight_grad = 0.0, np.zeros(hidden.shape), np.zeros(weight.shape)
        for place in zip(*np.nonzero(labels != -100), strict=True):
            one, alone = paddle.to_tensor(hidden, stop_gradient=False), head(paddle, weight, tied=False)
            alone.cap = cap
            single = np.full_like(labels, -100)
            single[place] = labels[place]
            value = target_loss(one, single, alone)
            value.backward()
            expected += float(weights[place]) * float(value)
            hidden_grad += float(weights[place]) * one.grad.numpy().astype(np.float64)
            weight_grad += float(weights[place]) * alone.weight.grad.numpy().astype(np.float64)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    # The heaviest weighs 100: as above, but for that.
    np.testing.assert_allclose(tensor.grad.numpy(), hidden_grad, atol=1e-3, rtol=1e-5)
    found = lm_head.weight.grad.numpy()
    np.testing.assert_allclose(found.T if tied else found, weight_grad, atol=1e-3, rtol=1e-5)
    assert not tensor.grad.numpy()[labels == -100].any()


def test_weights_of_1_are_none_and_those_of_2_count_twice(paddle: Any, example: Any) -> None:
    """To the last bit: a power of two rounds nothing."""
    from sft.training.loss import target_loss

    hidden, labels, weight = example
    found = []
    for each, factor in ((None, 1.0), (1.0, 1.0), (2.0, 0.5)):
        tensor, lm_head = paddle.to_tensor(hidden, stop_gradient=False), head(paddle, weight, tied=True)
        weights = None if each is None else np.where(labels == -100, 0, each).astype(np.float32)
        loss = target_loss(tensor, labels, lm_head, weights=weights)
        (loss * factor).backward()
        found.append([float(loss) * factor, tensor.grad.numpy().tobytes(), lm_head.weight.grad.numpy().tobytes()])
    assert found[0] == found[1] == found[2]


def test_scores_do_not_weigh(paddle: Any, models: Path, weights: np.ndarray) -> None:
    from dataclasses import replace

    from sft.data.batches import assemble
    from sft.models.forward import hidden_states
    from sft.models.loading import load_model, open_model
    from sft.seams import Example
    from sft.training.loss import batch_loss
    from sft.training.objective import RunObjective

    model = load_model(open_model(models / "llama-tied-gqa"))
    ids = np.arange(10, 19)
    heavy = assemble([[Example(ids, ids + 1, weights[0] + 1)]], pad_id=0)
    plain = replace(heavy, weights=None)
    scores = [RunObjective().measured(hidden_states(model, batch), batch, model) for batch in (heavy, plain)]
    assert scores[0] == scores[1]
    assert float(batch_loss(model, heavy)) > 2 * float(batch_loss(model, plain))


def test_gradients_are_scaled_by_what_comes_from_above(paddle: Any, example: Any) -> None:
    from sft.training.loss import target_loss

    hidden, labels, weight = example
    tensor, lm_head = paddle.to_tensor(hidden, stop_gradient=False), head(paddle, weight, tied=False)
    (target_loss(tensor, labels, lm_head) * 0.125).backward()
    _, hidden_grad, weight_grad = reference(hidden, labels, weight)
    np.testing.assert_allclose(tensor.grad.numpy(), hidden_grad / 8, atol=1e-6, rtol=0)
    np.testing.assert_allclose(lm_head.weight.grad.numpy(), weight_grad / 8, atol=1e-6, rtol=0)


def test_two_micro_batches_add_up(paddle: Any, example: Any) -> None:
    """The gradient of the sum over rows is the sum of the rows' gradients, in the weight that both share."""
    from sft.training.loss import target_loss

    hidden, labels, weight = example
    lm_head, total = head(paddle, weight, tied=True), 0.0
    for part in (slice(0, 1), slice(1, 3)):
        loss = target_loss(paddle.to_tensor(hidden[part], stop_gradient=False), labels[part], lm_head)
        loss.backward()
        total += float(loss)
    expected, _, weight_grad = reference(hidden, labels, weight)
    assert total == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(lm_head.weight.grad.numpy().T, weight_grad, atol=1e-5, rtol=0)


def test_large_logits_do_not_overflow(paddle: Any, example: Any) -> None:
    from sft.training.loss import target_loss

    hidden, labels, weight = example
    hidden = hidden * 100  # logits of up to 1,200: exp of that is infinite even in float64
    tensor = paddle.to_tensor(hidden, stop_gradient=False)
    loss = target_loss(tensor, labels, head(paddle, weight, tied=False))
    loss.backward()
    expected, hidden_grad, _ = reference(hidden, labels, weight)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(tensor.grad.numpy(), hidden_grad, atol=1e-3, rtol=1e-4)


def test_without_targets_loss_and_gradients_are_zero(paddle: Any, example: Any) -> None:
    from sft.training.loss import target_loss

    hidden, labels, weight = example
    tensor, lm_head = paddle.to_tensor(hidden, stop_gradient=False), head(paddle, weight, tied=False)
    loss = target_loss(tensor, np.full_like(labels, -100), lm_head)
    loss.backward()
    assert float(loss) == 0.0
    np.testing.assert_array_equal(tensor.grad.numpy(), np.zeros_like(hidden))
    assert lm_head.weight.grad is None or not lm_head.weight.grad.numpy().any()


@pytest.mark.parametrize(("learns", "weight_learns"), [(True, False), (False, True)], ids=["hidden", "weight"])
def test_only_the_gradients_that_are_needed_are_computed(
    paddle: Any, example: Any, monkeypatch: pytest.MonkeyPatch, learns: bool, weight_learns: bool
) -> None:
    """One projection, and one more product for the one gradient."""
    from sft.training.loss import target_loss

    hidden, labels, weight = example
    lm_head = head(paddle, weight, tied=False, trains=weight_learns)
    tensor = paddle.to_tensor(hidden, stop_gradient=not learns)
    products = spy_on_matmul(paddle, monkeypatch)
    target_loss(tensor, labels, lm_head).backward()
    assert len(products) == 2
    _, hidden_grad, weight_grad = reference(hidden, labels, weight)
    if learns:
        np.testing.assert_allclose(tensor.grad.numpy(), hidden_grad, atol=1e-5, rtol=0)
        assert lm_head.weight.grad is None
    else:
        np.testing.assert_allclose(lm_head.weight.grad.numpy(), weight_grad, atol=1e-5, rtol=0)
        assert tensor.grad is None


def test_without_gradients_nothing_is_kept_and_nothing_more_is_computed(
    paddle: Any, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.training.loss import target_loss

    hidden, labels, weight = example
    products = spy_on_matmul(paddle, monkeypatch)
    tensor, lm_head = paddle.to_tensor(hidden, stop_gradient=False), head(paddle, weight, tied=True)
    with paddle.no_grad():
        loss = target_loss(tensor, labels, lm_head)
    assert float(loss) == pytest.approx(reference(hidden, labels, weight)[0], rel=1e-6)
    assert loss.stop_gradient
    assert loss.grad_fn is None
    assert products == [[13, VOCABULARY]]


def spy_on_matmul(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The shape of every matrix product from now on."""
    shapes: list[list[int]] = []
    own = paddle.matmul

    def matmul(*arguments: Any, **rest: Any) -> Any:
        found = own(*arguments, **rest)
        shapes.append(list(found.shape))
        return found

    monkeypatch.setattr(paddle, "matmul", matmul)
    return shapes


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_exist_for_one_chunk_at_a_time(
    paddle: Any, example: Any, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    from sft.training.loss import target_loss

    hidden, labels, weight = example
    small_chunks(monkeypatch, 4)
    products = spy_on_matmul(paddle, monkeypatch)
    tensor = paddle.to_tensor(hidden, stop_gradient=False)
    target_loss(tensor, labels, head(paddle, weight, tied)).backward()
    of_weight = [VOCABULARY, HIDDEN] if tied else [HIDDEN, VOCABULARY]
    assert products == [shape for rows in (4, 4, 4, 1) for shape in ([rows, VOCABULARY], [rows, HIDDEN], of_weight)]


@pytest.mark.parametrize(("gib", "mib"), [(None, 24), (4, 64), (16, 256), (24, 384), (80, 1024), (141, 1024)], ids=str)
def test_chunks_of_logits_by_device(gib: int | None, mib: int) -> None:
    from sft.training.loss import chunk_bytes

    assert chunk_bytes(None if gib is None else gib << 30) == mib << 20


@pytest.mark.parametrize(
    "case", ["llama-untied", "llama-tied-gqa", "qwen2-untied", "qwen2-tied-sharded", "mistral-gqa", "gemma-tied"]
)
def test_a_models_own_lm_head_is_read_the_right_way_round(paddle: Any, models: Path, case: str) -> None:
    """Against log-softmax of the logits that the head itself computes."""
    from sft.models.loading import load_model, open_model
    from sft.training.loss import target_loss

    model = load_model(open_model(models / case))
    size = model.architecture.hidden
    generator = np.random.default_rng(6)
    hidden = paddle.to_tensor(generator.standard_normal((2, 5, size)).astype(np.float32))
    labels = generator.integers(0, model.architecture.vocabulary, (2, 5))
    labels[0, :2] = -100
    with paddle.no_grad():
        logits = model.lm_head(hidden).numpy().astype(np.float64)
        found = float(target_loss(hidden, labels, model.lm_head))
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows, places = np.nonzero(labels != -100)
    assert found == pytest.approx(-log_softmax[rows, places, labels[rows, places]].sum(), rel=1e-6)


def test_scores_are_the_loss_and_the_labels_that_are_likeliest(
    paddle: Any, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five of 13 labels are made the likeliest token; logits exist for four positions at a time."""
    from sft.training.loss import target_scores

    hidden, labels, weight = example
    likeliest = (hidden.astype(np.float64) @ weight).argmax(-1)
    places = np.argwhere(labels != -100)
    for row, position in places[[0, 3, 4, 8, 12]]:
        labels[row, position] = likeliest[row, position]
    expected = sum(labels[row, position] == likeliest[row, position] for row, position in places)
    assert 5 <= expected < 13
    small_chunks(monkeypatch, 4)
    products = spy_on_matmul(paddle, monkeypatch)
    for tied in (False, True):
        lm_head = head(paddle, weight, tied)
        loss, correct = target_scores(paddle.to_tensor(hidden), labels, lm_head)
        assert loss == pytest.approx(reference(hidden, labels, weight)[0], rel=1e-6)
        assert correct == expected
    assert products == [[rows, VOCABULARY] for rows in (4, 4, 4, 1)] * 2
    nothing = paddle.to_tensor(np.full_like(labels, -100))
    assert target_scores(paddle.to_tensor(hidden), nothing, lm_head) == (0.0, 0)

"""The loss in 16 bits, on paper: what its gradients lose against float64, in bfloat16 and in float16."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from loss_formula import reference

from sft.models.kernels import Kernels


class Rounding(Kernels):
    """Products as a GPU has them under automatic casts: of factors in 16 bits, summed wide, with a result in 16."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def product(self, x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False) -> Any:
        wide = (one.astype(self.dtype).astype("float32") for one in (x, y))
        return super().product(*wide, transpose_x=transpose_x, transpose_y=transpose_y).astype(self.dtype)


def off(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("chunks", [32, 250])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_chunks_of_16_bits_add_up_as_in_float64(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, chunks: int, weights: str
) -> None:
    """Every chunk has one label and one hidden state, so that the gradient of lm_head grows evenly; summed in bfloat16
    it is off by 0.7 % after 32 chunks, and by 1.9 % after 250."""
    from sft.training import loss

    generator = np.random.default_rng(0)
    hidden = (1 + 0.1 * generator.standard_normal((1, chunks, 16))).astype(np.float32)
    weight = (0.1 * generator.standard_normal((16, 32))).astype(np.float32)
    labels = np.full((1, chunks), 3)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 32)
    narrow = paddle.to_tensor(hidden).astype("bfloat16")
    narrow.stop_gradient = False
    value = paddle.to_tensor(weight).astype(weights)
    value.stop_gradient = False
    lm_head = SimpleNamespace(weight=value, kernels=Rounding("bfloat16"))
    factor = 1.0 / chunks
    (loss.target_loss(narrow, labels, lm_head, factor) * factor).backward()

    exact = [tensor.astype("bfloat16").astype("float32").numpy() for tensor in (narrow, value)]
    _, hidden_grad, weight_grad = reference(exact[0], labels, exact[1])
    found = [tensor.grad.astype("float32").numpy() for tensor in (narrow, value)]
    assert (narrow.grad.dtype, value.grad.dtype) == (paddle.bfloat16, value.dtype)
    assert off(found[0], factor * hidden_grad) < 1e-2
    assert off(found[1], factor * weight_grad) < 5e-3


def test_a_matrix_is_rounded_once_for_all_chunks(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the largest of a model; each chunk multiplies with it twice."""
    from sft.training import loss

    class Narrow(Rounding):
        narrow = True
        rounded: list[Any] = []
        factors: list[Any] = []

        def kept(self, x: Any) -> Any:
            self.rounded.append(x.astype(self.dtype))
            return self.rounded[-1]

        def product(self, x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False) -> Any:
            self.factors.append(y)
            return super().product(x, y, transpose_x, transpose_y).astype("float32")

    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 32)
    hidden, value = paddle.randn([1, 5, 16]), paddle.randn([16, 32])
    hidden.stop_gradient = False
    lm_head = SimpleNamespace(weight=value, kernels=Narrow("bfloat16"))
    loss.target_loss(hidden, np.arange(5)[None], lm_head).backward()
    loss.target_scores(hidden, np.arange(5)[None], lm_head)
    (first, second) = Narrow.rounded
    assert [factor is first for factor in Narrow.factors[:10]] == [True] * 10
    assert [factor is second for factor in Narrow.factors[10:]] == [True] * 5


@pytest.mark.parametrize("each", [1e-6, 0.3, 1e6])
def test_what_all_positions_weigh_alike_changes_nothing_in_float16(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, each: float
) -> None:
    """The scale is 1 / Σ w: neither w nor 1 / w fits float16 where w is a millionth, their product does."""
    from sft.training import loss

    monkeypatch.setattr(loss, "product_dtype", lambda x: paddle.float16)  # as under automatic casts
    generator = np.random.default_rng(2)
    hidden = generator.standard_normal((1, 12, 16)).astype(np.float32)
    weight = (0.3 * generator.standard_normal((16, 40))).astype(np.float32)
    labels = generator.integers(0, 40, (1, 12))
    exact = [one.astype(np.float16).astype(np.float32) for one in (hidden, weight)]
    weights = np.full(labels.shape, each, np.float32)
    factor = 1.0 / float(weights.sum(dtype="float64"))
    tensor = paddle.to_tensor(hidden, stop_gradient=False)
    lm_head = SimpleNamespace(
        weight=paddle.to_tensor(weight, stop_gradient=False), kernels=Rounding("float16"), transpose_y=False
    )
    value = loss.target_loss(tensor, labels, lm_head, factor, weights) * factor
    value.backward()
    expected, hidden_grad, weight_grad = reference(exact[0], labels, exact[1])
    assert float(value) == pytest.approx(expected / 12, rel=1e-3)
    assert off(tensor.grad.numpy(), hidden_grad / 12) < 1e-3
    assert off(lm_head.weight.grad.numpy(), weight_grad / 12) < 1e-3


def test_the_loss_scale_comes_before_float16_rounds(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 50,000 tokens each has a probability of 2e-8, less than float16 has, and all together 1e-3: half of the
    gradient."""
    from sft.training import loss

    monkeypatch.setattr(loss, "product_dtype", lambda x: paddle.float16)  # as under automatic casts
    size, scale = 50_000, 2.0**15
    generator = np.random.default_rng(1)
    hidden = np.ones((1, 4, 8), np.float32)
    weight = np.repeat([[2.0], [-2.0]], 4, axis=0) * (1 + 0.1 * generator.random(size))  # logits of 0
    weight[:, 0] = 17.75 / 8
    labels = np.zeros((1, 4), np.int64)
    errors = []
    for factor in (scale, 1.0):
        tensor = paddle.to_tensor(hidden, stop_gradient=False)
        value = paddle.to_tensor(weight.astype(np.float16).astype(np.float32))
        lm_head = SimpleNamespace(weight=value, kernels=Rounding("float16"))
        (loss.target_loss(tensor, labels, lm_head, factor) * scale).backward()
        _, expected, _ = reference(hidden, labels, value.numpy())
        errors.append(off(tensor.grad.numpy(), scale * expected))
    assert errors[0] < 2e-3
    assert errors[1] > 1e-2

"""The Linear with a low-rank update, and the loss of a chunk of logits, beside paddle's operations and float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import sft


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


def near(found: np.ndarray, expected: np.ndarray, relative: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


def learned(kernels: sft.Kernels, arrays: dict[str, Any], made: str | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The output, and the gradients of its product with fixed numbers; ``made``: which piece x comes out of."""
    import paddle

    t = {name: None if one is None else paddle.to_tensor(one) for name, one in arrays.items()}
    for name in ("x", "a", "b", "other"):
        t[name].stop_gradient = False
    x = t["x"]
    if made == "norm":
        x = kernels.rms_norm(x, t["other"][0, 0].detach(), 1e-5, 0.0)
    elif made in ("swiglu", "geglu"):
        x = getattr(kernels, made)(x, t["other"])
    elif made == "changed":
        x = kernels.swiglu(x, t["other"])
        with paddle.no_grad():
            x.scale_(2.0)
    y = kernels.low_rank_linear(x, t["weight"], t["bias"], t["a"], t["b"], 0.7)
    (y * paddle.to_tensor(random(*y.shape, seed=3))).sum().backward()
    return y.numpy(), {name: one.grad.numpy() for name, one in t.items() if one is not None and one.grad is not None}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("made", [None, "norm", "swiglu", "geglu", "changed"])
def test_low_rank_linear(kernels: sft.Kernels, bias: bool, made: str | None) -> None:
    arrays = {"x": random(2, 9, 40), "weight": random(40, 33), "bias": random(33) if bias else None}
    arrays |= {"a": random(40, 3), "b": random(3, 33), "other": random(2, 9, 40, seed=5)}
    (y, grads), (expected, others) = learned(kernels, arrays, made), learned(sft.PLAIN, arrays, made)
    near(y, expected)
    assert set(grads) == set(others) >= {"x", "a", "b"}
    for name, grad in grads.items():
        near(grad, others[name])
    if made is None:
        wide = {name: one.astype(np.float64) for name, one in arrays.items() if one is not None}
        exact = wide["x"] @ (wide["weight"] + 0.7 * wide["a"] @ wide["b"]) + wide.get("bias", 0.0)
        near(y, exact)
        near(grads["x"], random(*y.shape, seed=3) @ (wide["weight"] + 0.7 * wide["a"] @ wide["b"]).T)


@pytest.fixture
def views(paddle: Any) -> Iterator[None]:
    """Slices and transposes are views of the tensor that they are made of, as where a user sets the flag."""
    before = paddle.get_flags("FLAGS_use_stride_kernel")
    paddle.set_flags({"FLAGS_use_stride_kernel": True})
    yield
    paddle.set_flags(before)


def test_weights_may_be_views_of_others(kernels: sft.Kernels, paddle: Any, views: None) -> None:
    def computed(some: sft.Kernels) -> list[np.ndarray]:
        wide, a, b = (paddle.to_tensor(random(*shape)) for shape in ((33, 40), (40, 6), (66, 3)))
        scales, biases = paddle.to_tensor(random(80)), paddle.to_tensor(random(66))
        for tensor in (scales, a, b):
            tensor.stop_gradient = False
        x = some.rms_norm(paddle.to_tensor(random(2, 9, 40)), scales[::2], 1e-5, 0.0)
        y = some.low_rank_linear(x, wide.T, biases[::2], a[:, :3], b.T[:, ::2], 0.7)
        assert not any(one.is_contiguous() for one in (scales[::2], wide.T, biases[::2], a[:, :3], b.T[:, ::2]))
        (y * paddle.to_tensor(random(*y.shape, seed=3))).sum().backward()
        return [y.numpy(), *(one.grad.numpy() for one in (scales, a, b))]

    for found, expected in zip(computed(kernels), computed(sft.PLAIN), strict=True):
        near(found, expected)


def test_what_a_norm_made_is_not_kept(kernels: sft.Kernels, paddle: Any) -> None:
    """Backward of the Linear computes it once more; so nothing but the caller's own reference holds it."""
    import gc
    import weakref

    x, weight = paddle.to_tensor(random(4, 40), stop_gradient=False), paddle.to_tensor(random(40))
    pair = [paddle.to_tensor(random(*shape), stop_gradient=False) for shape in ((40, 3), (3, 33))]
    normed = kernels.rms_norm(x, weight, 1e-5, 0.0)
    y = kernels.low_rank_linear(normed, paddle.to_tensor(random(40, 33)), None, *pair, 1.0)
    kernels.rms_norm(x, weight, 1e-5, 0.0)
    held = weakref.ref(normed)
    del normed
    gc.collect()
    assert held() is None
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("what", ["a weight that trains", "16 bits"])
def test_what_it_cannot_do_is_left_to_others(library: Any, paddle: Any, what: str) -> None:
    from sft_kernels_cpu.kernels import NativeKernels

    class Others(sft.Kernels):
        def low_rank_linear(self, *arguments: Any) -> Any:
            return "others"

    weight = paddle.ones([8, 8], "bfloat16" if what == "16 bits" else "float32")
    weight.stop_gradient = what == "16 bits"
    x, a, b = paddle.ones([9, 8]), paddle.ones([8, 2]), paddle.ones([2, 8])  # of fewer rows 16 bits are native too
    assert NativeKernels(library, Others()).low_rank_linear(x, weight, None, a, b, 1.0) == "others"


@pytest.mark.parametrize("size", [5, 512, 4099])
def test_cross_entropy(kernels: sft.Kernels, paddle: Any, size: int) -> None:
    logits, labels = random(7, size) * 20, np.arange(7) % size
    logits[3] = 5.0
    logits[3, 0] = 25.0  # one peak over many equal ones
    losses, probabilities = kernels.cross_entropy(paddle.to_tensor(logits), paddle.to_tensor(labels))
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    exact = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    np.testing.assert_allclose(losses.numpy()[:, 0], -np.log(exact[np.arange(7), labels]), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(probabilities.numpy(), exact, rtol=5e-6, atol=1e-36)
    assert losses.dtype == paddle.float64


def test_the_loss_of_a_large_vocabulary_loses_nothing(kernels: sft.Kernels, paddle: Any) -> None:
    logits = np.zeros((1, 256_003), np.float32)
    logits[0, 0] = 12.0
    losses, _ = kernels.cross_entropy(paddle.to_tensor(logits), paddle.to_tensor(np.array([0])))
    exact = np.log(np.exp(12.0) + 256_002) - 12.0
    assert abs(float(losses) - exact) <= 1e-6 * exact


class Sixteen(sft.Kernels):
    """Keeps bfloat16."""

    narrow = True

    def kept(self, x: Any) -> Any:
        return x.astype("bfloat16")

    def restored(self, kept: Any) -> Any:
        assert str(kept.dtype) == "paddle.bfloat16"
        return kept.astype("float32")

    def remember(self, y: Any, again: Any, *kept: Any) -> None:
        self.made = y, again, kept

    def low_rank_linear(self, *arguments: Any) -> Any:
        return "others"


@pytest.mark.parametrize("piece", ["norm", "swiglu", "geglu"])
def test_in_16_bits_the_rest_is_told_how_to_make_it_again(library: Any, paddle: Any, piece: str) -> None:
    from sft_kernels_cpu.kernels import NativeKernels

    rest = Sixteen()
    kernels, x = NativeKernels(library, rest), paddle.to_tensor(random(5, 64), stop_gradient=False)
    y = kernels.rms_norm(x, paddle.ones([64]), 1e-5, 0.0) if piece == "norm" else getattr(kernels, piece)(x, x + 1.0)
    assert kernels.narrow
    made, again, kept = rest.made
    assert made is y
    assert "bfloat16" in str(kept[0].dtype)
    near(again(*kept).numpy(), y.numpy(), 2**-7)


def test_in_16_bits_what_is_kept_is_rounded_and_products_are_others(library: Any, paddle: Any) -> None:
    import ml_dtypes

    from sft_kernels_cpu.kernels import NativeKernels

    kernels, draw = NativeKernels(library, Sixteen()), np.random.default_rng(0)
    one, two, upstream = draw.standard_normal((3, 5, 64)).astype(np.float32)
    x, y = (paddle.to_tensor(value, stop_gradient=False) for value in (one, two))
    (kernels.swiglu(x, y) * paddle.to_tensor(upstream)).sum().backward()
    gate, up = (value.astype(ml_dtypes.bfloat16).astype(np.float64) for value in (one, two))
    sigmoid = 1 / (1 + np.exp(-gate))
    near(x.grad.numpy(), upstream * up * sigmoid * (1 + gate * (1 - sigmoid)))
    near(y.grad.numpy(), upstream * gate * sigmoid)
    x.clear_gradient()
    (kernels.rms_norm(x, paddle.ones([64]), 1e-5, 0.0) * paddle.to_tensor(upstream)).sum().backward()
    inverse = 1 / np.sqrt((one.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
    normal = gate * inverse
    near(x.grad.numpy(), inverse * (upstream - normal * (upstream * normal).mean(-1, keepdims=True)))
    wide = paddle.ones([64, 8]), None, paddle.ones([64, 2]), paddle.ones([2, 8]), 1.0
    assert kernels.low_rank_linear(x, *wide) == "others"

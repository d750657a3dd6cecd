"""RMSNorm in one step computes y = (offset + w) · x / √(mean(x²) + ε) and its derivatives, as numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def reference(x: np.ndarray, w: np.ndarray, eps: float, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, dx and dw by the quotient rule, in float64."""
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    size, root = x.shape[-1], np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    dx = dy * w / root - x * (dy * w * x).sum(-1, keepdims=True) / (size * root**3)
    return w * x / root, dx, (dy * x / root).reshape(-1, size).sum(0)


@pytest.mark.parametrize("shape", [(2, 5, 16), (3, 8), (1, 1, 7)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_value_and_gradients(paddle: Any, shape: tuple[int, ...], scale: float, offset: float) -> None:
    from sft.models.norms import rms_norm

    rng = np.random.default_rng(0)
    x, dy = (rng.normal(0, scale, shape).astype(np.float32), rng.normal(size=shape).astype(np.float32))
    w = rng.uniform(0.5, 2, shape[-1]).astype(np.float32)
    xs, ws = paddle.to_tensor(x, stop_gradient=False), paddle.to_tensor(w, stop_gradient=False)
    y = rms_norm(xs, ws, 1e-5, offset)
    with paddle.no_grad():
        np.testing.assert_array_equal(rms_norm(xs, ws, 1e-5, offset).numpy(), y.numpy())
    y.backward(paddle.to_tensor(dy))
    for ours, theirs in zip((y, xs.grad, ws.grad), reference(x, w + np.float64(offset), 1e-5, dy), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize(("x_trains", "w_trains"), [(True, False), (False, True)])
def test_only_what_trains_gets_a_gradient(paddle: Any, x_trains: bool, w_trains: bool) -> None:
    from sft.models.norms import rms_norm

    x = paddle.ones([2, 4])
    w = paddle.ones([4])
    x.stop_gradient, w.stop_gradient = not x_trains, not w_trains
    rms_norm(x, w, 1e-5).sum().backward()
    assert (x.grad is not None) == x_trains
    assert (w.grad is not None) == w_trains

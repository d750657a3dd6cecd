"""The kernels of a GPU: each gives paddle's fused operation what it wants, and computes what the plain ones compute.

Two of these operations have no kernel on a CPU. Stand-ins compute what Paddle's sources say, and refuse what those
would refuse; ``make test-gpu`` runs the real ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sft.models.rotary import Rotary

WIDE, NARROW = "float32", "bfloat16"


class StandIns:
    """What was called, with which types, and whether automatic casts were off where they were on before."""

    def __init__(self, paddle: Any) -> None:
        self.paddle, self.calls, self.casts = paddle, [], True

    @contextlib.contextmanager
    def without_casts(self, enable: bool) -> Iterator[None]:
        assert enable is False
        self.casts = False
        yield
        self.casts = True

    def rms_norm(self, x: Any, normalized_shape: list[int], weight: Any, eps: float) -> tuple[Any, Any]:
        """y = x / √(mean(x²) + ε) · w in float32, rounded once."""
        paddle = self.paddle
        assert normalized_shape == [x.shape[-1]] == weight.shape
        assert x.dtype == weight.dtype
        self.calls.append(("rms_norm", str(x.dtype).rpartition(".")[2], self.casts))
        wide = x.astype("float32")
        inverse = paddle.rsqrt((wide * wide).mean(axis=-1, keepdim=True) + eps)
        return (wide * inverse * weight.astype("float32")).astype(x.dtype), inverse

    def rotary(self, q: Any, k: Any = None, v: Any = None, **more: Any) -> tuple[Any, Any, Any]:
        """paddle/phi/kernels/fusion/gpu/fused_rope_utils.h: tables of one row, of the type of ``q``, as long as it."""
        paddle, sin, cos = self.paddle, more.pop("sin"), more.pop("cos")
        pairs = more.pop("use_neox_rotary_style")
        assert not more
        assert sin.shape == cos.shape == [1, q.shape[1], 1, q.shape[3]]
        assert q.dtype == sin.dtype == cos.dtype
        self.calls.append(("rotary", str(q.dtype).rpartition(".")[2], self.casts))
        if pairs:
            first, second = q[..., 0::2], q[..., 1::2]
            turned = paddle.stack([-second, first], axis=-1).reshape(q.shape)
        else:
            first, second = paddle.chunk(q, 2, axis=-1)
            turned = paddle.concat([-second, first], axis=-1)
        return q * cos + turned * sin, None, None


@pytest.fixture
def stand_ins(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    made = StandIns(paddle)
    monkeypatch.setattr(paddle.nn.functional, "rms_norm", made.rms_norm)
    monkeypatch.setattr(paddle.incubate.nn.functional, "fused_rotary_position_embedding", made.rotary)
    monkeypatch.setattr(paddle, "is_autocast_enabled", lambda: True)
    monkeypatch.setattr(paddle.amp, "auto_cast", made.without_casts)
    return made


def both(paddle: Any, compute: Any, *arrays: tuple[np.ndarray, str]) -> list[list[np.ndarray]]:
    """What ``compute(kernels, *tensors)`` gives by the plain kernels and by the GPU's: value and gradients, float32."""
    from sft.models.gpu_kernels import GpuKernels
    from sft.models.kernels import Kernels

    found = []
    for kernels in (Kernels(), GpuKernels()):
        tensors = [paddle.to_tensor(array).astype(dtype).detach() for array, dtype in arrays]
        for tensor in tensors:
            tensor.stop_gradient = False
        y = compute(kernels, *tensors)
        slope = np.random.default_rng(9).standard_normal(y.shape).astype(np.float32)
        (y.astype("float32") * paddle.to_tensor(slope)).sum().backward()
        assert all(tensor.grad.dtype == tensor.dtype for tensor in tensors)
        found.append([tensor.astype("float32").numpy() for tensor in (y, *(tensor.grad for tensor in tensors))])
    return found


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_in_float32(paddle: Any, stand_ins: StandIns, offset: float) -> None:
    random = np.random.default_rng(0)
    x, weight = (random.standard_normal(shape).astype(np.float32) for shape in ((2, 5, 3, 16), (16,)))
    plain, fused = both(paddle, lambda k, x, w: k.rms_norm(x, w, 1e-6, offset), (x, WIDE), (weight, WIDE))
    for one, other in zip(plain, fused, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
    assert stand_ins.calls == [("rms_norm", WIDE, False)]


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "offset", "call"),
    [
        (NARROW, NARROW, 0.0, ("rms_norm", NARROW, True)),
        (NARROW, WIDE, 0.0, ("rms_norm", WIDE, False)),
        (WIDE, NARROW, 0.0, ("rms_norm", WIDE, False)),
        (NARROW, NARROW, 1.0, ("rms_norm", WIDE, False)),
    ],
)
def test_norms_in_16_bits_are_rounded_once(
    paddle: Any, stand_ins: StandIns, x_dtype: str, weight_dtype: str, offset: float, call: tuple[str, str, bool]
) -> None:
    """Without gradients: paddle multiplies 16-bit numbers on a GPU alone. The result has the weight's type."""
    from sft.models.gpu_kernels import GpuKernels

    random = np.random.default_rng(0)
    x = paddle.to_tensor(random.standard_normal((3, 16)).astype(np.float32)).astype(x_dtype)
    weight = paddle.to_tensor(random.standard_normal(16).astype(np.float32)).astype(weight_dtype)
    y = GpuKernels().rms_norm(x, weight, 1e-6, offset)
    assert y.dtype == weight.dtype
    wide, factor = (tensor.astype("float32").numpy().astype(np.float64) for tensor in (x, weight))
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * (factor + offset)
    half = 2.0**-8 if weight_dtype == NARROW else 1e-6
    np.testing.assert_allclose(y.astype("float32").numpy(), expected, rtol=half * 1.001)
    assert stand_ins.calls == [call]


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("size", [16, 8], ids=["whole", "part"])
@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_rotation(paddle: Any, stand_ins: StandIns, interleaved: bool, size: int, kind: str) -> None:
    """Rows of several documents; of heads that turn whole and in part; with cosines that are scaled."""
    from sft.models.turning import tables

    values = {"factor": 4.0, "original_max_position_embeddings": 8} if kind == "yarn" else {}
    rotary = Rotary(10_000.0, size, 32, kind, values, interleaved)
    positions = np.array([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    lengths = np.array([[3, 3, 3, 2, 2], [2, 2, 3, 3, 3]])
    made = tables(rotary, positions, lengths)
    x = np.random.default_rng(1).standard_normal((2, 5, 3, 16)).astype(np.float32)
    plain, fused = both(paddle, lambda k, x: k.rotate(x, rotary, *made), (x, WIDE))
    for one, other in zip(plain, fused, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
    assert stand_ins.calls == [("rotary", WIDE, False)]


def test_rotation_of_16_bits_has_cosines_of_32(paddle: Any, stand_ins: StandIns) -> None:
    from sft.models.gpu_kernels import GpuKernels
    from sft.models.turning import tables

    rotary = Rotary(10_000.0, 16, 8192)
    positions = np.arange(4000, 4095)[None]
    made = tables(rotary, positions, np.full_like(positions, 4096))
    x = paddle.to_tensor(np.random.default_rng(1).standard_normal((1, 95, 2, 16)).astype(np.float32)).astype(NARROW)
    y = GpuKernels().rotate(x, rotary, *made)
    assert y.dtype == x.dtype
    angles = positions[0][:, None] * 10_000.0 ** -(np.arange(8) / 8)
    first, second = np.split(x.astype("float32").numpy().astype(np.float64), 2, axis=-1)
    cosines, sines = np.cos(angles)[:, None], np.sin(angles)[:, None]
    expected = np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)
    np.testing.assert_allclose(y.astype("float32").numpy()[0], expected[0], rtol=2.0**-8, atol=2e-3)
    assert stand_ins.calls == [("rotary", WIDE, False)]


def test_tables_are_made_once_a_batch_and_not_kept_for_ever(paddle: Any, stand_ins: StandIns) -> None:
    from sft.models.gpu_kernels import KEPT, GpuKernels
    from sft.models.turning import tables

    kernels, rotary = GpuKernels(), Rotary(10_000.0, 16, 32)
    batches = [tables(rotary, np.arange(3)[None], np.full((1, 3), 3)) for _ in range(2 * KEPT)]
    seen = []
    for made in batches:
        seen.append({id(kernels._unsigned(rotary, *made)[1]) for _ in range(3)})
        assert len(kernels._tables) <= KEPT
    assert all(len(one) == 1 for one in seen)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("rows", [None, 3])
def test_cross_entropy(paddle: Any, monkeypatch: pytest.MonkeyPatch, rows: int | None, cap: float | None) -> None:
    """This one has a kernel on a CPU: the loss and both gradients, by the two. (On a CPU paddle takes a logit that is
    64 less than the largest, or more, for one that is 64 less.)"""
    from sft.models.gpu_kernels import GpuKernels
    from sft.models.kernels import Kernels
    from sft.training import loss

    random = np.random.default_rng(2)
    labels = random.integers(0, 40, (2, 7))
    labels[0, 2:4] = -100
    if rows is not None:
        monkeypatch.setattr(loss, "CHUNK_BYTES", rows * 40 * 4)
    found = []
    for kernels in (Kernels(), GpuKernels()):
        hidden = paddle.to_tensor(np.random.default_rng(3).standard_normal((2, 7, 8)).astype(np.float32))
        weight = paddle.to_tensor(np.random.default_rng(4).standard_normal((8, 40)).astype(np.float32))
        hidden.stop_gradient = weight.stop_gradient = False
        head = SimpleNamespace(weight=weight, cap=cap, scale=1.5, kernels=kernels)
        value = loss.target_loss(hidden, labels, head)
        value.backward()
        found.append(
            [value.numpy(), hidden.grad.numpy(), weight.grad.numpy(), loss.target_scores(hidden, labels, head)]
        )
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_a_gpu_has_its_own_kernels_where_no_plugin_has_some(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft.models.gpu_kernels import GpuKernels
    from sft.models.kernels import PLAIN
    from sft.models.setup import kernels_for
    from sft.precision import Precision

    plugins = SimpleNamespace(hook=SimpleNamespace(sft_kernels=lambda run, precision: None))
    assert kernels_for(plugins, None, Precision()) is PLAIN
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
    assert isinstance(kernels_for(plugins, None, Precision()), GpuKernels)

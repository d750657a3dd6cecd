"""Each piece beside its formula in float64 and beside paddle's operations: values, gradients, bits, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sft

SHAPES = [(1, 1, 5), (2, 3, 32), (2, 7, 67), (3, 41, 1056)]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


def with_gradients(compute: Callable[..., Any], *arrays: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """What ``compute`` makes of tensors, and the gradients of Σ y · u, u random."""
    import paddle

    tensors = [paddle.to_tensor(array, stop_gradient=False) for array in arrays]
    y = compute(*tensors)
    (y * paddle.to_tensor(random(*y.shape, seed=99))).sum().backward()
    return y.numpy(), [tensor.grad.numpy() for tensor in tensors]


def slopes(compute: Callable[..., np.ndarray], *arrays: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The same in float64, by central differences along one random direction each: [the product with it]."""
    wide = [array.astype(np.float64) for array in arrays]
    y = compute(*wide)
    upstream = random(*y.shape, seed=99).astype(np.float64)
    found = []
    for number, array in enumerate(wide):
        direction, step = random(*array.shape, seed=7).astype(np.float64), 1e-6
        moved = [
            (compute(*wide[:number], array + sign * step * direction, *wide[number + 1 :]) * upstream).sum()
            for sign in (1, -1)
        ]
        found.append((moved[0] - moved[1]) / (2 * step))
    return y, found


def check(native: Callable[..., Any], plain: Callable[..., Any], formula: Any, *arrays: np.ndarray) -> None:
    (y, grads), (expected, others) = with_gradients(native, *arrays), with_gradients(plain, *arrays)
    exact, along = slopes(formula, *arrays)
    near(y, expected)
    near(y, exact)
    for array, grad, other, slope in zip(arrays, grads, others, along, strict=True):
        near(grad, other)
        direction = random(*array.shape, seed=7)
        scale = np.linalg.norm(grad.astype(np.float64)) * np.linalg.norm(direction) + 1e-30
        assert abs((grad.astype(np.float64) * direction).sum() - slope) <= 1e-5 * scale


def near(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(kernels: sft.Kernels, shape: tuple[int, ...], offset: float) -> None:
    def formula(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return (offset + weight) * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def of(some: sft.Kernels) -> Callable[..., Any]:
        return lambda x, weight: some.rms_norm(x, weight, 1e-5, offset)

    check(of(kernels), of(sft.PLAIN), formula, random(*shape), random(shape[-1], seed=1))


def test_a_long_row_is_normed_as_float64_does(kernels: sft.Kernels, paddle: Any) -> None:
    x = np.full((2, 100_003), 1e-3, np.float32)
    x[0, 0] = 300.0  # beside its square, 90,000, small terms vanish in a plain sum
    y = kernels.rms_norm(paddle.to_tensor(x), paddle.ones([x.shape[1]]), 0.0, 0.0).numpy()
    wide = x.astype(np.float64)
    near(y, wide / np.sqrt((wide * wide).mean(-1, keepdims=True)))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize(("width", "size"), [(64, 64), (80, 20), (8, 8), (6, 2)])
@pytest.mark.parametrize("rows", [1, 2], ids=["one table", "a table a row"])
def test_rotation(kernels: sft.Kernels, interleaved: bool, width: int, size: int, rows: int) -> None:
    import paddle

    angles = np.random.default_rng(3).uniform(0, 9, (rows, 11, 1, size // 2))
    rotary = sft.Rotary(10000.0, size, 64, interleaved=interleaved)
    first = np.arange(0, size, 2) if interleaved else np.arange(size // 2)
    second = first + (1 if interleaved else size // 2)
    cosines, sines = np.empty((2, rows, 11, 1, size))
    cosines[..., first] = cosines[..., second] = np.cos(angles)
    sines[..., second] = np.sin(angles)
    sines[..., first] = -sines[..., second]
    tables = [paddle.to_tensor(table.astype(np.float32)) for table in (cosines, sines)]

    def formula(x: np.ndarray) -> np.ndarray:
        y = x.copy()
        a, b = x[..., first], x[..., second]
        y[..., first] = a * np.cos(angles) - b * np.sin(angles)
        y[..., second] = b * np.cos(angles) + a * np.sin(angles)
        return y

    def of(some: sft.Kernels) -> Callable[..., Any]:
        return lambda x: some.rotate(x, rotary, *tables)

    check(of(kernels), of(sft.PLAIN), formula, random(2, 11, 3, width))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(kernels: sft.Kernels, shape: tuple[int, ...]) -> None:
    def formula(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return gate / (1 + np.exp(-gate)) * up

    check(kernels.swiglu, sft.PLAIN.swiglu, formula, random(*shape) * 3, random(*shape, seed=1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_geglu(kernels: sft.Kernels, shape: tuple[int, ...]) -> None:
    def formula(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up

    check(kernels.geglu, sft.PLAIN.geglu, formula, random(*shape) * 3, random(*shape, seed=1))


def test_values_that_are_not_finite_stay_so(kernels: sft.Kernels, paddle: Any) -> None:
    gate = np.array([np.nan, np.inf, -88.0, -200.0, 100.0, 88.5, 0.0, -1e-20], np.float32)
    found = kernels.swiglu(*[paddle.to_tensor(one) for one in (gate, np.ones(8, np.float32))]).numpy()
    expected = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64)))
    assert np.isnan(found[0])
    np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-6, atol=1e-36)
    x = random(4, 40)
    x[1, 3], x[2, 5] = np.nan, np.inf
    normed = kernels.rms_norm(paddle.to_tensor(x), paddle.ones([40]), 1e-6, 0.0).numpy()
    assert np.isfinite(normed[[0, 3]]).all()
    assert np.isnan(normed[1]).all()
    assert np.isnan(normed[2, 5])


def test_what_has_no_gradient_gets_none(kernels: sft.Kernels, paddle: Any) -> None:
    x, weight = paddle.to_tensor(random(3, 32), stop_gradient=False), paddle.to_tensor(random(32))
    kernels.rms_norm(x, weight, 1e-5, 0.0).sum().backward()
    assert weight.grad is None
    assert x.grad is not None
    weight.stop_gradient = False
    kernels.rms_norm(x.detach(), weight, 1e-5, 0.0).sum().backward()
    assert weight.grad is not None
    gate, up = paddle.to_tensor(random(3, 32), stop_gradient=False), paddle.to_tensor(random(3, 32))
    kernels.swiglu(gate, up).sum().backward()
    assert (gate.grad is None, up.grad is None) == (False, True)
    with paddle.no_grad():
        assert kernels.swiglu(gate, up).stop_gradient


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_what_is_not_float32_is_left_to_others(library: Any, paddle: Any, dtype: str) -> None:
    from sft_kernels_cpu.kernels import NativeKernels

    class Others(sft.Kernels):
        def rms_norm(self, *arguments: Any) -> Any:
            return "norm"

        def rotate(self, *arguments: Any) -> Any:
            return "rotation"

        def swiglu(self, *arguments: Any) -> Any:
            return "swiglu"

        def geglu(self, *arguments: Any) -> Any:
            return "geglu"

    kernels, x = NativeKernels(library, Others()), paddle.ones([1, 2, 1, 8], dtype)
    assert kernels.rms_norm(x, paddle.ones([8]), 1e-5, 0.0) == "norm"
    assert kernels.rms_norm(x.astype("float32"), paddle.ones([8], dtype), 1e-5, 0.0) == "norm"
    assert kernels.rotate(x, sft.Rotary(10000.0, 8, 8), *[paddle.ones([1, 2, 1, 8])] * 2) == "rotation"
    assert kernels.swiglu(x, x) == "swiglu"
    assert kernels.geglu(x, x) == "geglu"


def test_the_number_of_threads_changes_no_bit(kernels: sft.Kernels, threads: Callable[[int], None]) -> None:
    def both(x: Any, weight: Any) -> Any:
        return kernels.swiglu(kernels.rms_norm(x, weight, 1e-5, 0.0), x)

    found = []
    for count in (1, 2, 2):
        threads(count)
        y, grads = with_gradients(both, random(2, 64, 512), random(512))
        found.append([y, *grads])
    for other in found[1:]:
        assert all((a == b).all() for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("size", [8, 64, 96, 256])
def test_four_bits(library: Any, size: int) -> None:
    """To the last bit what is looked up one by one; blocks too small for this level go to a lower one."""
    import paddle

    from sft_kernels_cpu.kernels import NativeKernels

    draw = np.random.default_rng(size)
    for blocks in (1, 3, 1000):
        codes = draw.integers(0, 256, blocks * size // 2, dtype=np.uint8)
        values, scales = draw.standard_normal((2, 16 + blocks)).astype(np.float32)
        values, scales = values[:16], scales[16:]
        expected = values[np.stack([codes >> 4, codes & 15], axis=1).reshape(blocks, size)] * scales[:, None]
        tensors = map(paddle.to_tensor, (codes, values, scales))
        found = NativeKernels(library).four_bits(*tensors, size)
        assert np.array_equal(found.numpy(), expected.reshape(-1))


def test_blocks_that_are_no_whole_vectors_stay_where_they_are(library: Any, paddle: Any) -> None:
    from sft_kernels_cpu.kernels import NativeKernels

    codes, values, scales = np.zeros(15, np.uint8), np.ones(16, np.float32), np.ones(5, np.float32)
    for size in (6, 3):
        assert NativeKernels(library).four_bits(*map(paddle.to_tensor, (codes, values, scales)), size) is None


@pytest.mark.parametrize("shape", [[3, 40, 64], [7]])
def test_what_is_soon_dropped_shares_memory_one_after_the_other(paddle: Any, shape: list[int]) -> None:
    """Never with a tensor that is still there, be it in Python or in backward's hands."""
    from sft_kernels_cpu.tensors import passing

    first, second = passing(shape), passing(shape)
    first.set_value(paddle.full(shape, 1.0))
    second.set_value(paddle.full(shape, 2.0))
    assert first.data_ptr() != second.data_ptr()
    assert not first.data_ptr() % 64
    factor = paddle.ones(shape)
    factor.stop_gradient = False
    product = (first * factor).sum()
    pointers = {first.data_ptr(), second.data_ptr()}
    del first, second
    third, fourth = passing(shape), passing(shape)
    assert {third.data_ptr(), fourth.data_ptr()} & pointers != pointers  # backward has the first one
    for one in (third, fourth):
        one.set_value(paddle.full(shape, 3.0))
    product.backward()
    assert (factor.grad == 1.0).all()
    del product, factor
    assert third.data_ptr() in pointers or fourth.data_ptr() in pointers


def test_what_is_kept_until_backward_leaves_no_memory_behind(paddle: Any) -> None:
    """As where all weights train: a Linear keeps what goes into it."""
    from sft_kernels_cpu import tensors

    many = [tensors.passing([40, 64]) for _ in range(9)]
    assert len({one.data_ptr() for one in many}) == 9
    del many
    assert len(tensors._rooms) == 2

"""Products of few rows and attention of one token beside float64; what is left to others; answers with and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sft

ROWS = {"float32": (1, 2, 3, 7, 16, 32), "bfloat16": (1, 2, 3, 7, 8)}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


def near(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def held(array: np.ndarray, dtype: str) -> tuple[Any, np.ndarray]:
    """The tensor, and its values in float64."""
    import paddle

    exact = array if dtype == "float32" else array.astype(ml_dtypes.bfloat16)
    return paddle.to_tensor(array).astype(dtype), exact.astype(np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transposed", [False, True], ids=["in out", "out in"])
@pytest.mark.parametrize(("inner", "columns"), [(1, 1), (5, 3), (19, 70), (33, 131), (64, 64), (259, 1100), (8, 2500)])
def test_products_of_few_rows(kernels: sft.Kernels, inner: int, columns: int, transposed: bool, dtype: str) -> None:
    import paddle

    weight, wide = held(random(columns, inner) if transposed else random(inner, columns), dtype)
    bias, added = held(random(columns, seed=5), dtype)
    for rows in ROWS[dtype]:
        x = random(rows, 1, inner, seed=rows)
        expected = x.astype(np.float64) @ (wide.T if transposed else wide)
        with paddle.no_grad():
            near(kernels.linear(paddle.to_tensor(x), weight, None, transposed).numpy(), expected)
            near(kernels.linear(paddle.to_tensor(x), weight, bias, transposed).numpy(), expected + added)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("inner", "columns", "rank"), [(40, 33, 3), (70, 200, 16), (576, 1100, 40)])
def test_low_rank_linear_of_few_rows(kernels: sft.Kernels, inner: int, columns: int, rank: int, dtype: str) -> None:
    import paddle

    weight, wide = held(random(inner, columns), dtype)
    bias, added = held(random(columns, seed=5), dtype)
    a, b = random(inner, rank), random(rank, columns)
    for rows in ROWS[dtype]:
        x = random(rows, 1, inner, seed=rows)
        exact = x.astype(np.float64)
        expected = exact @ wide + 0.7 * (exact @ a.astype(np.float64)) @ b.astype(np.float64)
        with paddle.no_grad():
            given = paddle.to_tensor(x), weight, None, paddle.to_tensor(a), paddle.to_tensor(b), 0.7
            near(kernels.low_rank_linear(*given).numpy(), expected)
            near(kernels.low_rank_linear(*given[:2], bias, *given[3:]).numpy(), expected + added)


def test_not_finite_values_reach_their_own_outputs_alone(kernels: sft.Kernels, paddle: Any) -> None:
    weight, x = random(40, 70), random(3, 40)
    weight[3, 5], weight[7, 69], x[1, 0] = np.inf, np.nan, np.nan
    for dtype in ("float32", "bfloat16"):
        tensor = paddle.to_tensor(weight).astype(dtype)
        for transposed in (False, True):
            given = tensor.t().contiguous() if transposed else tensor
            found = kernels.linear(paddle.to_tensor(x), given, None, transposed).numpy()
            assert np.isnan(found[1]).all()
            expected = np.isin(np.arange(70), (5, 69))
            assert (~np.isfinite(found[[0, 2]]) == expected).all()
            assert np.isinf(found[[0, 2], 5]).all()


def test_the_number_of_threads_changes_no_bit(kernels: sft.Kernels, threads: Callable[[int], None]) -> None:
    import paddle

    for dtype in ("float32", "bfloat16"):
        for transposed in (False, True):
            weight, _ = held(random(300, 500), dtype)
            x, found = paddle.to_tensor(random(3, 500 if transposed else 300)), []
            for count in (1, 2, 3):
                threads(count)
                found.append(kernels.linear(x, weight, None, transposed).numpy())
            assert (found[0] == found[1]).all()
            assert (found[0] == found[2]).all()


class Others(sft.Kernels):
    def linear(self, *arguments: Any) -> Any:
        return "others"

    def low_rank_linear(self, *arguments: Any) -> Any:
        return "others"


@pytest.mark.parametrize("what", ["many rows", "no row", "nine narrow", "trains", "learns", "float16"])
def test_other_products_are_left_to_others(library: Any, paddle: Any, what: str) -> None:
    from sft_kernels_cpu.kernels import NativeKernels

    held = {"float16": "float16", "nine narrow": "bfloat16"}.get(what, "float32")
    weight, a, b = paddle.ones([8, 8], held), *[paddle.ones([8, 8])] * 2
    x = paddle.ones([{"many rows": 33, "no row": 0, "nine narrow": 9}.get(what, 2), 8])
    weight.stop_gradient, x.stop_gradient = what != "trains", what != "learns"
    kernels = NativeKernels(library, Others())
    assert kernels.linear(x, weight, None) == "others"
    if what in ("nine narrow", "trains", "float16"):  # the others are for LoRA's own step
        assert kernels.low_rank_linear(x, weight, None, a, b, 1.0) == "others"


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (3, 3, 20), (5, 1, 64)])
def test_attention_of_one_token(
    kernels: sft.Kernels, heads: int, kv_heads: int, size: int, window: int | None, cap: float | None
) -> None:
    """Two prompts, one padded on the left, and so many tokens that the room ends twice."""
    import paddle

    begin, padding, rows = 5, np.asarray([0, 3]), 2
    steps = 150
    keys, values = random(rows, begin + steps, kv_heads, size), random(rows, begin + steps, kv_heads, size, seed=1)
    kept = kernels.kept_keys(*(paddle.to_tensor(one[:, :begin]) for one in (keys, values)))
    for step in range(steps):
        place = begin + step
        query = random(rows, 1, heads, size, seed=step)
        seen = sft.Seen(padding, place + 1, 1, window)
        new = (paddle.to_tensor(one[:, place : place + 1]) for one in (keys, values))
        found = kept.attend(paddle.to_tensor(query), *new, seen, cap).numpy()
        if step not in (0, 1, 8, 63, 64, 65, steps - 1):
            continue
        for row in range(rows):
            first = max(padding[row], 0 if window is None else place + 1 - window)
            for head in range(heads):
                own = slice(first, place + 1), head * kv_heads // heads
                scores = keys[row][own].astype(np.float64) @ query[row, 0, head] / np.sqrt(size)
                scores = scores if cap is None else cap * np.tanh(scores / cap)
                weights = np.exp(scores - scores.max())
                expected = weights @ values[row][own] / weights.sum()
                assert np.abs(found[row, 0, head] - expected).max() <= 2e-6


def test_two_tokens_at_once_are_attended_by_others_from_there_on(library: Any, paddle: Any) -> None:
    from sft_kernels_cpu.kernels import NativeKernels

    arrays = [random(2, 9, heads, 16, seed=heads) for heads in (4, 2, 2)]
    arrays[2] = arrays[2][::-1].copy()
    found = []
    for kernels in (NativeKernels(library), sft.PLAIN):
        kept, at, out = kernels.kept_keys(*(paddle.to_tensor(one[:, :4]) for one in arrays[1:])), 4, []
        for count in (1, 2, 1, 1):
            seen = sft.Seen(np.asarray([0, 2]), at + count, count, None)
            out.append(kept.attend(*(paddle.to_tensor(one[:, at : at + count]) for one in arrays), seen, None).numpy())
            at += count
        found.append(np.concatenate(out, axis=1))
    near(*found)

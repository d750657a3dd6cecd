"""Products of bfloat16 matrices and the rounding to bfloat16, by the oneDNN of paddle's wheel."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from no_onednn import Emulated, itself

from sft import runtime
from sft.models import onednn as module
from sft.models import packed


@pytest.fixture
def onednn(paddle: Any) -> module.OneDNN:
    return itself()


@pytest.fixture(params=["onednn", "emulated"])
def either(paddle: Any, request: pytest.FixtureRequest) -> Any:
    """oneDNN, and what stands in for it in other tests."""
    return itself() if request.param == "onednn" else Emulated()


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32, rounded to the nearest bfloat16."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("transpose_x", [False, True])
@pytest.mark.parametrize("transpose_y", [False, True])
@pytest.mark.parametrize("shape", [(1, 64, 33), (37, 5, 8), (130, 257, 70)])
def test_products_are_those_of_the_rounded_factors(
    paddle: Any, either: Any, dtype: str, transpose_x: bool, transpose_y: bool, shape: tuple[int, int, int]
) -> None:
    rows, inner, columns = shape
    x, y, onto = normal(rows, inner), normal(inner, columns, seed=1), normal(rows, columns, seed=2)
    exact = [one.astype(np.float64) for one in ((bfloat16(x), bfloat16(y)) if dtype == "bfloat16" else (x, y))]
    expected, bound = exact[0] @ exact[1], 1e-6 * (np.abs(exact[0]) @ np.abs(exact[1]))
    left = paddle.to_tensor(x.T if transpose_x else x).astype(dtype)
    right = paddle.to_tensor(y.T if transpose_y else y).astype(dtype)
    product = either.product(left, right, transpose_x, transpose_y)
    assert product.dtype == paddle.float32
    assert (np.abs(product.numpy() - expected) <= bound).all()
    out = paddle.to_tensor(onto)
    assert either.product(left, right, transpose_x, transpose_y, out) is out
    assert (np.abs(out.numpy() - (expected + onto)) <= bound + 1e-6 * np.abs(onto)).all()


def test_what_is_not_transposed_may_have_more_dimensions(paddle: Any, either: Any) -> None:
    x, y, onto = (paddle.to_tensor(normal(*shape, seed=6)) for shape in ((2, 3, 5), (5, 4), (2, 3, 4)))
    expected = x.numpy() @ y.numpy()
    np.testing.assert_allclose(either.product(x, y).numpy(), expected, rtol=1e-5, atol=1e-6)
    out = onto.clone()
    assert either.product(x.reshape([6, 5]), y, out=out) is out
    np.testing.assert_allclose(out.numpy(), expected + onto.numpy(), rtol=1e-5, atol=1e-6)


def test_what_is_transposed_has_two_dimensions(paddle: Any, onednn: module.OneDNN) -> None:
    with pytest.raises(ValueError, match="product of"):
        onednn.product(paddle.zeros([2, 3, 5]), paddle.zeros([2, 4]), transpose_x=True)


def test_a_part_of_a_tensor_is_what_it_seems(paddle: Any, either: Any) -> None:
    whole = paddle.to_tensor(normal(8, 12))
    found = either.product(whole[:, 2:6].t(), whole[:, 6:9])
    np.testing.assert_allclose(found.numpy(), whole.numpy()[:, 2:6].T @ whole.numpy()[:, 6:9], rtol=1e-5, atol=1e-6)


def test_nothing_times_nothing_is_zero(paddle: Any, either: Any) -> None:
    assert either.product(paddle.zeros([0, 3]), paddle.zeros([3, 4])).shape == [0, 4]
    assert (either.product(paddle.zeros([2, 0]), paddle.zeros([0, 4])).numpy() == np.zeros((2, 4))).all()


@pytest.mark.parametrize(
    ("x", "y", "out"),
    [
        (("float32", [2, 3]), ("float32", [4, 3]), None),
        (("float32", [2, 3]), ("bfloat16", [3, 4]), None),
        (("float64", [2, 3]), ("float64", [3, 4]), None),
        (("float32", [3]), ("float32", [3, 4]), None),
        (("float32", [2, 3]), ("float32", [1, 3, 4]), None),
        (("float32", [1, 2, 3]), ("float32", [3, 4]), ("float32", [1, 3, 4])),
        (("float32", [2, 3]), ("float32", [3, 4]), ("float32", [4, 2])),
        (("bfloat16", [2, 3]), ("bfloat16", [3, 4]), ("bfloat16", [2, 4])),
    ],
)
def test_what_does_not_go_together_never_reaches_the_library(
    paddle: Any, onednn: module.OneDNN, x: Any, y: Any, out: Any
) -> None:
    tensors = [None if one is None else paddle.zeros(one[1]).astype(one[0]) for one in (x, y, out)]
    with pytest.raises(ValueError, match="product of"):
        onednn.product(tensors[0], tensors[1], out=tensors[2])


def test_rounding_is_to_the_nearest_and_ties_to_even(paddle: Any, either: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW", 0)
    ties = np.arange(0x3F80_0000, 0x3F90_0000, 0x8000, dtype=np.uint32).view(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-30], np.float32)
    values = np.concatenate([ties, -ties, special, normal(1000) * np.float32(1e4)])
    rounded = either.rounded(paddle.to_tensor(values))
    assert rounded.dtype == paddle.bfloat16
    expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(rounded.numpy(), expected)  # which paddle gives as uint16
    np.testing.assert_array_equal(either.widened(rounded).numpy(), bfloat16(values))
    assert np.isnan(either.widened(either.rounded(paddle.full([9], float("nan")))).numpy()).all()


def test_many_sizes_are_converted_and_few_conversions_kept(
    paddle: Any, onednn: module.OneDNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FEW", 0)
    monkeypatch.setattr(module, "KEPT", 3)
    for count in [*range(1, 9), 2, 8, 5]:
        values = normal(count, 7, seed=count)
        found = onednn.widened(onednn.rounded(paddle.to_tensor(values)))
        np.testing.assert_array_equal(found.numpy(), bfloat16(values))
    assert len(onednn._conversions) == 3


class OffByOne(Emulated):
    """Says of what is computed wrongly."""

    def __init__(self, wrong: str) -> None:
        self.wrong = wrong

    def product(self, *args: Any, **more: Any) -> Any:
        product = super().product(*args, **more)
        return product + (1e-3 if str(args[0].dtype).endswith(self.wrong) else 0.0)

    def rounded(self, x: Any) -> Any:
        return super().rounded(x * (1.01 if self.wrong == "rounding" else 1.0))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("nothing", None), ("rounding", "bfloat16 numbers"), ("float32", "float32 products"),
     ("bfloat16", "bfloat16 products")],
)  # fmt: skip
def test_a_library_that_computes_wrongly_is_found_out(paddle: Any, wrong: str, said: str | None) -> None:
    assert module._wrong(OffByOne(wrong)) == said  # type: ignore[arg-type]


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Looks for oneDNN anew, in a processor that has what it takes."""
    monkeypatch.setattr("sft.runtime.cpu_flags", lambda: {"amx_bf16"})
    module._found.cache_clear()
    yield module.why_not
    module._found.cache_clear()


def test_why_it_is_not_used(paddle: Any, again: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.runtime.library", lambda name: None)
    assert again() == "paddle's oneDNN is not in this build of paddle"
    monkeypatch.setattr("sft.runtime.library", lambda name: ctypes.CDLL(None))
    module._found.cache_clear()
    assert "dnnl_version" in again()
    monkeypatch.setattr("sft.runtime.library", lambda name: ctypes.CDLL(None))
    monkeypatch.setattr(module, "OneDNN", lambda library: OffByOne("bfloat16"))
    module._found.cache_clear()
    assert again() == "paddle's oneDNN computes bfloat16 products wrongly"
    monkeypatch.setattr(module, "OneDNN", lambda library: Emulated())
    monkeypatch.setattr(Emulated, "multiplies_bfloat16", False, raising=False)
    module._found.cache_clear()
    assert again() == (
        "paddle's oneDNN does not use this processor's instructions for it (ONEDNN_MAX_CPU_ISA can forbid them)"
    )
    monkeypatch.setattr("sft.runtime.cpu_flags", lambda: {"avx2"})
    assert again() == "this processor has neither avx512_bf16 nor amx_bf16"


@pytest.mark.slow
def test_instructions_that_the_environment_forbids_are_not_counted_on(onednn: module.OneDNN) -> None:
    script = "from sft import runtime; runtime.prepare(); from sft.models.onednn import onednn; "
    script += "print(onednn().multiplies_bfloat16)"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    if "avx512_bf16" in runtime.cpu_flags() and not {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"} & set(os.environ):
        assert onednn.multiplies_bfloat16


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 64, 33), (16, 257, 70), (64, 5, 8)])
def test_products_with_packed_matrices(
    paddle: Any, onednn: module.OneDNN, transposed: bool, shape: tuple[int, int, int]
) -> None:
    rows, inner, columns = shape
    x, y = normal(rows, inner), normal(inner, columns, seed=1)
    weight = onednn.rounded(paddle.to_tensor(np.ascontiguousarray(y.T) if transposed else y))
    weight.persistable = True
    rounded, packs = onednn.rounded(paddle.to_tensor(x).reshape([rows, 1, inner])), onednn.packs()
    expected = bfloat16(x).astype(np.float64) @ bfloat16(y)
    if not onednn.multiplies_bfloat16:  # this processor has no instructions for it
        assert packs.product(rounded, weight, transposed) is None
        return
    for _ in range(2):  # packed, then found
        found = packs.product(rounded, weight, transposed)
        assert found.shape == [rows, 1, columns]
        assert np.abs(found.numpy()[:, 0] - expected).max() < 1e-5 * np.sqrt(inner)
    weight.scale_(2.0)
    assert np.abs(packs.product(rounded, weight, transposed).numpy()[:, 0] - 2 * expected).max() < 2e-5 * np.sqrt(inner)
    for other in ([packed.MOST + 1, 1, inner], [1, 2, inner], [rows, inner]):  # a prompt, or an expert's tokens
        assert packs.product(paddle.zeros(other, "bfloat16"), weight, transposed) is None
    weight.persistable = False  # as what is dequantized for one product
    assert packs.product(rounded, weight, transposed) is None
    packs.close()

"""Training and answering with bfloat16 products on a CPU: the pieces, and runs beside float32 ones."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from no_onednn import Emulated, itself, stand_in

import sft
from sft.models.sixteen_bits import SixteenBits


@pytest.fixture(params=["emulated", "onednn"])
def kernels(paddle: Any, request: pytest.FixtureRequest) -> SixteenBits:
    return SixteenBits(itself() if request.param == "onednn" else Emulated())  # type: ignore[arg-type]


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch.setattr)


def rounded(values: np.ndarray) -> np.ndarray:
    """float64, of the nearest bfloat16."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float64)


def near(found: Any, expected: np.ndarray, relative: float) -> None:
    """Within ``relative`` of the largest value."""
    found = found.astype("float32").numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


class Given:
    """Random values of a Linear of 3 x 50 tokens with a low-rank update, and the tensors of them."""

    def __init__(self, paddle: Any, weights: str, transposed: bool = False) -> None:
        draw = np.random.default_rng(0)
        shapes = {
            "x": (3, 50, 40),
            "w": (30, 40) if transposed else (40, 30),
            "bias": (30,),
            "a": (40, 4),
            "b": (4, 30),
        }
        self.values = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        self.upstream = draw.standard_normal((3, 50, 30)).astype(np.float32)
        self.tensors = {name: paddle.to_tensor(value) for name, value in self.values.items()}
        self.tensors["w"] = self.tensors["w"].astype(weights)
        for tensor in self.tensors.values():
            tensor.stop_gradient = False

    def flat(self, name: str) -> np.ndarray:
        value = self.upstream if name == "upstream" else self.values[name]
        return value.reshape(-1, value.shape[-1])


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_linear_is_that_of_its_rounded_factors(
    paddle: Any, kernels: SixteenBits, weights: str, transposed: bool
) -> None:
    given = Given(paddle, weights, transposed)
    x, w, bias = (given.tensors[name] for name in ("x", "w", "bias"))
    y = kernels.linear(x, w, bias, transposed)
    (y * paddle.to_tensor(given.upstream)).sum().backward()
    exact, upstream = rounded(given.flat("x")), rounded(given.flat("upstream"))
    matrix = rounded(given.values["w"]).T if transposed else rounded(given.values["w"])
    near(y, (exact @ matrix + given.values["bias"]).reshape(3, 50, 30), 1e-6)
    near(x.grad, (upstream @ matrix.T).reshape(3, 50, 40), 1e-6)
    of_matrix = exact.T @ upstream
    near(w.grad, of_matrix.T if transposed else of_matrix, 1e-6 if weights == "float32" else 2**-8)
    near(bias.grad, given.flat("upstream").astype(np.float64).sum(axis=0), 1e-6)
    assert w.grad.dtype == w.dtype
    with paddle.no_grad():
        np.testing.assert_array_equal(kernels.linear(x, w, bias, transposed).numpy(), y.numpy())


def test_what_can_be_made_again_is_not_kept(paddle: Any, kernels: SixteenBits) -> None:
    """A's gradient is that of x as it is made again, here twice what it was; a changed x is kept instead."""
    for changed in (False, True):
        given = Given(paddle, "bfloat16")
        x, w, bias, a, b = given.tensors.values()
        w.stop_gradient = True
        made = x * 1.0
        kernels.remember(made, lambda one, two: one + two, x.detach(), x.detach())
        if changed:
            made.add_(paddle.zeros([1]))
        y = kernels.low_rank_linear(made, w, bias, a, b, 0.5)
        (y * paddle.to_tensor(given.upstream)).sum().backward()
        again = rounded(given.flat("x")) if changed else 2 * given.flat("x").astype(np.float64)
        low = given.flat("upstream").astype(np.float64) @ given.values["b"].T.astype(np.float64)
        near(a.grad, 0.5 * again.T @ low, 1e-6)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_low_rank_update_is_float32_beside_rounded_products(paddle: Any, kernels: SixteenBits, weights: str) -> None:
    """Of A's gradient x alone is rounded, as that is what is kept of it."""
    given, s = Given(paddle, weights), 0.5
    x, w, bias, a, b = given.tensors.values()
    y = kernels.low_rank_linear(x, w, bias, a, b, s)
    (y * paddle.to_tensor(given.upstream)).sum().backward()
    exact, upstream = given.flat("x").astype(np.float64), given.flat("upstream").astype(np.float64)
    left, right = (given.values[name].astype(np.float64) for name in "ab")
    matrix = rounded(given.values["w"])
    expected = rounded(given.flat("x")) @ matrix + given.values["bias"] + s * exact @ left @ right
    near(y, expected.reshape(3, 50, 30), 1e-6)
    near(
        x.grad, (rounded(given.flat("upstream")) @ matrix.T + s * upstream @ right.T @ left.T).reshape(3, 50, 40), 1e-6
    )
    near(a.grad, s * rounded(given.flat("x")).T @ upstream @ right.T, 1e-6)
    near(b.grad, s * (exact @ left).T @ upstream, 1e-6)
    near(bias.grad, upstream.sum(axis=0), 1e-6)
    of_matrix = rounded(given.flat("x")).T @ rounded(given.flat("upstream"))
    near(w.grad, of_matrix, 1e-6 if weights == "float32" else 2**-8)
    with paddle.no_grad():
        np.testing.assert_array_equal(kernels.low_rank_linear(x, w, bias, a, b, s).numpy(), y.numpy())


def test_what_does_not_train_gets_no_gradient(paddle: Any, kernels: SixteenBits) -> None:
    given = Given(paddle, "bfloat16")
    x, w, _, a, b = given.tensors.values()
    x.stop_gradient = w.stop_gradient = True
    kernels.low_rank_linear(x, w, None, a, b, 1.0).sum().backward()
    assert x.grad is None
    assert w.grad is None
    assert a.grad is not None
    assert b.grad is not None


def test_layers_that_read_one_tensor_share_its_rounding_until_it_changes(paddle: Any, kernels: SixteenBits) -> None:
    given = Given(paddle, "bfloat16")
    x, w = given.tensors["x"].detach(), given.tensors["w"]
    assert kernels._rounded(x) is kernels._rounded(x)
    before = kernels.linear(x, w).numpy()
    x.scale_(2.0)
    near(kernels.linear(x, w), 2.0 * before, 1e-6)
    alive = weakref.ref(x)
    del x
    assert alive() is None  # it would keep all that it was computed from


def test_swiglu_is_float32_and_its_gradient_that_of_what_is_kept(paddle: Any, kernels: SixteenBits) -> None:
    draw = np.random.default_rng(0)
    gate, up, upstream = draw.standard_normal((3, 2, 70, 50)).astype(np.float32)
    left, right = paddle.to_tensor(gate, stop_gradient=False), paddle.to_tensor(up, stop_gradient=False)
    y = kernels.swiglu(left, right)
    (y * paddle.to_tensor(upstream)).sum().backward()
    near(y, gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up, 1e-6)
    g, u = rounded(gate), rounded(up)
    s = 1 / (1 + np.exp(-g))
    near(left.grad, upstream * u * s * (1 + g * (1 - s)), 1e-6)
    near(right.grad, upstream * g * s, 1e-6)


def test_no_tokens_are_no_trouble(paddle: Any, kernels: SixteenBits) -> None:
    """An expert may have none."""
    given = Given(paddle, "bfloat16")
    w = given.tensors["w"]
    x = paddle.zeros([0, 40])
    x.stop_gradient = False
    y = kernels.linear(x, w)
    assert y.shape == [0, 30]
    y.sum().backward()
    assert (w.grad.astype("float32").numpy() == 0).all()


Train = Callable[..., sft.Summary]
TRAINING = {"max_steps": 12, "num_samples": 2, "max_new_tokens": 4, "device": "cpu"}


def test_a_run_ends_near_the_float32_one(bf16: None, train: Train, tmp_path: Path) -> None:
    said: list[str] = []
    wide, narrow = train("wide", **TRAINING), train("narrow", bf16=True, say=said.append, **TRAINING)
    how = "bfloat16 products with float32 sums, by paddle's oneDNN; weights are held in float32"
    assert f"precision: {how}" in said
    assert wide.eval_loss_before is not None
    assert wide.eval_loss_after is not None
    assert narrow.eval_loss_after is not None
    assert wide.eval_loss_after < 0.95 * wide.eval_loss_before
    assert 0 < abs(narrow.eval_loss_after / wide.eval_loss_after - 1) < 0.01
    report = json.loads((tmp_path / "narrow" / "run.json").read_text())
    assert report["precision"] == {"dtype": "bfloat16", "weights": "float32", "frozen": "float32"}


def test_a_processor_without_it_computes_in_float32_and_says_so(
    train: Train, metrics: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft.runtime.cpu_flags", lambda: {"avx2"})
    said: list[str] = []
    train("wide", max_steps=2, device="cpu")
    train("refused", max_steps=2, device="cpu", bf16=True, say=said.append)
    reason = "this processor has neither avx512_bf16 nor amx_bf16"
    how = "computing in float32 (require_precision makes this an error)"
    assert f"precision: bf16 is asked for, and {reason}: {how}" in said
    assert metrics(tmp_path / "refused", same=True) == metrics(tmp_path / "wide", same=True)
    assert json.loads((tmp_path / "refused" / "run.json").read_text())["precision"]["dtype"] == "float32"
    with pytest.raises(sft.UsageError, match=f"bf16 is asked for, and {reason}"):
        train("required", bf16=True, device="cpu", require_precision=True)


def test_a_base_that_stays_is_held_in_half_the_memory(bf16: None, models: Path) -> None:
    """All matrices of the decoder, the tied one once; norms, and what comes out of the embedding, stay float32."""
    import paddle

    from sft.models.loading import load_model, open_model
    from sft.precision import Precision

    source = open_model(models / "llama-tied-gqa")
    wide, held = load_model(source), load_model(source, precision=Precision("bfloat16", "float32", "bfloat16"))
    assert held.lm_head.weight is held.model.embed_tokens.weight
    for (name, one), (_, other) in zip(wide.named_parameters(), held.named_parameters(), strict=True):
        assert other.dtype == (paddle.bfloat16 if one.ndim > 1 else paddle.float32), name
        expected = rounded(one.numpy()) if one.ndim > 1 else one.numpy()
        np.testing.assert_array_equal(other.astype("float32").numpy(), expected, err_msg=name)
    tokens = paddle.to_tensor([[3, 5]])
    assert held.embed(tokens).dtype == paddle.float32
    near(held.embed(tokens), rounded(wide.embed(tokens).numpy()), 0.0)


@pytest.fixture
def packing(paddle: Any) -> SixteenBits:
    found = itself()
    if not found.multiplies_bfloat16:
        pytest.skip("this processor has no instructions that multiply bfloat16, so nothing is packed")
    return SixteenBits(found)


def test_while_answers_are_computed_parameters_are_packed(paddle: Any, packing: SixteenBits) -> None:
    """Each once, with the products that they had, and no longer than that."""
    kernels, given = packing, Given(paddle, "bfloat16")
    x, w, bias, a, b = (given.tensors[name] for name in ("x", "w", "bias", "a", "b"))
    x, w.persistable = x[:, :7].reshape([21, 1, 40]), True
    with paddle.no_grad():
        before = kernels.linear(x, w, bias), kernels.low_rank_linear(x, w, bias, a, b, 0.5)
        with kernels.answering():
            packs = kernels._packs
            assert packs is not None
            packed = []
            for _ in range(2):
                found = kernels.linear(x, w, bias), kernels.low_rank_linear(x, w, bias, a, b, 0.5)
                packed.append([matrix for _, _, matrix in packs._matrices.values()])
            many = kernels.linear(given.tensors["x"], w, bias)
        assert kernels._packs is None
        near(many, kernels.linear(given.tensors["x"], w, bias).numpy(), 0.0)
    for one, other in zip(found, before, strict=True):
        near(one, other.numpy(), 1e-6)
    assert [len(some) for some in packed] == [1, 1]
    assert packed[0][0] is packed[1][0]
    held = weakref.ref(packed[0][0])
    del packed
    assert held() is None


def test_answers_are_computed_with_packed_matrices(
    packing: SixteenBits, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a token goes through; and the answers to several prompts are those without."""
    from sft.data.tokenizer import Tokenizer
    from sft.models import packed
    from sft.models.attention import DefaultAttention
    from sft.models.generation import answers
    from sft.models.kernels import use_kernels
    from sft.models.loading import load_model, open_model
    from sft.precision import Precision
    from sft.settings.arguments import GenerationArguments

    folder = models / "llama-tied-gqa"
    model = load_model(open_model(folder), precision=Precision("bfloat16", "float32", "bfloat16"))
    model.attention = DefaultAttention()
    use_kernels(model, packing)
    asked: list[Any] = []
    product = packed.Packs.product

    def watched(self: packed.Packs, x: Any, weight: Any, transposed: bool) -> Any:
        found = product(self, x, weight, transposed)
        asked.append((id(weight), found is not None))
        return found

    def given() -> list[str]:
        settings = GenerationArguments(max_new_tokens=8)
        return answers(model, Tokenizer(folder), [[5, 9, 7, 11], [8, 6], [12]], settings, 0)

    monkeypatch.setattr(packed.Packs, "product", watched)
    with_packs = given()
    matrices = {id(one) for one in model.parameters() if one.ndim > 1}
    assert {weight for weight, was_packed in asked if was_packed} == matrices
    monkeypatch.setattr(packed, "MOST", 0)
    asked.clear()
    assert given() == with_packs
    assert not any(was_packed for _, was_packed in asked)

"""Each optimizer's steps, against what other implementations compute (fixtures/make_reference.py) and the papers'
formulas in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.settings.arguments import TrainingArguments

FIXTURES = Path(__file__).parent / "fixtures"
RATES = [0.01, 0.02, 0.01, 0.005, 0.02, 0.01]


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return load_file(FIXTURES / "reference.safetensors")


def taken(
    paddle: Any,
    make: Callable[[list[sft.ParameterGroup]], Any],
    start: np.ndarray,
    gradients: np.ndarray,
    decay: float = 0.0,
    seen: Callable[[int, Any], None] = lambda step, optimizer: None,
) -> np.ndarray:
    """Where the steps of RATES lead; half-way another optimizer goes on from the state of the first."""
    parameter = paddle.create_parameter(list(start.shape), "float32")
    parameter.set_value(start)
    groups = [sft.ParameterGroup("all", {"w": parameter}, 1.0, decay)]
    optimizer = make(groups)
    for step, (gradient, rate) in enumerate(zip(gradients, RATES, strict=True)):
        parameter.grad_ = paddle.to_tensor(gradient)
        optimizer.step(rate)
        seen(step, optimizer)
        if step == 2:
            state = {key: array.copy() for key, array in optimizer.state().items()}
            optimizer = make(groups)
            optimizer.load(state)
            assert {key: array.tobytes() for key, array in optimizer.state().items()} == {
                key: array.tobytes() for key, array in state.items()
            }
    return np.asarray(parameter.numpy())


def case(reference: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    start, gradients, end = (reference[f"{name}.{kind}"] for kind in ("start", "gradients", "end"))
    return start, gradients, end


# --- lion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("betas", "decay"), [((0.9, 0.99), 0.0), ((0.95, 0.98), 0.3)])
def test_lion_is_the_papers(paddle: Any, betas: tuple[float, float], decay: float) -> None:
    """Algorithm 2 of arXiv 2302.06675, line by line."""
    from sft_optimizers.lion import Lion

    generator = np.random.default_rng(0)
    start, gradients = generator.standard_normal((5, 7)), generator.standard_normal((6, 5, 7))
    value, moment = start.astype(np.float32).astype(np.float64), np.zeros((5, 7))
    for gradient, rate in zip(gradients.astype(np.float32).astype(np.float64), RATES, strict=True):
        update = np.sign(betas[0] * moment + (1 - betas[0]) * gradient)
        value = value - rate * (update + decay * value)
        moment = betas[1] * moment + (1 - betas[1]) * gradient
    found = taken(
        paddle, lambda groups: Lion(groups, *betas), start.astype("float32"), gradients.astype("float32"), decay
    )
    np.testing.assert_allclose(found, value, atol=1e-6, rtol=0)


# --- adafactor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adafactor", "adafactor_all", "adafactor_vector"])
def test_adafactor_is_that_of_transformers(paddle: Any, reference: dict[str, np.ndarray], name: str) -> None:
    """In the layout of our Linears, which is turned: rows there are columns here."""
    from sft_optimizers.adafactor import Adafactor
    from sft_optimizers.options import AdafactorOptions

    options, decay = AdafactorOptions(), 0.0
    if name == "adafactor_all":
        options = replace(options, adafactor_beta1=0.7, adafactor_clip_threshold=0.5, adafactor_decay_rate=-0.6)
        options = replace(options, adafactor_epsilon1=1e-8, adafactor_epsilon2=0.01, adafactor_scale_parameter=True)
        decay = 0.1
    start, gradients, end = case(reference, name)
    assert np.abs(end - start).max() > 0.01
    if start.ndim == 2:
        start, gradients, end = start.T.copy(), gradients.transpose(0, 2, 1).copy(), end.T
    found = taken(paddle, lambda groups: Adafactor(groups, options), start, gradients, decay)
    np.testing.assert_allclose(found, end, atol=1e-6, rtol=0)


def test_adafactor_keeps_a_row_and_a_column(paddle: Any) -> None:
    from sft_optimizers.adafactor import Adafactor
    from sft_optimizers.options import AdafactorOptions

    parameter = paddle.create_parameter([3, 40, 30], "float32")  # three matrices
    optimizer = Adafactor([sft.ParameterGroup("all", {"w": parameter})], AdafactorOptions())
    parameter.grad_ = paddle.ones([3, 40, 30])
    optimizer.step(0.1)
    shapes = {key: array.shape for key, array in optimizer.state().items()}
    assert shapes == {"w.steps": (1,), "w.row": (3, 40), "w.column": (3, 30)}


# --- muon ---------------------------------------------------------------------------------------------------


def muon_of(matrices: set[str]) -> Callable[[list[sft.ParameterGroup]], Any]:
    from sft_optimizers.muon import Muon

    return lambda groups: Muon(groups, TrainingArguments(), matrices, 0.95, 5)


@pytest.mark.parametrize("turned", [False, True])
def test_muon_is_that_of_torch(paddle: Any, reference: dict[str, np.ndarray], turned: bool) -> None:
    start, gradients, end = case(reference, "muon_wide")
    if turned:
        start, gradients, end = start.T.copy(), gradients.transpose(0, 2, 1).copy(), end.T
    found = taken(paddle, muon_of({"w"}), start, gradients, 0.1)
    np.testing.assert_allclose(found, end, atol=5e-6, rtol=0)
    rounded = reference["muon.end"].T if turned else reference["muon.end"]  # as torch has it, in bfloat16
    np.testing.assert_allclose(found, rounded, atol=5e-3, rtol=0)
    assert np.abs(end - start).max() > 0.03


def test_muons_steps_are_nearly_orthogonal(paddle: Any) -> None:
    """Against a singular value decomposition: the same directions, singular values that Newton-Schulz brings near 1."""
    from sft_optimizers.muon import orthogonalised

    generator = np.random.default_rng(0)
    for shape in ((30, 12), (12, 30), (9, 9)):
        matrix = generator.standard_normal(shape)
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        found = orthogonalised(paddle.to_tensor(matrix.astype("float32")), 5).numpy()
        inner = left.T @ found @ right.T
        assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-4
        assert (np.diag(inner) > 0.6).all()
        assert (np.diag(inner) < 1.3).all()
        x = values / np.sqrt((values**2).sum())
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
        np.testing.assert_allclose(np.diag(inner), x, atol=1e-4)
    assert not orthogonalised(paddle.zeros([3, 4]), 5).numpy().any()


def test_muon_leaves_what_is_no_matrix_of_a_block_to_adamw(paddle: Any) -> None:
    from sft.training.adamw import AdamW

    generator = np.random.default_rng(1)
    start, gradients = generator.standard_normal((4, 6)), generator.standard_normal((6, 4, 6))
    runs = [
        taken(paddle, make, start.astype("float32"), gradients.astype("float32"), 0.1)
        for make in (muon_of({"other"}), lambda groups: AdamW(groups, TrainingArguments()))
    ]
    np.testing.assert_array_equal(*runs)


# --- adamw in 8 bits ----------------------------------------------------------------------------------------


def coded(groups: list[sft.ParameterGroup]) -> Any:
    from sft_optimizers.adamw_8bit import AdamW8bit

    return AdamW8bit(groups, TrainingArguments(), {"w"})


def test_the_tables_are_those_of_bitsandbytes(reference: dict[str, np.ndarray]) -> None:
    from sft_optimizers.codes import dynamic_map

    for number, signed in ((1, True), (2, False)):
        np.testing.assert_allclose(dynamic_map(signed), reference[f"adamw_8bit.map{number}"], rtol=3e-7, atol=0)


@pytest.mark.parametrize("lot", [256, 512, 1 << 22])
def test_adamw_8bit_is_that_of_bitsandbytes(
    paddle: Any, reference: dict[str, np.ndarray], lot: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and codes after each step, with any number of values that are float32 at a time. A value between two codes
    may be rounded to either, where the last bit of it differs."""
    from sft_optimizers import adamw_8bit
    from sft_optimizers.codes import dynamic_map

    monkeypatch.setattr(adamw_8bit, "LOT", lot)
    start, gradients, end = case(reference, "adamw_8bit")

    def seen(step: int, optimizer: Any) -> None:
        state = optimizer.state()
        for number, signed in ((1, True), (2, False)):
            zero = int(np.searchsorted(dynamic_map(signed), 0.0))
            found = (state[f"w.code{number}"].astype(int) + zero) % 256
            wanted = reference[f"adamw_8bit.code{number}"][step].astype(int)
            assert np.abs(found - wanted).max() <= 1
            assert (found != wanted).mean() <= 0.002
            # paddle's kernel has 1 - 0.999 in float32, which is 1.7e-5 away.
            np.testing.assert_allclose(
                state[f"w.scale{number}"], reference[f"adamw_8bit.scale{number}"][step], rtol=2e-5
            )

    found = taken(paddle, coded, start, gradients, 0.1, seen)
    assert (np.abs(found - end) > 5e-6).mean() <= 0.003  # all rates together times ten times that
    assert np.abs(end - start).max() > 0.05


def test_codes_are_the_nearest_of_the_table(paddle: Any) -> None:
    from sft_optimizers.codes import Codes, dynamic_map

    generator = np.random.default_rng(2)
    values = (generator.standard_normal(1000) * np.exp(3 * generator.standard_normal(1000))).astype(np.float32)
    values[256:512] = 0
    for signed in (True, False):
        own, table = values if signed else np.abs(values), dynamic_map(signed).astype(np.float64)
        codes, scale = Codes(signed).encode(paddle.to_tensor(own))
        assert (str(codes.dtype), codes.shape, scale.shape) == ("paddle.uint8", [1000], [4])
        back = Codes(signed).decode(codes, scale).numpy()
        for block in range(4):
            place = slice(256 * block, min(1000, 256 * (block + 1)))
            largest = np.abs(own[place]).max()
            assert float(scale[block]) == largest
            away = np.abs(own[place, None].astype(np.float64) - largest * table).min(axis=1)
            np.testing.assert_allclose(np.abs(own[place] - back[place]), away, atol=1e-6 * max(largest, 1e-9))
        assert not codes.numpy()[256:512].any()


def test_only_large_parameters_have_codes_and_embeddings_none(adapt: Any) -> None:
    from sft.training.groups import make_optimizer

    run = adapt(optim="adamw_8bit", adamw_8bit_min_size=600)
    optimizer = make_optimizer(run)
    for parameter in optimizer.parameters.values():
        parameter.grad_ = parameter * 0
    optimizer.step(0.0)
    kinds = {name: "code1" in kept for name, kept in optimizer.kept.items()}
    sizes = {name: math.prod(parameter.shape) for name, parameter in optimizer.parameters.items()}
    assert kinds == {name: size >= 600 and name != "model.embed_tokens.weight" for name, size in sizes.items()}
    assert set(kinds.values()) == {True, False}
    held = sum(array.nbytes for key, array in optimizer.state().items() if "self_attn.q_proj" in key)
    values = sum(size for name, size in sizes.items() if "self_attn.q_proj" in name)
    assert held == 2 * values + 8 * (values // 256) + 8 * 2  # of 8 bytes a value; and two powers of each matrix


# --- schedules ----------------------------------------------------------------------------------------------

SCHEDULES = json.loads((FIXTURES / "schedules.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_transformers(name: str) -> None:
    from types import SimpleNamespace

    from sft_optimizers.schedules import (
        CosineWithMinLr,
        CosineWithMinLrOptions,
        InverseSqrt,
        InverseSqrtOptions,
        Wsd,
        WsdOptions,
    )

    kind, *given = name.split()
    peak, cycles, plugin = 0.002, 0.5, None
    warmup = 4
    if kind == "wsd":
        plugin = Wsd(WsdOptions(wsd_decay_steps=6, wsd_decay_type=given[0], wsd_min_lr_ratio=float(given[1])))
    elif kind == "cosine_with_min_lr":
        warmup, cycles = int(given[0]), float(given[1])
        least = {"min_lr": 0.0005} if given[2] == "min_lr" else {"min_lr_rate": 0.2}
        plugin = CosineWithMinLr(CosineWithMinLrOptions(**least))
    else:
        warmup = int(given[0])
        plugin = InverseSqrt(InverseSqrtOptions(None if given[1] == "None" else int(given[1])))
    training = TrainingArguments(learning_rate=peak, warmup_steps=warmup, num_cycles=cycles)
    run: Any = SimpleNamespace(settings=SimpleNamespace(training=training))
    rates = plugin.sft_schedule(run, 20)
    found = [rates(step) / peak for step in range(1, 21)]
    np.testing.assert_allclose(found, SCHEDULES[name], rtol=1e-12, atol=1e-15)


def test_the_decay_by_ratio_and_the_end(paddle: Any) -> None:
    from types import SimpleNamespace

    from sft_optimizers.schedules import Wsd, WsdOptions

    run: Any = SimpleNamespace(settings=SimpleNamespace(training=TrainingArguments(learning_rate=1.0)))
    rates = Wsd(WsdOptions(wsd_decay_ratio=0.25, wsd_decay_type="linear")).sft_schedule(run, 10)
    assert [rates(step) for step in range(1, 12)] == pytest.approx([1.0] * 7 + [1.0, 2 / 3, 1 / 3, 0.0])

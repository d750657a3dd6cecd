"""PiSSA: where it begins, what it computes, and what is left of it after saving, loading, merging and resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.inference.merge import merge
from sft.testing import load, needs

Adapt = Callable[..., sft.Run]

RANK = 4
PLUGINS = ["lora", "pissa"]
BASES = {
    "plain": PLUGINS,
    "rslora": [*PLUGINS, "rslora"],
    "nf4": [*PLUGINS, "nf4"],
    "rslora-nf4": [*PLUGINS, "rslora", "nf4"],
}
CASES = [pytest.param(names, id=case, marks=needs(*names)) for case, names in BASES.items()]


def quiet(text: str) -> None:
    pass


def layers_of(run: sft.Run) -> dict[str, Any]:
    """Adapted layers by the target's Hugging Face name."""
    return {path: layer for path, layer in run.model.named_sublayers() if hasattr(layer, "lora_A")}


def weight_of(layer: Any) -> np.ndarray:
    """What the adapter stands over, float64 [in, out]."""
    base = layer.base
    weight = base.dequantize() if hasattr(base, "dequantize") else base.weight
    return np.asarray(weight.numpy(), np.float64)


def truncated(weight: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of a rank (Eckart and Young), by LAPACK in float64."""
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ vt[:rank])


# --- where it begins ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", CASES)
def test_a0_b0_s_is_the_best_approximation_of_its_rank(adapt: Adapt, names: list[str]) -> None:
    for name, layer in layers_of(adapt(plugin=names, lora_rank=RANK, pissa_niter=0)).items():
        weight = weight_of(layer)
        found = layer.scaling * layer.lora_A.numpy().astype(np.float64) @ layer.lora_B.numpy()
        np.testing.assert_allclose(found, truncated(weight, RANK), atol=1e-5 * np.abs(weight).max(), err_msg=name)


@pytest.mark.parametrize("names", CASES)
def test_the_factors_share_the_singular_values(adapt: Adapt, names: list[str]) -> None:
    """A₀ = U_r √S_r / √s and B₀ = √S_r V_rᵀ / √s: their Gram matrices are S_r / s, both."""
    for name, layer in layers_of(adapt(plugin=names, lora_rank=RANK, pissa_niter=0)).items():
        values = np.linalg.svd(weight_of(layer), compute_uv=False)[:RANK] / layer.scaling
        a, b = layer.lora_A.numpy().astype(np.float64), layer.lora_B.numpy().astype(np.float64)
        np.testing.assert_allclose(a.T @ a, np.diag(values), atol=1e-5 * values[0], err_msg=name)
        np.testing.assert_allclose(b @ b.T, np.diag(values), atol=1e-5 * values[0], err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_base_is_decomposed_by_its_values(paddle: Any, dtype: str) -> None:
    """As ``fp16_opt_level O2`` loads it, against the float64 approximation of the rounded weight."""
    from sft_peft_lora.layer import LoraLinear
    from sft_peft_lora.pissa import Pissa, PissaOptions

    base = paddle.nn.Linear(24, 20, bias_attr=False)
    base.to(dtype=dtype)
    assert str(base.weight.dtype) == f"paddle.{dtype}"
    layer = LoraLinear(base, 24, 20, RANK, 0.5, 0.0)
    Pissa(PissaOptions(pissa_niter=0)).lora_initialize(layer, "q_proj", np.random.default_rng(0))
    weight = base.weight.astype("float32").numpy().astype(np.float64)
    found = layer.scaling * layer.lora_A.numpy().astype(np.float64) @ layer.lora_B.numpy()
    np.testing.assert_allclose(found, truncated(weight, RANK), atol=1e-5 * np.abs(weight).max())


@pytest.mark.parametrize("shape", [(384, 512), (512, 384)], ids=["wide", "tall"])
@pytest.mark.parametrize("spectrum", ["flat", "falling"])
@pytest.mark.parametrize("rank", [4, 16])
def test_randomized_factors_are_within_a_ten_thousandth_of_the_optimal_residual(
    shape: tuple[int, int], spectrum: str, rank: int
) -> None:
    """A Gaussian matrix, whose singular values hardly differ, is the hard case; trained weights fall off."""
    from sft_peft_lora.pissa import PissaOptions
    from sft_peft_lora.svd import principal

    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32) / 20
    if spectrum == "falling":
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        weight = (u * s[0] / np.sqrt(np.arange(1, len(s) + 1, dtype=np.float32))) @ vt
    a, b = principal(weight, rank, PissaOptions().pissa_niter, np.random.default_rng(2))
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((shape[0], rank), (rank, shape[1]), np.float32, np.float32)
    exact = weight.astype(np.float64)
    optimal = np.linalg.norm(exact - truncated(exact, rank))
    assert np.linalg.norm(exact - a.astype(np.float64) @ b) <= (1 + 1e-4) * optimal


def test_few_iterations_are_randomized_on_a_small_weight_too(adapt: Adapt) -> None:
    """Two blocks of 12 samples are narrower than 32; what is drawn follows the seed."""
    runs = [layers_of(adapt(plugin=PLUGINS, lora_rank=RANK, pissa_niter=1, seed=seed)) for seed in (1, 2)]
    name = "model.layers.0.self_attn.q_proj"
    first, second = (run[name] for run in runs)
    assert not np.array_equal(first.lora_A.numpy(), second.lora_A.numpy())
    weight = weight_of(first)
    optimal = np.linalg.norm(weight - truncated(weight, RANK))
    for layer in (first, second):
        found = layer.scaling * layer.lora_A.numpy().astype(np.float64) @ layer.lora_B.numpy()
        assert optimal <= np.linalg.norm(weight - found) <= 1.05 * optimal


def test_trap_the_slow_svd_of_paddle_is_not_used(adapt: Adapt, paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any, **named: Any) -> None:
        raise AssertionError("90 s for a weight of 2048x2048")

    monkeypatch.setattr(paddle.linalg, "svd", never)
    for iterations in (0, 4):
        adapt(plugin=PLUGINS, lora_rank=RANK, pissa_niter=iterations)


@pytest.mark.parametrize("names", CASES)
def test_a_model_begins_as_its_base(
    adapt: Adapt, models: Path, logits_of: Any, input_ids: np.ndarray, names: list[str]
) -> None:
    run = adapt(plugin=names, lora_rank=RANK)
    base = load(models / "llama-tied-gqa", None, [name for name in names if name == "nf4"])
    expected = logits_of(base, input_ids)
    assert np.abs(logits_of(run.model, input_ids) - expected).max() < 1e-5 * np.abs(expected).max()


def test_initial_values_depend_on_seed_and_name_alone(adapt: Adapt) -> None:
    whole = layers_of(adapt(plugin=PLUGINS, seed=1, lora_rank=RANK))
    again = layers_of(adapt(plugin=PLUGINS, seed=1, lora_rank=RANK, lora_target_modules=["v_proj"]))
    for name, layer in again.items():
        np.testing.assert_array_equal(layer.lora_A.numpy(), whole[name].lora_A.numpy())
        np.testing.assert_array_equal(layer.lora_B.numpy(), whole[name].lora_B.numpy())


# --- what it computes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [0.7, 2.0])
def test_output_and_gradients_are_those_of_the_definition(paddle: Any, scaling: float) -> None:
    """y = x(W − s·A₀B₀) + s·xAB, of which A and B train (arXiv 2404.02948, equation 5), in float64."""
    from sft_peft_lora.layer import LoraLinear
    from sft_peft_lora.svd import principal

    size, out, rank = 12, 10, 3
    generator = np.random.default_rng(1)
    base = paddle.nn.Linear(size, out, bias_attr=False)
    base.weight.set_value(generator.standard_normal((size, out)).astype(np.float32))
    base.weight.stop_gradient = True
    layer = LoraLinear(base, size, out, rank, scaling, 0.0)
    a0, b0 = principal(base.weight.numpy(), rank, 0, generator)
    layer.subtract(a0, b0)
    a, b = (generator.standard_normal(half.shape).astype(np.float32) for half in (a0, b0))
    layer.lora_A.set_value(a)
    layer.lora_B.set_value(b)
    x, g = (generator.standard_normal((2, 5, width)).astype(np.float32) for width in (size, out))
    tensor = paddle.to_tensor(x, stop_gradient=False)
    y = layer(tensor)
    (y * paddle.to_tensor(g)).sum().backward()

    flat, upstream = x.reshape(-1, size).astype(np.float64), g.reshape(-1, out).astype(np.float64)
    residual = base.weight.numpy().astype(np.float64) - scaling * a0.astype(np.float64) @ b0
    expected = {
        "y": flat @ residual + scaling * flat @ a @ b,
        "x": upstream @ residual.T + scaling * upstream @ b.T @ a.T,
        "A": scaling * flat.T @ (upstream @ b.T),
        "B": scaling * (flat @ a).T @ upstream,
    }
    found = {"y": y, "x": tensor.grad, "A": layer.lora_A.grad, "B": layer.lora_B.grad}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy().reshape(value.shape), value, atol=2e-5, rtol=1e-5, err_msg=name)
    assert base.weight.grad is None


def test_a_and_b_alone_train(adapt: Adapt) -> None:
    run = adapt(plugin=PLUGINS, lora_rank=RANK)
    trained = {name.rpartition(".")[2] for name, p in run.model.named_parameters() if not p.stop_gradient}
    assert trained == {"lora_A", "lora_B"}


def test_training_learns(train: Any) -> None:
    summary = train(plugin=PLUGINS, lora_rank=RANK, learning_rate=1e-3)
    assert summary.eval_loss_after < summary.eval_loss_before - 0.05


# --- what is saved ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", CASES)
def test_what_is_written_is_a_plain_lora_of_twice_the_rank_over_the_original_base(
    train: Any, models: Path, tmp_path: Path, looking: Any, input_ids: np.ndarray, logits_of: Any, names: list[str]
) -> None:
    """A' = [A, A₀], B' = [B; −B₀]; loaded and merged it is the trained model."""
    kept: dict[str, tuple[np.ndarray, ...]] = {}

    class Keep(sft.Plugin):
        name = "keep"
        api_version = 1

        @sft.hookimpl
        def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
            for name, layer in layers_of(run).items():
                kept[name] = (layer.lora_A.numpy(), layer.lora_B.numpy(), *layer.subtracted(), layer.scaling)

    look, trained = looking
    train("out", (look, Keep), plugin=names, lora_rank=RANK)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 2 * RANK
    scaling = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
    assert config["init_lora_weights"] is True
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(kept) == 28
    for name, (a, b, a0, b0, trained_with) in kept.items():
        assert scaling == pytest.approx(trained_with, rel=1e-12)
        key = f"base_model.model.{name}.lora"
        np.testing.assert_array_equal(tensors[f"{key}_A.weight"], np.hstack([a, a0]).T)
        np.testing.assert_array_equal(tensors[f"{key}_B.weight"], np.vstack([b, -b0]).T)

    base = models / "llama-tied-gqa"
    adapted = load(base, tmp_path / "out")
    assert {type(layer).__name__ for layer in adapted.sublayers() if hasattr(layer, "lora_A")} == {"LoraLinear"}
    merge(str(base), tmp_path / "out", tmp_path / "merged", quiet)
    merged = load(tmp_path / "merged")
    for model in (adapted, merged):
        assert np.abs(logits_of(model, input_ids) - trained[0]).max() < 1e-5 * np.abs(trained[0]).max()
    plain = load(base, None, [name for name in names if name == "nf4"])
    assert np.abs(logits_of(plain, input_ids) - trained[0]).max() > 0.05


def test_trap_a_reloaded_adapter_is_the_trained_one(
    train: Any, models: Path, tmp_path: Path, looking: Any, input_ids: np.ndarray, fresh_logits: Any
) -> None:
    """Elsewhere the SVD runs again over the loaded A and B; here a fresh process computes the trained model."""
    look, trained = looking
    train("out", (look,), plugin=PLUGINS, lora_rank=RANK)
    found = fresh_logits(models / "llama-tied-gqa", tmp_path / "out", input_ids)
    assert np.abs(found - trained[0]).max() < 1e-5 * np.abs(trained[0]).max()


def test_trap_a_merge_adds_to_the_residual_and_not_to_the_weight(train: Any, models: Path, tmp_path: Path) -> None:
    """W + s(AB − A₀B₀); with nothing learned, that is W."""
    base = models / "llama-tied-gqa"
    train("out", plugin=PLUGINS, lora_rank=RANK, learning_rate=0.0, max_steps=1)
    merge(str(base), tmp_path / "out", tmp_path / "merged", quiet)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in before.items():
        np.testing.assert_allclose(after[name], weight, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("names", CASES)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
def test_trap_a_resumed_run_is_the_same_bit_by_bit(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], elsewhere: bool
) -> None:
    """Also where another LAPACK gives other factors: the trained ones belong to those that were subtracted."""
    from sft_peft_lora import svd

    settings = {"plugin": names, "lora_rank": RANK, "max_steps": 4, "lora_dropout": 0.2}
    train("whole", **settings, save_strategy="steps", save_steps=2)
    factors = svd.principal

    def other(*given: Any) -> tuple[np.ndarray, np.ndarray]:
        a, b = factors(*given)
        return 2 * a, b

    if elsewhere:
        monkeypatch.setattr(svd, "principal", other)
    train("resumed", **settings, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    whole, resumed = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


# --- what is refused ----------------------------------------------------------------------------------------


def test_without_lora_it_is_refused(train: Any, tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match="Plugin pissa refines lora, which is not active; add --plugin lora"):
        train(plugin=["pissa"])
    assert not (tmp_path / "out").exists()


def test_a_rank_that_a_weight_does_not_have_is_refused(train: Any, adapt: Adapt, tmp_path: Path) -> None:
    """k_proj is 32x16; its whole rank still works, and leaves nothing of the base."""
    with pytest.raises(sft.UsageError, match=r"lora_rank 17 is more than a weight of 32x16 has; give at most 16"):
        train(plugin=PLUGINS, lora_rank=17)
    assert not (tmp_path / "out").exists()
    layers = layers_of(adapt(plugin=PLUGINS, lora_rank=16, lora_target_modules=["k_proj"]))
    for layer in layers.values():
        found = layer.scaling * layer.lora_A.numpy().astype(np.float64) @ layer.lora_B.numpy()
        np.testing.assert_allclose(found, weight_of(layer), atol=1e-5)


def test_a_resumed_run_decomposes_nothing(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint has both pairs; the result is that of a run that never stopped."""
    from sft_peft_lora import svd

    calls: list[int] = []
    own = svd.principal
    monkeypatch.setattr(svd, "principal", lambda *given: calls.append(1) or own(*given))
    settings = {
        "plugin": ["lora", "pissa"],
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 3,
        "do_eval": False,
    }
    train("whole", **settings)
    assert len(calls) == 14
    source = str(tmp_path / "whole" / "checkpoint-1")
    train("resumed", resume_from_checkpoint=source, **settings)
    assert len(calls) == 14
    whole, resumed = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed

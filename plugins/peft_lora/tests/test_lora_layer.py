"""The LoRA layer against its equation in float64, and how a model is adapted: where, with what, and how it begins."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft

Adapt = Callable[..., sft.Run]

IN, OUT, RANK = 12, 10, 3
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
PLACES = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def layer_of(paddle: Any, bias: bool = True, scaling: float = 0.7, dropout: float = 0.0) -> tuple[Any, dict[str, Any]]:
    """A layer with all parts random, and its parts in float64."""
    from sft_peft_lora.layer import LoraLinear

    generator = np.random.default_rng(1)
    base = paddle.nn.Linear(IN, OUT, bias_attr=None if bias else False)
    shapes = {"W": (IN, OUT), "b": (OUT,), "A": (IN, RANK), "B": (RANK, OUT)}
    parts = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    base.weight.set_value(parts["W"])
    base.weight.stop_gradient = True
    if bias:
        base.bias.set_value(parts["b"])
        base.bias.stop_gradient = True
    layer = LoraLinear(base, IN, OUT, RANK, scaling, dropout)
    layer.lora_A.set_value(parts["A"])
    layer.lora_B.set_value(parts["B"])
    exact = {name: part.astype(np.float64) for name, part in parts.items()}
    return layer, exact if bias else {**exact, "b": np.zeros(OUT)}


# --- the layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("scaling", [0.7, 2.0])
def test_output_and_gradients_are_those_of_the_equation(paddle: Any, bias: bool, scaling: float) -> None:
    """y = xW + b + s·xAB (arXiv 2106.09685); sums of 12 products of size 1, so float32 is within 1e-5."""
    layer, p = layer_of(paddle, bias, scaling)
    generator = np.random.default_rng(2)
    x, g = (generator.standard_normal((2, 5, size)).astype(np.float32) for size in (IN, OUT))
    tensor = paddle.to_tensor(x, stop_gradient=False)
    y = layer(tensor)
    (y * paddle.to_tensor(g)).sum().backward()

    flat, upstream = x.reshape(-1, IN).astype(np.float64), g.reshape(-1, OUT).astype(np.float64)
    expected = {
        "y": flat @ p["W"] + p["b"] + scaling * flat @ p["A"] @ p["B"],
        "x": upstream @ p["W"].T + scaling * upstream @ p["B"].T @ p["A"].T,
        "A": scaling * flat.T @ (upstream @ p["B"].T),
        "B": scaling * (flat @ p["A"]).T @ upstream,
    }
    found = {"y": y, "x": tensor.grad, "A": layer.lora_A.grad, "B": layer.lora_B.grad}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy().reshape(value.shape), value, atol=2e-5, rtol=1e-5, err_msg=name)
    assert layer.base.weight.grad is None
    assert not bias or layer.base.bias.grad is None


def test_dropout_is_on_the_updates_input_while_training(paddle: Any) -> None:
    """With A and B identities the update is dropout(x): each element is gone, or divided by 1 - p."""
    from sft_peft_lora.layer import LoraLinear

    base = paddle.nn.Linear(64, 64)
    base.weight.set_value(np.zeros((64, 64), np.float32))
    layer = LoraLinear(base, 64, 64, 64, 1.0, 0.25)
    for half in (layer.lora_A, layer.lora_B):
        half.set_value(np.eye(64, dtype=np.float32))
    base.bias.set_value(np.full(64, 3.0, np.float32))
    x = np.random.default_rng(3).uniform(1, 2, (50, 64)).astype(np.float32)
    layer.train()
    update = layer(paddle.to_tensor(x)).numpy() - 3.0
    kept = update != 0
    np.testing.assert_allclose(update[kept], (x / 0.75)[kept], rtol=1e-5)
    assert abs(kept.mean() - 0.75) < 0.04  # 3,200 draws: the deviation is 0.008
    assert (layer(paddle.to_tensor(x)).numpy() - 3.0 != update).any()
    layer.eval()
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), x + 3.0, rtol=1e-6)


def test_without_dropout_training_and_evaluation_are_the_same(paddle: Any) -> None:
    layer, _ = layer_of(paddle)
    x = paddle.to_tensor(np.random.default_rng(4).standard_normal((3, IN)).astype(np.float32))
    layer.train()
    training = layer(x).numpy()
    layer.eval()
    np.testing.assert_array_equal(layer(x).numpy(), training)


# --- how it begins ------------------------------------------------------------------------------------------


def pairs(run: sft.Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each adapted layer's A and B, by the target's Hugging Face name."""
    return {
        path: (layer.lora_A.numpy(), layer.lora_B.numpy())
        for path, layer in run.model.named_sublayers()
        if hasattr(layer, "lora_A")
    }


def test_a_is_uniform_within_one_over_the_root_of_the_inputs_and_b_is_zero(adapt: Adapt) -> None:
    """Kaiming-uniform with a = √5 (PEFT's): U(-1/√in, 1/√in), whose variance is 1/(3·in)."""
    for name, (a, b) in pairs(adapt(lora_rank=16)).items():
        size = 48 if "down_proj" in name else 32
        bound = 1 / math.sqrt(size)
        assert a.shape == (size, 16)
        assert a.dtype == np.float32
        assert np.abs(a).max() <= bound
        assert np.abs(a).max() > 0.97 * bound  # 512 draws and more
        assert abs(a.mean()) < 0.1 * bound  # five deviations
        assert a.var() == pytest.approx(1 / (3 * size), rel=0.2)
        assert not b.any()


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied", "mistral-gqa", "gemma-tied"])
def test_an_adapted_model_begins_as_its_base(
    paddle: Any, adapt: Adapt, models: Path, logits_of: Any, case: str
) -> None:
    from sft.models.kernels import use_kernels
    from sft.models.loading import load_model, open_model

    run = adapt(model_name_or_path=str(models / case))
    found = load_file(models / case / "reference.safetensors")
    base = load_model(open_model(models / case))
    use_kernels(base, run.model.kernels)
    expected = logits_of(base, found["input_ids"])
    np.testing.assert_array_equal(logits_of(run.model, found["input_ids"]), expected)


def test_initial_values_depend_on_seed_and_name_alone(adapt: Adapt) -> None:
    """Not on which other layers are adapted, nor on what was drawn before."""
    whole = pairs(adapt(seed=1))
    again = pairs(adapt(seed=1, lora_target_modules=["v_proj", "up_proj"]))
    other = pairs(adapt(seed=2, lora_target_modules=["v_proj"]))
    assert len(again) == 4
    for name, (a, _) in again.items():
        np.testing.assert_array_equal(a, whole[name][0])
    for name, (a, _) in other.items():
        assert not np.isclose(a, whole[name][0]).all()
    drawn = [a.tobytes() for a, _ in whole.values()]
    assert len(set(drawn)) == len(drawn) == 14


# --- where, and with what -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied", "mistral-gqa", "gemma-tied"])
def test_by_default_every_linear_of_the_blocks_is_adapted_and_nothing_else_trains(
    adapt: Adapt, models: Path, case: str
) -> None:
    run = adapt(model_name_or_path=str(models / case))
    places = [f"model.layers.{n}.{place}" for n in (0, 1) for place in PLACES]
    trained = {name for name, parameter in run.model.named_parameters() if not parameter.stop_gradient}
    assert trained == {f"{place}.lora_{half}" for place in places for half in "AB"}
    assert not hasattr(run.model.lm_head, "lora_A")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["q_proj"], {(n, "self_attn.q_proj") for n in (0, 1)}),
        ("q_proj,v_proj", {(n, f"self_attn.{p}") for n in (0, 1) for p in ("q_proj", "v_proj")}),
        ([r".*layers\.1\..*"], {(1, place) for place in PLACES}),
        ([r"model\.layers\.0\.mlp\.(up|down)_proj"], {(0, "mlp.up_proj"), (0, "mlp.down_proj")}),
        ([r".*0\.self_attn\.[kv]_proj", "o_proj"], {*((0, place) for place in ATTENTION[1:]), (1, ATTENTION[3])}),
    ],
    ids=["name", "names", "block", "whole-name", "both"],
)
def test_targets_by_name_or_regular_expression(adapt: Adapt, asked: Any, expected: set[tuple[int, str]]) -> None:
    assert set(pairs(adapt(lora_target_modules=asked))) == {f"model.layers.{n}.{place}" for n, place in expected}


@pytest.mark.parametrize("asked", ["q_porj", r".*layers\.7\..*", "q_proj,q_porj"])
def test_trap_a_typo_in_the_targets_is_refused_with_what_there_is(train: Any, tmp_path: Path, asked: str) -> None:
    message = r"matches no layer; this model has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    with pytest.raises(sft.UsageError, match=message):
        train(lora_target_modules=asked)
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_no_regular_expression_is_refused(train: Any) -> None:
    with pytest.raises(sft.UsageError, match=r"Target '\(q' is not a valid regular expression"):
        train(lora_target_modules=["(q"])


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({}, 2.0),
        ({"lora_rank": 4}, 2.0),  # alpha is twice the rank, as PaddleNLP's script has it
        ({"lora_rank": 4, "lora_alpha": 8}, 2.0),
        ({"lora_rank": 16, "lora_alpha": 8}, 0.5),
        ({"lora_rank": 3, "lora_alpha": 1}, 1 / 3),
    ],
)
def test_the_scaling_is_alpha_over_rank(adapt: Adapt, settings: dict[str, Any], scaling: float) -> None:
    run = adapt(**settings)
    layers = [layer for layer in run.model.sublayers() if hasattr(layer, "lora_A")]
    assert {layer.scaling for layer in layers} == {scaling}
    assert {layer.rank for layer in layers} == {settings.get("lora_rank", 8)}


def test_training_changes_the_adapter_and_never_the_base(train: Any, models: Path) -> None:
    before = load_file(models / "llama-tied-gqa" / "model.safetensors")
    seen: list[bool] = []

    class Compare(sft.Plugin):
        name = "compare"
        api_version = 1

        @sft.hookimpl
        def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
            for name, parameter in run.model.named_parameters():
                if "lora_" in name:
                    seen.append(bool(parameter.numpy().any()))
                    continue
                original = before[name.replace(".base.", ".")]
                transposed = original.ndim == 2 and "embed" not in name
                np.testing.assert_array_equal(parameter.numpy(), original.T if transposed else original)

    summary = train(plugins=(Compare,), weight_decay=0.1)
    assert summary.eval_loss_after < summary.eval_loss_before - 0.05
    assert seen == [True] * 28
    assert summary.trainable_parameters == 8 * sum(2 * size for size in (64, 48, 48, 64, 80, 80, 80))

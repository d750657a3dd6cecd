"""rsLoRA: the scaling, and what is on disk so that everybody else computes it too."""

from __future__ import annotations

import json
import math
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


def layers_of(run: sft.Run) -> list[Any]:
    return [layer for layer in run.model.sublayers() if hasattr(layer, "lora_A")]


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({}, 4.0),
        ({"lora_rank": 2}, 4.0),
        ({"lora_rank": 16}, 4.0),
        ({"lora_rank": 16, "lora_alpha": 3}, 3.0),
        ({"lora_rank": 1, "lora_alpha": 0.5}, 0.5),
    ],
)
def test_the_scaling_is_alpha_over_the_root_of_the_rank_and_alpha_4_by_default(
    adapt: Adapt, settings: dict[str, Any], alpha: float
) -> None:
    scalings = {layer.scaling for layer in layers_of(adapt(plugin=["lora", "rslora"], **settings))}
    assert scalings == {alpha / math.sqrt(settings.get("lora_rank", 8))}


def test_output_and_gradients_are_those_of_the_equation(adapt: Adapt, paddle: Any) -> None:
    """y = xW + (α/√r)·xAB of the layers that a run makes, in float64 (arXiv 2312.03732, theorem 3.2)."""
    rank, alpha = 5, 3.0
    factor = alpha / math.sqrt(rank)
    generator = np.random.default_rng(3)
    for layer in layers_of(adapt(plugin=["lora", "rslora"], lora_rank=rank, lora_alpha=alpha))[:7]:
        for half in (layer.lora_A, layer.lora_B):
            half.set_value(generator.standard_normal(half.shape).astype(np.float32))
        sizes = (layer.in_features, layer.out_features)
        x, g = (generator.standard_normal((2, 5, size)).astype(np.float32) for size in sizes)
        tensor = paddle.to_tensor(x, stop_gradient=False)
        y = layer(tensor)
        (y * paddle.to_tensor(g)).sum().backward()

        w, a, b = (part.numpy().astype(np.float64) for part in (layer.base.weight, layer.lora_A, layer.lora_B))
        flat, upstream = x.reshape(-1, sizes[0]).astype(np.float64), g.reshape(-1, sizes[1]).astype(np.float64)
        expected = {
            "y": flat @ w + factor * flat @ a @ b,
            "x": upstream @ w.T + factor * upstream @ b.T @ a.T,
            "A": factor * flat.T @ (upstream @ b.T),
            "B": factor * (flat @ a).T @ upstream,
        }
        found = {"y": y, "x": tensor.grad, "A": layer.lora_A.grad, "B": layer.lora_B.grad}
        for name, value in expected.items():
            error = np.abs(found[name].numpy().reshape(value.shape) - value).max()
            assert error < 1e-6 * np.abs(value).max(), name
        assert layer.base.weight.grad is None


def test_its_name_as_a_setting_switches_it_on(adapt: Adapt) -> None:
    assert {layer.scaling for layer in layers_of(adapt(rslora=True, lora_rank=4))} == {2.0}
    assert {layer.scaling for layer in layers_of(adapt(rslora=False, lora_rank=16, lora_alpha=4))} == {0.25}


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 5, "lora_alpha": 3}], ids=["default", "odd"])
def test_what_is_written_says_use_rslora_and_is_the_trained_model(
    train: Any, models: Path, tmp_path: Path, looking: Any, input_ids: Any, logits_of: Any, settings: dict[str, Any]
) -> None:
    """PEFT computes lora_alpha / √r with use_rslora; reloaded here it is the same bit by bit."""
    look, trained = looking
    train("out", (look,), plugin=["lora", "rslora"], **settings)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    rank, alpha = settings.get("lora_rank", 8), settings.get("lora_alpha", 4)
    assert (config["use_rslora"], config["r"], config["lora_alpha"]) == (True, rank, alpha)
    base = models / "llama-tied-gqa"
    adapted = load(base, tmp_path / "out")
    np.testing.assert_array_equal(logits_of(adapted, input_ids), trained[0])

    merge(str(base), tmp_path / "out", tmp_path / "merged", lambda text: None)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{half}.weight"].astype(np.float64) for half in "AB")
    expected = before[f"{name}.weight"] + alpha / math.sqrt(rank) * b @ a
    np.testing.assert_allclose(after[f"{name}.weight"], expected, atol=1e-6, rtol=1e-6)
    merged = load(tmp_path / "merged")
    assert np.abs(logits_of(merged, input_ids) - trained[0]).max() < 1e-5 * np.abs(trained[0]).max()


@needs("nf4")
def test_trap_over_a_quantized_base_it_is_not_ignored(
    train: Any, models: Path, tmp_path: Path, looking: Any, input_ids: Any, logits_of: Any
) -> None:
    look, trained = looking
    train("out", (look,), plugin=["lora", "rslora", "nf4"], lora_rank=4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"]) == (True, 4)
    adapted = load(models / "llama-tied-gqa", tmp_path / "out")
    assert {layer.scaling for layer in adapted.sublayers() if hasattr(layer, "lora_A")} == {2.0}
    np.testing.assert_array_equal(logits_of(adapted, input_ids), trained[0])


def test_without_lora_it_is_refused(train: Any, tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match="Plugin rslora refines lora, which is not active; add --plugin lora"):
        train(plugin=["rslora"])
    assert not (tmp_path / "out").exists()

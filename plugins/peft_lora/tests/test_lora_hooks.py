"""The hooks that plugin lora publishes: toy refinements answer them and are honoured, in memory and on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.inference.merge import merge
from sft.testing import load

RANK, ALPHA = 4, 8.0


class Scaling(sft.Plugin):
    """s = 3 / rank, whatever alpha is."""

    name = "toy-scaling"
    api_version = 1
    requires = ("lora",)

    @sft.hookimpl
    def lora_scaling(self, rank: int, alpha: float) -> float:
        assert alpha == ALPHA
        return 3.0 / rank


class RootScaling(sft.Plugin):
    """α / √r."""

    name = "toy-root"
    api_version = 1
    requires = ("lora",)

    @sft.hookimpl
    def lora_scaling(self, rank: int, alpha: float) -> float:
        return alpha / rank**0.5


class Residual(sft.Plugin):
    """A and B begin random, and the base loses s·A·B: the sum begins as it was. On disk, a plain LoRA of rank 2r."""

    name = "toy-residual"
    api_version = 1
    requires = ("lora",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.first: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.asked: list[str] = []

    @sft.hookimpl
    def lora_initialize(self, layer: Any, name: str, rng: Any) -> bool:
        self.asked.append(name)
        a, b = (0.3 * rng.standard_normal(tensor.shape) for tensor in (layer.lora_A, layer.lora_B))
        layer.lora_A.set_value(a.astype(np.float32))
        layer.lora_B.set_value(b.astype(np.float32))
        weight = layer.base.weight
        weight.set_value((weight.numpy() - layer.scaling * a @ b).astype(np.float32))
        self.first[id(layer)] = (layer.lora_A.numpy(), layer.lora_B.numpy())
        return True

    @sft.hookimpl
    def lora_export(self, layer: Any) -> tuple[np.ndarray, np.ndarray]:
        a, b = self.first[id(layer)]
        return np.hstack([layer.lora_A.numpy(), a]), np.vstack([layer.lora_B.numpy(), -b])


class DefaultAlpha(sft.Plugin):
    name = "toy-alpha"
    api_version = 1
    requires = ("lora",)

    @sft.hookimpl
    def lora_default_alpha(self, rank: int) -> float:
        return 5.0 * rank


def layers_of(run: sft.Run) -> list[Any]:
    return [layer for layer in run.model.sublayers() if hasattr(layer, "lora_A")]


@pytest.mark.parametrize(
    ("plugin", "scaling", "written"),
    [
        (Scaling, 3.0 / RANK, {"lora_alpha": 3, "use_rslora": False}),
        (RootScaling, ALPHA / 2, {"lora_alpha": 8, "use_rslora": True}),
    ],
)
def test_a_scaling_is_used_and_written_so_that_peft_computes_it(
    train: Any,
    adapt: Any,
    models: Path,
    tmp_path: Path,
    logits_of: Any,
    looking: Any,
    input_ids: Any,
    plugin: type,
    scaling: float,
    written: Any,
) -> None:
    settings = {"lora_rank": RANK, "lora_alpha": ALPHA}
    assert {layer.scaling for layer in layers_of(adapt(plugin, **settings))} == {scaling}
    look, trained = looking
    train("out", (plugin, look), **settings)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {key: config[key] for key in written} == written
    assert config["r"] == RANK
    model = load(models / "llama-tied-gqa", tmp_path / "out")
    np.testing.assert_array_equal(logits_of(model, input_ids), trained[0])


def test_an_alpha_by_default_gives_way_to_the_setting(adapt: Any) -> None:
    assert {layer.scaling for layer in layers_of(adapt(DefaultAlpha, lora_rank=RANK))} == {5.0}
    assert {layer.scaling for layer in layers_of(adapt(DefaultAlpha, lora_rank=RANK, lora_alpha=ALPHA))} == {2.0}


def test_an_initialisation_is_asked_for_each_layer_by_name(
    adapt: Any, models: Path, logits_of: Any, input_ids: Any
) -> None:
    """It may change the base: the sum begins as the plain model, up to float32 noise."""
    from sft.models.loading import load_model, open_model

    run = adapt(Residual, lora_rank=RANK)
    (residual,) = (plugin for _, plugin in run.plugins.manager.list_name_plugin() if isinstance(plugin, Residual))
    names = [target.name for target in sft.target_layers(load_model(open_model(models / "llama-tied-gqa")))]
    assert residual.asked == names
    assert all(layer.lora_B.numpy().any() for layer in layers_of(run))
    found = logits_of(run.model, input_ids)
    expected = load_file(models / "llama-tied-gqa" / "reference.safetensors")["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_an_initialisation_draws_by_seed_and_name(adapt: Any) -> None:
    first, again, other = (adapt(Residual, lora_rank=RANK, seed=seed) for seed in (1, 1, 2))
    drawn = [[layer.lora_A.numpy() for layer in layers_of(run)] for run in (first, again, other)]
    assert all(np.array_equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))


def test_what_is_exported_adds_the_same_to_the_original_base(
    train: Any, models: Path, tmp_path: Path, logits_of: Any, looking: Any, input_ids: Any
) -> None:
    """A pair of rank 2r over the base as it was, loaded and merged: float32 noise of 1e-5 from the trained model."""
    look, trained = looking
    base = models / "llama-tied-gqa"
    plugins = (Residual, look)
    train("out", plugins, lora_rank=RANK, lora_alpha=ALPHA)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2 * RANK, 2 * ALPHA, False)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {2 * RANK}
    merge(str(base), tmp_path / "out", tmp_path / "merged", lambda text: None)
    adapted = load(base, tmp_path / "out")
    merged = load(tmp_path / "merged")
    for model in (adapted, merged):
        np.testing.assert_allclose(logits_of(model, input_ids), trained[0], atol=1e-4, rtol=0)
    plain = load(base)
    assert np.abs(logits_of(plain, input_ids) - trained[0]).max() > 0.05


@pytest.mark.parametrize(
    ("rank", "alpha", "scaling"), [(4, 8.0, 2.0), (4, 8.0, 4.0), (2, 4.0, 2.0), (9, 1.0, 1 / 3), (3, 5.5, 0.77)]
)
@pytest.mark.parametrize("factor", [1, 2])
def test_a_written_config_always_means_the_scaling(rank: int, alpha: float, scaling: float, factor: int) -> None:
    """PEFT computes alpha / r, or alpha / √r with use_rslora; the pair's rank need not be the trained one."""
    from sft_peft_lora.files import adapter_files

    pair = (np.zeros((6, factor * rank), np.float32), np.zeros((factor * rank, 5), np.float32))
    name = "model.layers.0.mlp.up_proj"
    config = adapter_files({name: pair}, ["up_proj"], {name: alpha}, {name: scaling}, "base", 0.0).config
    by_peft = config["lora_alpha"] / (config["r"] ** (0.5 if config["use_rslora"] else 1.0))
    assert by_peft == pytest.approx(scaling, rel=1e-12)
    assert config["r"] == factor * rank


@pytest.mark.parametrize(
    ("plugins", "settings", "refused"),
    [
        ((Scaling,), {}, r"toy-scaling decides how a new adapter begins \(lora_scaling\)"),
        ((DefaultAlpha,), {}, r"toy-alpha decides how a new adapter begins \(lora_default_alpha\)"),
        ((Residual,), {}, r"toy-residual decides how a new adapter begins \(lora_initialize\)"),
        ((), {"plugin": ["lora", "rslora"]}, r"rslora decides how a new adapter begins \(lora_scaling\)"),
        ((), {"plugin": ["lora", "pissa"]}, r"pissa decides how a new adapter begins \(lora_initialize\)"),
    ],
    ids=["scaling", "alpha", "initialize", "rslora", "pissa"],
)
def test_what_decides_how_an_adapter_begins_is_refused_where_one_is_given(
    train: Any, peft: Path, tmp_path: Path, plugins: tuple[type, ...], settings: dict[str, Any], refused: str
) -> None:
    with pytest.raises(sft.UsageError, match=rf"Plugin {refused}, and lora_path brings one .*; leave one of them out"):
        train("out", plugins, lora_path=str(peft / "llama-lora-all-linear"), **settings)
    assert not (tmp_path / "out").exists()


def test_a_refinement_that_only_exports_goes_on_from_an_adapter(train: Any, peft: Path, tmp_path: Path) -> None:
    class Export(sft.Plugin):
        name = "toy-export"
        api_version = 1
        requires = ("lora",)

        @sft.hookimpl
        def lora_export(self, layer: Any) -> tuple[np.ndarray, np.ndarray]:
            return 2 * layer.lora_A.numpy(), layer.lora_B.numpy()

    adapter = peft / "llama-lora-all-linear"
    train("out", (Export,), lora_path=str(adapter), learning_rate=0.0)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], 2 * tensor if "lora_A" in name else tensor)


def test_two_scalings_are_refused(train: Any, tmp_path: Path) -> None:
    message = r"Plugins toy-root \(.*\) and toy-scaling \(.*\) both provide lora_scaling"
    with pytest.raises(sft.UsageError, match=message):
        train("out", (RootScaling, Scaling))
    assert not (tmp_path / "out").exists()


def test_a_refinement_without_lora_is_refused(train: Any) -> None:
    with pytest.raises(sft.UsageError, match="Plugin toy-scaling refines lora, which is not active"):
        train("out", (Scaling,), plugin=[])

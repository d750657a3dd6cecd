"""A plugin that changes the model's config: training, every reader and what is saved describe one model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
from model_folders import architecture_of, own_logits
from safetensors import safe_open

import sft
from sft.inference.evaluate import evaluate_finished
from sft.inference.merge import merge
from sft.models.config import with_one_spelling
from sft.testing import forward, load

FIXTURES = Path(__file__).parent / "fixtures"
Train = Callable[..., sft.Summary]

ROTARY = """
    from dataclasses import dataclass
    import sft

    @dataclass
    class Options:
        rotary_factor: float = sft.option(2.0, "how much positions are stretched")

    class Rotary(sft.Plugin):
        name = "rotary"
        api_version = 1
        Options = Options

        @sft.hookimpl
        def sft_model_config(self, run, config):
            config["rope_scaling"] = {"rope_type": "linear", "factor": self.options.rotary_factor}
"""


@pytest.fixture
def rotary(distribute: Callable[..., None]) -> None:
    """An installed plugin that scales the rotary embedding linearly, by 2 unless an option says otherwise."""
    distribute("toy-rotary", ROTARY, {"rotary": "Rotary"})


@pytest.fixture
def scaled(models: Path, tmp_path: Path) -> Path:
    """The base with the same scaling, by 4, written into its config.json by hand."""
    folder = tmp_path / "scaled"
    shutil.copytree(models / "llama-tied-gqa", folder)
    values = json.loads((folder / "config.json").read_text())
    theta = values.pop("rope_parameters")["rope_theta"]
    values.update(rope_theta=theta, rope_scaling={"rope_type": "linear", "factor": 4.0})
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def measured(model: Path, adapter: Path | None, dataset: Path, *plugins: str) -> float:
    values = {"model_name_or_path": str(model), "dataset_name_or_path": str(dataset)}
    return float(evaluate_finished(values, adapter, lambda text: None, plugins)["eval_loss"])


def test_a_whole_result_says_what_was_trained(
    rotary: None, train: Train, base_model: Path, scaled: Path, dataset: Path, tmp_path: Path
) -> None:
    found = train("out", plugin=["rotary"], rotary_factor=4.0, max_steps=1)
    by_hand = train("hand", model_name_or_path=str(scaled), max_steps=1)
    plain = train("plain", max_steps=1)
    assert found.eval_loss_before == by_hand.eval_loss_before
    assert abs(found.eval_loss_before - plain.eval_loss_before) > 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert "rope_scaling_type" not in config  # PaddleNLP's spelling, which transformers does not know
    assert measured(tmp_path / "out", None, dataset) == pytest.approx(found.eval_loss_after, abs=1e-6)
    assert json.loads((tmp_path / "plain" / "config.json").read_text()).get("rope_scaling") is None


def test_an_adapter_brings_the_plugin_back(
    rotary: None, train: Train, base_model: Path, scaled: Path, dataset: Path, tmp_path: Path
) -> None:
    pytest.importorskip("sft_peft_lora")
    out = tmp_path / "out"
    run = train("out", plugin=["rotary", "lora"], rotary_factor=4.0, max_steps=3, learning_rate=1e-2)
    said = safe_open(str(out / "adapter_model.safetensors"), framework="numpy").metadata()
    assert json.loads(said["sft.config"]) == {"rotary": {"rotary_factor": 4.0}}
    assert measured(base_model, out, dataset) == pytest.approx(run.eval_loss_after, abs=1e-6)
    ids = np.arange(3, 43)[None]
    expected = own_logits(load(scaled, out), ids)  # which is scaled already, by the same
    assert np.array_equal(own_logits(load(base_model, out), ids), expected)
    merge(str(base_model), out, tmp_path / "merged", lambda text: None, ["rotary"])
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    np.testing.assert_allclose(
        forward(load(tmp_path / "merged"), ids), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    left_out = own_logits(load(base_model, out, ["no:rotary"]), ids)
    assert np.abs(left_out - expected).max() > 1e-4


def test_an_adapter_whose_plugin_is_gone_is_refused(
    rotary: None, train: Train, base_model: Path, site: Path, tmp_path: Path
) -> None:
    pytest.importorskip("sft_peft_lora")
    from sft.plugins.discovery import entries

    train("out", plugin=["rotary", "lora"], max_steps=1)
    shutil.rmtree(site / "toy_rotary-1.0.dist-info")
    entries.cache_clear()
    with pytest.raises(sft.UsageError, match="over a base that plugin rotary changes, which is not installed"):
        load(base_model, tmp_path / "out")


def test_commands_take_the_plugin_by_name(
    rotary: None, base_model: Path, scaled: Path, dataset: Path, tmp_path: Path
) -> None:
    """By 2, its default: generate answers as the hand-made model does."""
    from sft.commands.generate import command

    values = json.loads((scaled / "config.json").read_text())
    values["rope_scaling"]["factor"] = 2.0
    (scaled / "config.json").write_text(json.dumps(values))
    assert measured(base_model, None, dataset, "rotary") == measured(scaled, None, dataset)
    assert measured(base_model, None, dataset) != measured(scaled, None, dataset)

    def answer(model: Path, *words: str) -> str:
        line = [
            "--model_name_or_path",
            str(model),
            "--prompt",
            "a river in winter",
            "--max_new_tokens",
            "20",
            *words,
        ]
        return click.testing.CliRunner().invoke(command, line, standalone_mode=False, catch_exceptions=False).stdout

    assert answer(base_model, "--plugin", "rotary") == answer(scaled)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rms_norm_eps", 0.5, None),
        ("mlp_bias", True, "lacks tensors model.layers.0.mlp.down_proj.bias"),
        ("rope_scaling", {"rope_type": "spiral"}, "plugin toy changes it: rotary scaling 'spiral' is not known"),
        ("model_type", "qwen2", r"toy \(.*\) sets model_type of the model's config to 'qwen2', which follows from"),
        (
            "torch_dtype",
            "float16",
            r"toy \(.*\) sets torch_dtype of the model's config to 'float16', which follows from",
        ),
        ("rms_norm_eps", np.float32(0.5), r"toy \(.*\) puts a value into the model's config that JSON does not have"),
    ],
)
def test_a_change_counts_or_is_refused(train: Train, tmp_path: Path, key: str, value: Any, message: str | None) -> None:
    class Toy(sft.Plugin):
        name = "toy"
        api_version = 1

        @sft.hookimpl
        def sft_model_config(self, run: sft.Run, config: dict[str, Any]) -> None:
            config[key] = value

    if message is None:
        train("out", (Toy,), max_steps=1)
        assert json.loads((tmp_path / "out" / "config.json").read_text())[key] == value
    else:
        with pytest.raises(sft.SftError, match=message):
            train("out", (Toy,), max_steps=1)


@pytest.mark.parametrize("case", sorted(path.parent.name for path in FIXTURES.glob("*/*/config.json")))
def test_plugins_see_one_spelling_of_the_same_model(case: str) -> None:
    """Rotary scaling has four spellings in files; a plugin sets one of them, and it counts."""
    values = json.loads(next(FIXTURES.glob(f"*/{case}/config.json")).read_text())
    found = with_one_spelling(values)
    assert architecture_of(found) == architecture_of(values)
    rotary = architecture_of(values).rotaries[0]
    if case != "gemma3":
        assert "rope_parameters" not in found
        assert found.get("rope_theta", rotary.base) == rotary.base
        assert (found["rope_scaling"] or {"rope_type": "default"})["rope_type"] == rotary.kind
        found["rope_scaling"] = {"rope_type": "linear", "factor": 3.0}
        assert architecture_of(found).rotaries[0].base == rotary.base
        assert architecture_of(found).rotaries[0].kind == "linear"


def test_the_data_is_measured_against_the_changed_config(train: Train, tmp_path: Path) -> None:
    """A plugin may give a model more positions, or fewer: records are held against those."""

    class Short(sft.Plugin):
        name = "short"
        api_version = 1

        @sft.hookimpl
        def sft_model_config(self, run: sft.Run, config: dict[str, Any]) -> None:
            config.update(max_position_embeddings=8)

    said: list[str] = []
    with pytest.raises(sft.UsageError, match="reads at most 9"):
        train("out", (Short,), say=said.append, max_steps=1)
    assert not any(line.startswith("runtime:") for line in said)

"""Techniques over a base that is held in bfloat16 on a CPU, beside the same in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from no_onednn import stand_in

import sft
from sft.inference.merge import merge
from sft.testing import write_data

MODEL = Path(__file__).parent.parent / "core" / "tests" / "fixtures" / "models" / "llama-tied-gqa"
TECHNIQUES = [
    "lora",
    "lora nf4",
    "lora int4",
    "lora pissa",
    "lora dora",
    "lora rslora lora-plus",
    "lora neftune",
    "vera",
    "vera nf4",
]


@pytest.fixture(autouse=True)
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    sft.prepare()
    stand_in(monkeypatch.setattr)


class Look(sft.Plugin):
    """Says what the trained model holds."""

    name = "look"
    api_version = 1

    @sft.hookimpl
    def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
        held = {(p.stop_gradient, p.ndim > 1, str(p.dtype).rpartition(".")[2]) for p in run.model.parameters()}
        run.say(f"held: {sorted(held)}")


@pytest.fixture
def trained(tmp_path: Path) -> Any:
    records = [{"src": f"type#coat{n % 5}", "tgt": "A coat" + " for you" * (n % 4)} for n in range(24)]
    data = write_data(tmp_path / "data", records[:18], records[18:])

    def run(name: str, plugins: str, **more: Any) -> tuple[sft.Summary, list[str]]:
        said: list[str] = []
        settings = {
            **{"model_name_or_path": str(MODEL), "dataset_name_or_path": str(data), "plugin": plugins.split()},
            **{"output_dir": str(tmp_path / name), "max_steps": 10, "learning_rate": 0.01, "logging_steps": 1},
            **{"per_device_train_batch_size": 6, "device": "cpu", **more},
        }
        return sft.run(settings, plugins=[Look], say=said.append), said

    return run


@pytest.mark.parametrize(
    "plugins", [*TECHNIQUES[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in TECHNIQUES[2:])]
)
def test_it_learns_what_it_learns_in_float32(trained: Any, tmp_path: Path, plugins: str) -> None:
    calm = {"lora_plus_scale": 2.0} if "lora-plus" in plugins else {}
    wide, _ = trained("wide", plugins, **calm)
    narrow, said = trained("narrow", plugins, bf16=True, **calm)
    assert 0 < abs(narrow.eval_loss_after / wide.eval_loss_after - 1) < 0.01
    assert wide.eval_loss_after < wide.eval_loss_before - 0.02
    (held,) = [line for line in said if line.startswith("held: ")]
    # Frozen matrices have 16 bits, frozen vectors and all that trains 32.
    assert "(True, True, 'bfloat16')" in held
    assert held.count("bfloat16") == 1
    line = (
        "bfloat16 products with float32 sums, by paddle's oneDNN; frozen matrices are held in bfloat16, other weights"
    )
    assert f"precision: {line} in float32" in said
    report = json.loads((tmp_path / "narrow" / "run.json").read_text())
    assert report["precision"] == {"dtype": "bfloat16", "weights": "float32", "frozen": "bfloat16"}


@pytest.mark.slow
def test_layers_that_train_whole_have_32_bits(trained: Any) -> None:
    settings = {"modules_to_save": ["embed_tokens"]}
    wide, _ = trained("wide", "lora", **settings)
    narrow, said = trained("narrow", "lora", bf16=True, **settings)
    assert 0 < abs(narrow.eval_loss_after / wide.eval_loss_after - 1) < 0.01
    assert wide.eval_loss_after < wide.eval_loss_before - 0.02
    assert "modules_to_save: model.embed_tokens.weight trains whole" in said
    (held,) = [line for line in said if line.startswith("held: ")]
    assert "(False, True, 'float32')" in held
    assert "(False, True, 'bfloat16')" not in held


def test_merging_folds_into_the_weights_of_the_file(trained: Any, tmp_path: Path) -> None:
    """What a run held in 16 bits is not what is merged: the file's own weights are."""
    from safetensors.numpy import load_file

    trained("narrow", "lora", bf16=True)
    merge(str(MODEL), tmp_path / "narrow", tmp_path / "merged", lambda line: None)
    before, after = load_file(MODEL / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(tmp_path / "narrow" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "narrow" / "adapter_config.json").read_text())
    assert {tensor.dtype for tensor in adapter.values()} == {np.dtype("float32")}
    for name, weight in before.items():
        pair = [adapter.get(f"base_model.model.{name.removesuffix('weight')}lora_{half}.weight") for half in "AB"]
        update = 0.0 if pair[0] is None else config["lora_alpha"] / config["r"] * (pair[1] @ pair[0])
        np.testing.assert_allclose(after[name], weight + update, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_checkpoint_of_one_precision_goes_on_in_the_other(trained: Any) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5}
    trained("run", "lora", bf16=True, max_steps=5, **saving)
    summary, said = trained("run", "lora", max_steps=10, resume_from_checkpoint=True, **saving)
    assert summary.steps == 10
    assert [line for line in said if "bf16" in line]

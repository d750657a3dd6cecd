"""Adapters over the families of the decoder: what is written here gives in HF PEFT what it gives here.

The committed adapters in fixtures/written are as sft writes them, with PEFT's logits (fixtures/make_written.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.testing import forward

WRITTEN = Path(__file__).parent / "fixtures" / "written"
FAMILIES = Path(__file__).resolve().parents[3] / "core" / "tests" / "fixtures" / "families"
CASES = sorted(path.name for path in WRITTEN.iterdir())
PLAIN = SimpleNamespace(lora_form=lambda: None)
"""The hooks of a lora that nobody refines."""
RELATIVE = 5e-6
"""Of the largest logit; half the scaling moves some logit by more than 0.02 of it."""


def adapted(case: str) -> Any:
    from sft.models.loading import load_model, open_model
    from sft_peft_lora.lora import Lora, LoraOptions

    model = load_model(open_model(FAMILIES / case))
    Lora(LoraOptions()).sft_import_adapter(model=model, folder=WRITTEN / case, hook=PLAIN)
    return model


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_gives_the_logits_that_it_gives_in_peft(paddle: Any, case: str) -> None:
    found = load_file(WRITTEN / case / "reference.safetensors")
    logits, expected = forward(adapted(case), found["input_ids"]), found["logits"]
    assert np.abs(logits - expected).max() <= RELATIVE * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_of_an_adapter_is_the_committed_one(case: str) -> None:
    """So PEFT's logits are those of what is written today."""
    from sft.models.adapter_folder import as_in_files
    from sft.models.families.known import family_of
    from sft_peft_lora.files import LoraFolder, adapter_files

    config = json.loads((FAMILIES / case / "config.json").read_text())
    written = json.loads((WRITTEN / case / "adapter_config.json").read_text())
    lora = LoraFolder(WRITTEN / case)
    alphas = {target: lora.alpha(target) for target in lora.pairs}
    scalings = {target: lora.scaling(target) for target in lora.pairs}
    files = as_in_files(
        adapter_files(lora.pairs, lora.config["target_modules"], alphas, scalings, case, 0.0),
        family_of(config, case),
    )
    assert files.config == written
    tensors = load_file(WRITTEN / case / "adapter_model.safetensors")
    assert files.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(files.tensors[name], tensor)


def test_mixtrals_experts_have_the_names_of_its_files() -> None:
    names = load_file(WRITTEN / "mixtral" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.block_sparse_moe.experts.3.w2.lora_A.weight" in names
    assert not any("gate_proj" in name or ".mlp." in name for name in names)


def test_routers_are_left_alone_and_experts_are_not(paddle: Any) -> None:
    from sft.models.loading import load_model, open_model

    model = load_model(open_model(FAMILIES / "qwen2-moe"))
    names = {target.name for target in sft.target_layers(model)}
    assert "model.layers.0.mlp.experts.3.down_proj" in names
    assert "model.layers.0.mlp.shared_expert.up_proj" in names
    assert not {"model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"} & names
    (router,) = sft.target_layers(model, ["gate"])  # layer 1 has no experts
    assert router.name == "model.layers.0.mlp.gate"


@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe", "glm4"])
def test_a_merged_model_gives_the_same_logits(paddle: Any, case: str) -> None:
    from sft.models.loading import load_model, open_model
    from sft_peft_lora.files import LoraMerger

    model, merger = load_model(open_model(FAMILIES / case)), LoraMerger(WRITTEN / case)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.set_value(merger.merge(name, parameter.T).T)
    assert merger.unused() == []
    found = load_file(WRITTEN / case / "reference.safetensors")
    logits, expected = forward(model, found["input_ids"]), found["logits"]
    assert np.abs(logits - expected).max() <= RELATIVE * np.abs(expected).max()


def test_an_adapter_of_a_router_is_read_again(paddle: Any, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from sft.models.loading import load_model, open_model
    from sft_peft_lora.files import LoraMerger, adapter_files
    from sft_peft_lora.lora import Lora, LoraOptions

    name, rng = "model.layers.0.mlp.gate", np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 2), (2, 4)))
    files = adapter_files({name: (a, b)}, ["gate"], {name: 4.0}, {name: 2.0}, "base", 0.0)
    (tmp_path / "adapter_config.json").write_text(json.dumps(files.config))
    save_file(dict(files.tensors), tmp_path / "adapter_model.safetensors")
    source, plugin = open_model(FAMILIES / "qwen2-moe"), Lora(LoraOptions())
    plain, model, merger = load_model(source), load_model(source), LoraMerger(tmp_path)
    plugin.sft_import_adapter(model=model, folder=tmp_path, hook=PLAIN)
    router = dict(plain.named_parameters())[f"{name}.weight"]
    ids = np.random.default_rng(1).integers(3, 112, (2, 9))
    before = forward(plain, ids)
    router.set_value(merger.merge(f"{name}.weight", router.T).T)
    merged = forward(plain, ids)
    assert np.abs(merged - before).max() > 0.1
    assert np.abs(forward(model, ids) - merged).max() <= RELATIVE * np.abs(merged).max()

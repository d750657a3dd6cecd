"""An adapter's folder: what of it is read for the adapter itself, and for layers that were trained whole beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import sft
from sft.models import adapter_folder
from sft.models.adapter_folder import PREFIX, read_adapter, read_saved

OWN = [f"{PREFIX}model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"]
WHOLE = ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {name: np.full((2, 2), number, np.float32) for number, name in enumerate(OWN)}
    tensors |= {PREFIX + name: np.full((3, 2), number, np.float32) for number, name in enumerate(WHOLE)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "modules_to_save": ["lm_head", "mlp.up_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def test_each_tensor_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(adapter_folder, "check_reals", lambda tensor, where: looked.append(where.split()[-1]))
    config, own = read_adapter(folder)
    assert config["modules_to_save"] is None
    assert {name: float(tensor[0, 0]) for name, tensor in own.items()} == {name: n for n, name in enumerate(OWN)}
    assert sorted(looked) == sorted(own)
    looked.clear()
    saved, tied = read_saved(folder)
    assert {name: float(tensor[0, 0]) for name, tensor in saved.items()} == {name: n for n, name in enumerate(WHOLE)}
    assert sorted(looked) == sorted(PREFIX + name for name in saved)
    assert not tied


@pytest.mark.parametrize("name", [OWN[0], PREFIX + WHOLE[0]])
def test_whoever_reads_a_tensor_looks_for_numbers_that_are_not_finite(folder: Path, name: str) -> None:
    from sft.tensor_files import read_tensors

    path = folder / "adapter_model.safetensors"
    tensors = {key: tensor.copy() for key, tensor in read_tensors(path).items()}
    tensors[name][0, 0] = np.nan
    save_file(tensors, path)
    readers = [read_adapter, read_saved] if name in OWN else [read_saved, read_adapter]
    with pytest.raises(sft.UsageError, match=f"tensor {name}"):
        readers[0](folder)
    readers[1](folder)

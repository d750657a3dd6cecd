"""Experts whose matrices lie stacked in files: read as those of other files, and written stacked again."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from merging import write_merged
from model_folders import TOLERANCE, largest_difference, load, own_logits, reference
from safetensors.numpy import load_file, save_file

import sft

FAMILIES = Path(__file__).parent / "fixtures" / "families"
WITH_EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe")
THEIRS = {"block_sparse_moe": "mlp", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}


def stacked_tensors(folder: Path) -> dict[str, np.ndarray]:
    """What transformers 5 writes of these weights with ``save_original_format=False``."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for old, new in THEIRS.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    count = 1 + max(int(found[1]) for name in tensors if (found := re.search(r"\.experts\.(\d+)\.", name)))
    for base in sorted({name.split(".experts.")[0] + ".experts" for name in tensors if ".experts." in name}):

        def all_of(kind: str, base: str = base) -> list[np.ndarray]:
            return [tensors.pop(f"{base}.{expert}.{kind}.weight") for expert in range(count)]

        gates, ups = all_of("gate_proj"), all_of("up_proj")
        tensors[f"{base}.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in zip(gates, ups, strict=True)])
        tensors[f"{base}.down_proj"] = np.stack(all_of("down_proj"))
    return tensors


@pytest.fixture(params=WITH_EXPERTS)
def checkpoints(request: pytest.FixtureRequest, models: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The same model twice: each expert by itself, and stacked."""
    alone, stacked = FAMILIES / request.param, tmp_path / "stacked"
    stacked.mkdir()
    shutil.copy(alone / "config.json", stacked)
    shutil.copy(models / "llama-tied-gqa" / "tokenizer.json", stacked)
    shutil.copy(models / "llama-tied-gqa" / "tokenizer_config.json", stacked)
    save_file(stacked_tensors(alone), stacked / "model.safetensors")
    return alone, stacked


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert found[name].tobytes() == tensor.tobytes(), name


class Shift:
    """Adds 1 to one tensor, and remembers the names of all."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, []  # type: ignore[var-annotated]

    def merge(self, name: str, weight: Any) -> Any:
        self.seen.append(name)
        return weight + 1.0 if name == self.name else weight

    def unused(self) -> list[str]:
        return []


def test_they_are_read_as_those_of_other_files(paddle: Any, checkpoints: tuple[Path, Path]) -> None:
    from sft.models.fingerprint import fingerprint
    from sft.models.loading import open_model

    alone, stacked = checkpoints
    input_ids, expected = reference(alone)
    model = load(stacked)
    assert largest_difference(own_logits(model, input_ids), expected) < TOLERANCE
    plain = {name: parameter.numpy() for name, parameter in load(alone).named_parameters()}
    assert_same({name: parameter.numpy() for name, parameter in model.named_parameters()}, plain)
    assert fingerprint(open_model(stacked)) == fingerprint(open_model(alone))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_merged_model_has_them_stacked(
    paddle: Any, checkpoints: tuple[Path, Path], tmp_path: Path, dtype: Any
) -> None:
    from sft.data.tokenizer import Tokenizer
    from sft.models.loading import open_model

    alone, stacked = checkpoints
    before = {name: tensor.astype(dtype) for name, tensor in stacked_tensors(alone).items()}
    save_file(before, stacked / "model.safetensors")
    adapted = Shift("model.layers.0.mlp.experts.2.up_proj.weight")
    changed = write_merged(tmp_path / "merged", open_model(stacked), adapted, Tokenizer(stacked))
    assert changed == 1
    assert set(adapted.seen) == {name for name, _ in load(alone).named_parameters()}
    expected = {name: tensor.copy() for name, tensor in before.items()}
    ups = expected["model.layers.0.mlp.experts.gate_up_proj"][2]
    half = len(ups) // 2
    ups[half:] = (ups[half:].astype(np.float32) + np.float32(1)).astype(dtype)
    assert_same(load_file(tmp_path / "merged" / "model.safetensors"), expected)


def test_a_whole_result_has_them_stacked(paddle: Any, checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    from sft.data.tokenizer import Tokenizer
    from sft.models.loading import load_model, open_model
    from sft.models.saving import write_model

    alone, stacked = checkpoints
    source = open_model(stacked)
    (tmp_path / "out").mkdir()
    write_model(tmp_path / "out", load_model(source).named_parameters(), source, Tokenizer(stacked))
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), stacked_tensors(alone))


def test_a_stack_of_too_few_experts_is_named(paddle: Any, checkpoints: tuple[Path, Path]) -> None:
    _, stacked = checkpoints
    tensors = load_file(stacked / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = np.ascontiguousarray(tensors[name][:-1])
    save_file(tensors, stacked / "model.safetensors")
    with pytest.raises(sft.UsageError, match=r"lacks tensors model\.layers\.0\.mlp\.experts\.3\.down_proj\.weight"):
        load(stacked)

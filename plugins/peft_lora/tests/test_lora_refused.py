"""Adapter folders that are refused: more than LoRA, damaged, or of another model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft
from sft.inference.merge import merge
from sft.testing import load

Refused = Callable[[Path, str], None]


def quiet(text: str) -> None:
    pass


@pytest.fixture
def refused(train: Any, models: Path, tmp_path: Path) -> Refused:
    """By everything that reads an adapter folder: inference, merging and training, of which nothing is left."""

    def check(folder: Path, message: str) -> None:
        base = models / "llama-tied-gqa"
        with pytest.raises(sft.UsageError, match=message):
            load(base, folder)
        with pytest.raises(sft.UsageError, match=message):
            merge(str(base), folder, tmp_path / "merged", quiet)
        with pytest.raises(sft.UsageError, match=message):
            train(lora_path=str(folder))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]

    return check


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("target_parameters", ["experts.weight"]),
        ("use_qalora", True),
    ],
)
def test_more_than_lora_is_refused_and_not_left_out(refused: Refused, variant: Any, key: str, value: Any) -> None:
    refused(variant(**{key: value}), rf"adapter: {key} = .* is more than LoRA")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_an_adapter_over_a_base_that_its_start_changed_is_refused(refused: Refused, variant: Any, start: str) -> None:
    """PEFT writes W − s·B₀·A₀ nowhere; over W the adapter would add A₀ and B₀ once more."""
    message = rf"adapter: init_lora_weights = '{start}' changed the base .* path_initial_model_for_weight_conversion"
    refused(variant(init_lora_weights=start), message)


A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(B), r"pair of lora_A and lora_B for model\.layers\.0\.mlp\.up_proj is not complete"),
        (lambda t: t.update({B: t[B][:, :2].copy()}), r"layers\.0\.mlp\.up_proj is not complete"),
        (lambda t: t.update({"base_model.model.model.norm.weight": t[A]}), r"norm\.weight is not a LoRA weight"),
        (lambda t: t.update({"base_model.model.lm_head.weight": t[A]}), "an embedding and a head that are apart"),
        (lambda t: t.clear(), "holds no LoRA weights"),
        (lambda t: t.update({A: t[A][:2].copy(), B: t[B][:, :2].copy()}), r"has rank 2, adapter_config\.json says 4"),
    ],
    ids=["half", "ranks-differ", "unknown", "a head", "empty", "rank"],
)
def test_damaged_tensors_are_named(
    paddle: Any, models: Path, variant: Any, change: Callable[..., Any], message: str
) -> None:
    folder = variant(change)
    with pytest.raises(sft.UsageError, match=message):
        load(models / "llama-tied-gqa", folder)


@pytest.mark.parametrize(
    ("option", "value"), [("lora_rank", 8), ("lora_rank", 16), ("lora_alpha", 8), ("lora_target_modules", ["q_proj"])]
)
def test_what_the_adapter_decides_is_not_given_beside_it(train: Any, peft: Path, option: str, value: Any) -> None:
    """Whatever its value: the default, given, is an answer too."""
    with pytest.raises(sft.UsageError, match=f"{option} does nothing beside lora_path"):
        train(lora_path=str(peft / "llama-lora-all-linear"), **{option: value})


def test_a_run_does_not_go_on_from_an_adapter_of_another_type(train: Any, variant: Any, tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match="adapter is a LOHA adapter, and plugin lora reads LORA alone"):
        train(lora_path=str(variant(peft_type="LOHA")))
    assert not (tmp_path / "out").exists()


OTHER = "base_model.model.model.projector"


@pytest.mark.parametrize(
    "keys",
    [
        [f"{OTHER}.lora_A.weight", f"{OTHER}.lora_B.weight"],
        [f"{OTHER}.base_layer.weight", f"{OTHER}.lora_A.weight", f"{OTHER}.lora_B.weight"],
    ],
    ids=["it", "it and its base"],
)
def test_an_adapter_of_more_than_blocks_is_refused_by_its_target(
    train: Any, models: Path, variant: Any, tmp_path: Path, keys: list[str]
) -> None:
    """In PEFT's keys, by everything that reads an adapter."""
    folder = variant(lambda tensors: tensors.update(dict.fromkeys(keys, tensors[A])))
    message = (
        "adapter adapts model.projector, and plugin lora reads adapters of Linears of the blocks, the embedding and"
    )
    with pytest.raises(sft.UsageError, match=message):
        load(models / "llama-tied-gqa", folder)
    with pytest.raises(sft.UsageError, match=message):
        merge(str(models / "llama-tied-gqa"), folder, tmp_path / "merged", quiet)
    with pytest.raises(sft.UsageError, match=message):
        train(lora_path=str(folder))


def test_a_folder_without_an_adapter_is_refused(train: Any, models: Path, peft: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(sft.UsageError, match=r"empty holds no adapter \(no adapter_config\.json\)"):
        load(models / "llama-tied-gqa", empty)
    with pytest.raises(sft.UsageError, match="holds no adapter"):
        train(lora_path=str(empty))
    (empty / "adapter_config.json").write_text('{"r": 4}')
    with pytest.raises(sft.UsageError, match="names no peft_type"):
        load(models / "llama-tied-gqa", empty)
    (empty / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(sft.UsageError, match=r"is not valid JSON \(.*copy the adapter again"):
        load(models / "llama-tied-gqa", empty)
    shutil.copy(peft / "llama-lora-qv-rs" / "adapter_config.json", empty)
    with pytest.raises(sft.UsageError, match=r"has no adapter_model\.safetensors"):
        load(models / "llama-tied-gqa", empty)


def test_an_adapter_of_an_unknown_type_names_those_that_are_known(models: Path, variant: Any) -> None:
    with pytest.raises(sft.UsageError, match=r"is a LOHA adapter, which no installed plugin reads \(installed: .*LORA"):
        load(models / "llama-tied-gqa", variant(peft_type="LOHA"))


def test_an_adapter_of_another_model_is_refused(train: Any, models: Path, peft: Path, tmp_path: Path) -> None:
    """llama3-scaled has key and value projections of 32 outputs where the adapter's base has 16."""
    base, adapter = models / "llama3-scaled", peft / "llama-lora-all-linear"
    message = r"has weights for model\.layers\.\d\.self_attn\.[kv]_proj, which do not fit this model"
    with pytest.raises(sft.UsageError, match=message):
        load(base, adapter)
    with pytest.raises(sft.UsageError, match=message):
        train(model_name_or_path=str(base), lora_path=str(adapter))
    with pytest.raises(sft.UsageError, match=r"[kv]_proj is 16x32 and the model's .* is 32x32; it belongs to another"):
        merge(str(base), adapter, tmp_path / "merged", quiet)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_a_deeper_model_is_refused(paddle: Any, models: Path, variant: Any, tmp_path: Path) -> None:
    deeper = {A.replace("layers.0", "layers.9"): A, B.replace("layers.0", "layers.9"): B}
    folder = variant(lambda tensors: tensors.update({new: tensors[old] for new, old in deeper.items()}))
    base = models / "llama-tied-gqa"
    with pytest.raises(sft.UsageError, match=r"has weights for model\.layers\.9\.mlp\.up_proj"):
        load(base, folder)
    with pytest.raises(sft.UsageError, match=r"no place for \(model\.layers\.9\.mlp\.up_proj\)"):
        merge(str(base), folder, tmp_path / "merged", quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_merging_does_not_write_into_a_folder_that_holds_something(
    paddle: Any, models: Path, peft: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(sft.UsageError, match="already exists and is not empty"):
        merge(str(models / "llama-tied-gqa"), peft / "llama-lora-qv-rs", tmp_path, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

"""Model directories that sft writes: bit by bit what was in memory, in the form that Hugging Face's libraries read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from merging import write_merged
from model_folders import architecture_of, paddlenlps_logits
from safetensors.numpy import load_file

import sft
from sft.data.tokenizer import Tokenizer
from sft.models.config import hf_config

CASES = (
    *("llama-untied", "llama-tied-gqa", "llama3-scaled", "qwen2-untied", "qwen2-tied-sharded"),
    *("mistral-gqa", "gemma-tied"),
)


@pytest.fixture
def tokenizer(models: Path) -> Tokenizer:
    return Tokenizer(models / "llama-tied-gqa")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in found, f"{name} is in two files"
            found[name] = tensor
    return found


def assert_same_tensors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Names, shapes, dtypes and every bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert found[name].tobytes() == tensor.tobytes(), name


def in_float32(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


class Merger:
    """Adds ``shift`` to the tensors named; ``lost`` is what it says it could not place."""

    def __init__(self, shift: dict[str, float] | None = None, lost: tuple[str, ...] = ()) -> None:
        self.shift = shift or {}
        self.lost = list(lost)
        self.seen: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}

    def merge(self, name: str, weight: Any) -> Any:
        self.seen[name] = (weight.numpy().dtype, tuple(weight.shape))
        return weight + self.shift[name] if name in self.shift else weight

    def unused(self) -> list[str]:
        return self.lost


# --- whole models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_written_model_has_the_tensors_of_the_original_files(
    paddle: Any, models: Path, tmp_path: Path, tokenizer: Tokenizer, case: str
) -> None:
    from sft.models.loading import load_model, open_model
    from sft.models.saving import write_model

    source = open_model(models / case)
    write_model(tmp_path, load_model(source).named_parameters(), source, tokenizer)
    assert_same_tensors(tensors_of(tmp_path), in_float32(tensors_of(models / case)))
    assert config_of(tmp_path)["torch_dtype"] == "float32"


@pytest.mark.parametrize("case", ["llama-tied-gqa", "llama-untied", "qwen2-untied", "mistral-gqa", "gemma-tied"])
def test_a_written_model_loads_bit_for_bit(
    paddle: Any, models: Path, tmp_path: Path, tokenizer: Tokenizer, case: str
) -> None:
    from sft.models.loading import load_model, open_model
    from sft.models.saving import write_model

    source = open_model(models / case)
    model = load_model(source)
    generator = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.set_value(generator.standard_normal(parameter.shape).astype(np.float32))
    write_model(tmp_path, model.named_parameters(), source, tokenizer)
    again = load_model(open_model(tmp_path))
    expected = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    assert_same_tensors({name: parameter.numpy() for name, parameter in again.named_parameters()}, expected)


def test_tokenizer_and_generation_config_travel_with_the_model(
    paddle: Any, models: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    from sft.models.loading import load_model, open_model
    from sft.models.saving import write_model

    case = models / "llama-tied-gqa"
    source = open_model(case)
    write_model(tmp_path, load_model(source).named_parameters(), source, tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (case / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


# --- merged models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_merging_nothing_copies_every_bit(
    paddle: Any, models: Path, tmp_path: Path, tokenizer: Tokenizer, case: str
) -> None:
    from sft.models.loading import open_model

    merger = Merger()
    changed = write_merged(tmp_path / "merged", open_model(models / case), merger, tokenizer)
    original = tensors_of(models / case)
    assert changed == 0
    assert_same_tensors(tensors_of(tmp_path / "merged"), original)
    assert merger.seen == {name: (np.dtype(np.float32), tensor.shape) for name, tensor in original.items()}
    expected = {"float32": "float32", "bfloat16": "bfloat16"}[str(next(iter(original.values())).dtype)]
    assert config_of(tmp_path / "merged")["torch_dtype"] == expected


def test_a_merged_weight_is_computed_in_float32_and_rounded_once(
    paddle: Any, models: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    from sft.models.loading import open_model

    case, name = models / "qwen2-tied-sharded", "model.layers.1.self_attn.v_proj.weight"
    shift = 0.01
    changed = write_merged(tmp_path / "merged", open_model(case), Merger({name: shift}), tokenizer)
    original = tensors_of(case)
    expected = dict(original)
    expected[name] = (original[name].astype(np.float32) + np.float32(shift)).astype(ml_dtypes.bfloat16)
    assert changed == 1
    assert expected[name].tobytes() != original[name].tobytes()
    assert_same_tensors(tensors_of(tmp_path / "merged"), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_in_paddles_layout_is_written_in_hugging_faces(
    paddle: Any, models: Path, tmp_path: Path, tokenizer: Tokenizer, dtype: str
) -> None:
    from sft.models.loading import load_model, open_model

    case = models / "qwen2-tied-sharded"  # exact in bfloat16
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(case / "config.json", base)
    source = open_model(case)
    state = {
        source.family.to_file(name, "paddle"): value.astype(dtype)
        for name, value in load_model(source).state_dict().items()
    }
    paddle.save(state, str(base / "model_state.pdparams"))
    name = "model.layers.0.mlp.down_proj.weight"
    merger = Merger({name: 1.0})
    write_merged(tmp_path / "merged", open_model(base, allow_pickle=True), merger, tokenizer)
    written = tensors_of(tmp_path / "merged")
    assert "lm_head.weight" in state  # paddle's state_dict has the tied matrix twice, here it comes once
    expected = in_float32(tensors_of(case))
    expected[name] = expected[name] + np.float32(1.0)
    stored = np.dtype(np.float32) if dtype == "float32" else np.dtype(ml_dtypes.bfloat16)
    assert_same_tensors(written, {key: tensor.astype(stored) for key, tensor in expected.items()})
    assert merger.seen[name] == (np.dtype(np.float32), (32, 48))
    assert config_of(tmp_path / "merged")["torch_dtype"] == dtype


def test_an_adapter_of_another_model_leaves_nothing_behind(
    paddle: Any, models: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    from sft.models.loading import open_model

    merger = Merger(lost=("model.layers.7.mlp.up_proj",))
    with pytest.raises(sft.UsageError, match=r"no place for \(model\.layers\.7\.mlp\.up_proj\)"):
        write_merged(tmp_path / "merged", open_model(models / "llama-untied"), merger, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_merged_into(
    paddle: Any, models: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    from sft.models.loading import open_model

    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(sft.UsageError, match="already exists and is not empty"):
        write_merged(tmp_path, open_model(models / "llama-untied"), Merger(), tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("case", ["llama-untied", "llama-tied-gqa"])
def test_paddlenlp_itself_loads_a_merged_folder(
    paddle: Any, models: Path, tmp_path: Path, tokenizer: Tokenizer, case: str
) -> None:
    """Logits against transformers': float32 noise between the two is 1e-5, another theta moves them by 0.05."""
    from sft.models.loading import open_model

    folder = tmp_path / "merged"
    write_merged(folder, open_model(models / case), Merger(), tokenizer)
    found = load_file(models / case / "reference.safetensors")
    logits = paddlenlps_logits(folder, found["input_ids"], convert_from_torch=True)
    np.testing.assert_allclose(logits, found["logits"], atol=1e-4, rtol=0)


# --- config.json --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_config_that_is_written_means_the_same_when_it_is_read(paddle: Any, models: Path, case: str) -> None:
    values = config_of(models / case)
    written = json.loads(json.dumps(hf_config(values, "float32")))
    assert architecture_of(written) == architecture_of(values)


@pytest.mark.parametrize("case", CASES)
def test_a_written_config_keeps_what_transformers_reads(models: Path, case: str) -> None:
    """Everything of the original but the dtype, and the rotary settings for transformers 4 and 5 alike."""
    values = config_of(models / case)
    written = hf_config(values, "float32")
    rotary = {"rope_theta", "rope_scaling", "rope_parameters", "rope_scaling_type", "rope_scaling_factor"}
    for key in set(values) - rotary - {"dtype", "torch_dtype", "quantization_config", "paddlenlp_version"}:
        assert written[key] == values[key], key
    assert written["architectures"] == [values["model_type"].capitalize() + "ForCausalLM"]
    assert written["torch_dtype"] == "float32"
    # transformers 4 and PaddleNLP read the theta at top level, transformers 5 in rope_parameters.
    theta = values.get("rope_theta") or values["rope_parameters"]["rope_theta"]
    assert written["rope_theta"] == theta
    if "rope_parameters" in values:
        assert written["rope_parameters"] == values["rope_parameters"]
    if case == "llama3-scaled":
        assert written["rope_scaling"] == {k: v for k, v in values["rope_parameters"].items() if k != "rope_theta"}
    else:
        assert not written.get("rope_scaling")


def test_where_two_spellings_differ_both_say_afterwards_what_was_read(paddle: Any, models: Path) -> None:
    """transformers lets rope_scaling win over rope_parameters; whoever reads either one then reads the same."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    values = {**config_of(models / "llama-tied-gqa"), "rope_theta": 5e5, "rope_scaling": scaling}
    assert values["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e5}
    written = hf_config(values, "float32")
    assert written["rope_scaling"] == scaling
    assert written["rope_parameters"] == {**scaling, "rope_theta": 5e5}
    assert written["rope_theta"] == 5e5
    assert architecture_of(written) == architecture_of(values)


def test_paddlenlps_spelling_of_a_linear_scaling_becomes_hugging_faces(paddle: Any, models: Path) -> None:
    values = {**config_of(models / "llama-untied"), "rope_scaling_type": "linear", "rope_scaling_factor": 4.0}
    written = hf_config(values, "bfloat16")
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert not {"rope_scaling_type", "rope_scaling_factor"} & set(written)
    assert architecture_of(written) == architecture_of(values)

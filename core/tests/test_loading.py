"""Model directories: what is loaded computes what transformers computes, and what would not is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from model_folders import TOLERANCE, config_of, largest_difference, load, own_logits, reference
from safetensors.numpy import load_file, save_file

import sft
from sft.models import source as sources

CASES = (
    *("llama-untied", "llama-tied-gqa", "llama3-scaled", "qwen2-untied", "qwen2-tied-sharded"),
    *("mistral-gqa", "gemma-tied"),
)

# --- logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_transformers(paddle: Any, models: Path, case: str) -> None:
    input_ids, expected = reference(models / case)
    assert largest_difference(own_logits(load(models / case), input_ids), expected) < TOLERANCE


def test_a_loaded_model_is_float32_and_in_evaluation_mode(paddle: Any, models: Path) -> None:
    model = load(models / "qwen2-tied-sharded")  # bfloat16 in its files
    assert {parameter.dtype for parameter in model.parameters()} == {paddle.float32}
    assert not any(layer.training for layer in model.sublayers(include_self=True))


def test_bfloat16_is_read_by_a_process_that_did_nothing_before(models: Path) -> None:
    """numpy knows the type only once somebody has imported ml_dtypes, as the tests have."""
    code = (
        "import sys; from pathlib import Path; from sft.models.loading import open_model; "
        "weights = open_model(Path(sys.argv[1])).weights(); name = sorted(weights)[0]; "
        "print(weights.read_part(name, (slice(2), slice(3))).dtype)"
    )
    line = [sys.executable, "-c", code, str(models / "qwen2-tied-sharded")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.stdout == "float32\n", done.stderr


# --- tensors that do not fit --------------------------------------------------------------------------------


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), rf"lacks tensors {NORM};"),
        (lambda t: t.update({"model.extra": t[NORM]}), r"holds unknown tensors model\.extra;"),
        (lambda t: t.update({DOWN: t[DOWN].T.copy()}), rf"tensor {DOWN} has shape \[48, 32\]"),
        (lambda t: t.update({NORM: t[NORM][:-1].copy()}), rf"tensor {NORM} has shape \[31\]"),
        (lambda t: [t.pop(key) for key in list(t) if "mlp" in key], r"lacks tensors .*down_proj.* and 3 more;"),
    ],
    ids=["missing", "left-over", "transposed", "short", "many"],
)
def test_tensors_that_do_not_fit_are_named(
    paddle: Any, variant: Callable[..., Path], change: Callable[..., Any], message: str
) -> None:
    folder = variant("llama-untied")
    change_tensors(folder, change)
    with pytest.raises(sft.UsageError, match=message):
        load(folder)


def test_a_missing_lm_head_is_an_error_unless_it_is_tied(paddle: Any, variant: Callable[..., Path]) -> None:
    folder = variant("llama-untied")
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(sft.UsageError, match=r"lacks tensors lm_head\.weight"):
        load(folder)


def test_a_tied_matrix_that_is_stored_twice_is_accepted(paddle: Any, variant: Callable[..., Path]) -> None:
    folder = variant("llama-tied-gqa")
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    input_ids, expected = reference(folder)
    model = load(folder)
    assert largest_difference(own_logits(model, input_ids), expected) < TOLERANCE
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_rotary_frequencies_of_older_files_are_passed_over(paddle: Any, variant: Callable[..., Path]) -> None:
    folder = variant("llama-untied")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    input_ids, expected = reference(folder)
    assert largest_difference(own_logits(load(folder), input_ids), expected) < TOLERANCE


def test_a_missing_shard_is_named(paddle: Any, variant: Callable[..., Path]) -> None:
    folder = variant("qwen2-tied-sharded")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(sft.UsageError, match=r"lacks model-00002-of-00002\.safetensors, named by model\.safetensors\."):
        load(folder)


def test_a_folder_without_weights_says_what_it_needs(paddle: Any, variant: Callable[..., Path]) -> None:
    folder = variant("llama-untied")
    (folder / "model.safetensors").unlink()
    with pytest.raises(sft.UsageError, match=r"has no weights; it needs model\.safetensors"):
        load(folder)


def test_a_cut_off_file_is_named(paddle: Any, variant: Callable[..., Path]) -> None:
    folder = variant("llama-untied")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(sft.UsageError, match=r"model\.safetensors is not a readable safetensors file"):
        load(folder)


# --- Paddle's layout ----------------------------------------------------------------------------------------


def in_paddle_layout(folder: Path) -> dict[str, np.ndarray]:
    """A case's tensors as PaddleNLP names and stores them, written out independently of sft."""
    found = {}
    for path in folder.glob("model*.safetensors"):
        for name, tensor in load_file(path).items():
            linear = name.endswith("_proj.weight") or name == "lm_head.weight"
            renamed = name.replace("model.", config_of(folder)["model_type"] + ".", 1)
            found[renamed] = np.ascontiguousarray(tensor.T) if linear else tensor
    return found


def write_safetensors(paddle: Any, tensors: dict[str, np.ndarray], folder: Path) -> None:
    save_file(tensors, folder / "model.safetensors")


def write_pdparams(paddle: Any, tensors: dict[str, np.ndarray], folder: Path) -> None:
    state = {name: paddle.to_tensor(tensor.astype(np.float32)) for name, tensor in tensors.items()}
    paddle.save(state, str(folder / "model_state.pdparams"))


def write_bfloat16_pdparams(paddle: Any, tensors: dict[str, np.ndarray], folder: Path) -> None:
    state = {name: paddle.to_tensor(tensor.astype(np.float32)).astype("bfloat16") for name, tensor in tensors.items()}
    paddle.save(state, str(folder / "model_state.pdparams"))


def write_uint16_safetensors(paddle: Any, tensors: dict[str, np.ndarray], folder: Path) -> None:
    """As PaddleNLP's ``save_pretrained`` writes bfloat16."""
    bits = {name: tensor.astype(ml_dtypes.bfloat16).view(np.uint16) for name, tensor in tensors.items()}
    save_file(bits, folder / "model.safetensors", metadata={"format": "np"})


@pytest.mark.parametrize("case", ["llama-untied", "llama-tied-gqa", "qwen2-untied", "mistral-gqa", "gemma-tied"])
@pytest.mark.parametrize("write", [write_safetensors, write_pdparams])
def test_paddles_layout_gives_the_same_logits(
    paddle: Any, models: Path, tmp_path: Path, case: str, write: Callable[..., None]
) -> None:
    shutil.copy(models / case / "config.json", tmp_path)
    write(paddle, in_paddle_layout(models / case), tmp_path)
    input_ids, expected = reference(models / case)
    assert largest_difference(own_logits(load(tmp_path), input_ids), expected) < TOLERANCE


@pytest.mark.parametrize("write", [write_bfloat16_pdparams, write_uint16_safetensors])
def test_paddles_bfloat16_is_not_taken_for_whole_numbers(
    paddle: Any, models: Path, tmp_path: Path, write: Callable[..., None]
) -> None:
    """numpy's stand-in for bfloat16 in Paddle's files is uint16. This case's weights are exact in bfloat16."""
    case = models / "qwen2-tied-sharded"
    shutil.copy(case / "config.json", tmp_path)
    write(paddle, in_paddle_layout(case), tmp_path)
    input_ids, expected = reference(case)
    assert largest_difference(own_logits(load(tmp_path), input_ids), expected) < TOLERANCE


def test_paddles_sharded_pdparams_load(paddle: Any, models: Path, tmp_path: Path) -> None:
    case = models / "llama-untied"
    shutil.copy(case / "config.json", tmp_path)
    tensors = list(in_paddle_layout(case).items())
    weight_map = {}
    for part, chosen in enumerate((tensors[:7], tensors[7:])):
        file = f"model_state-{part}.pdparams"
        paddle.save({name: paddle.to_tensor(tensor) for name, tensor in chosen}, str(tmp_path / file))
        weight_map.update({name: file for name, _ in chosen})
    (tmp_path / "model_state.pdparams.index.json").write_text(json.dumps({"weight_map": weight_map}))
    input_ids, expected = reference(case)
    assert largest_difference(own_logits(load(tmp_path), input_ids), expected) < TOLERANCE


# --- finding a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "model", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(sft.UsageError, match="does not exist"):
        sources.find_model(name)


def test_a_file_is_no_model_directory(tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(sft.UsageError, match="is not a directory"):
        sources.find_model(str(tmp_path / "model"))


def test_a_hub_name_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert sources.find_model("some-owner/some-model").path == tmp_path
    assert "*.safetensors" in asked["some-owner/some-model"]
    assert not any(pattern.endswith((".bin", ".pt", ".pth")) for pattern in asked["some-owner/some-model"])


def test_a_failed_download_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(sft.UsageError, match=r"could not be downloaded from the hub \(no route to host\)"):
        sources.find_model("some-owner/some-model")


def test_a_long_message_of_the_hub_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """As huggingface_hub words it where there is no connection."""
    first = "An error happened while trying to locate the files on the Hub and we cannot find the appropriate snapshot"
    rest = " folder for the specified revision on the local disk. Please check your internet connection and try again."

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        raise OSError(first + rest + " Otherwise," + " and so on" * 40 + ".")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(sft.UsageError, match="could not be downloaded") as caught:
        sources.find_model("some-owner/some-model")
    assert f"({(first + rest)[:-1]});" in str(caught.value)

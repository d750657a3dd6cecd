"""Merged models in each format: PaddleNLP itself reads Paddle's without conversion, sft reads all, bit by bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from merging import write_merged
from model_folders import paddlenlps_logits
from safetensors.numpy import load_file

import sft
from sft.data.tokenizer import Tokenizer
from sft.models.shards import WeightFormat
from sft.testing import forward

FORMS = {
    "hf": WeightFormat(),
    "paddle": WeightFormat("paddle"),
    "paddle-sharded": WeightFormat("paddle", shard_bytes=20_000),
    "pdparams": WeightFormat("paddle", safe=False),
    "pdparams-sharded": WeightFormat("paddle", safe=False, shard_bytes=20_000),
}
CASES = ("llama-untied", "llama-tied-gqa", "llama3-scaled", "qwen2-untied", "qwen2-tied-sharded")


class Nothing:
    """An adapter that changes no weight."""

    def merge(self, name: str, weight: Any) -> Any:
        return weight

    def unused(self) -> list[str]:
        return []


@pytest.fixture
def write(paddle: Any, models: Path, tmp_path: Path) -> Any:
    """Write a base in a form, unchanged; the folder."""
    from sft.models.loading import open_model

    def make(base: Path, form: str, name: str = "merged") -> Path:
        tokenizer = Tokenizer(models / "llama-tied-gqa")
        source = open_model(base, allow_pickle=True)
        write_merged(tmp_path / name, source, Nothing(), tokenizer, form=FORMS[form])
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    ("case", "form"),
    [
        *(pytest.param(case, "paddle", marks=pytest.mark.slow) for case in CASES),
        pytest.param("llama-tied-gqa", "paddle-sharded", marks=pytest.mark.slow),
        pytest.param("qwen2-tied-sharded", "pdparams", marks=pytest.mark.slow),
        ("qwen2-untied", "pdparams-sharded"),
    ],
)
def test_paddlenlp_reads_its_own_format_without_conversion(write: Any, models: Path, case: str, form: str) -> None:
    """Logits against transformers': float32 noise between the two is 1e-5 at most."""
    reference = load_file(models / case / "reference.safetensors")
    found = paddlenlps_logits(write(models / case, form), reference["input_ids"])
    np.testing.assert_allclose(found, reference["logits"], rtol=0, atol=1e-5 * np.abs(reference["logits"]).max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-tied-sharded"])
def test_each_format_is_a_base_again(write: Any, models: Path, case: str, form: str) -> None:
    """Through any format and back into Hugging Face's: every bit, in the original's dtype."""
    folder = write(models / case, form, "first")
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == (
        "bfloat16" if case == "qwen2-tied-sharded" else "float32"
    )
    back = load_file(write(folder, "hf", "second") / "model.safetensors")
    original = {n: t for path in models.joinpath(case).glob("model*.safetensors") for n, t in load_file(path).items()}
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].tobytes() == tensor.tobytes(), name


def test_a_linear_rotary_scaling_reaches_paddlenlp(write: Any, models: Path, tmp_path: Path) -> None:
    """Against sft's own loading, which is held to transformers; a scaling that was lost would move the logits."""
    from sft.models.loading import load_model, open_model

    base = tmp_path / "base"
    shutil.copytree(models / "llama-untied", base)
    values = json.loads((base / "config.json").read_text())
    plain = forward(load_model(open_model(base)), (ids := np.arange(3, 40)[None]))
    for key in ("rope_parameters", "rope_theta", "rope_scaling"):
        values.pop(key, None)
    values.update(rope_theta=10000.0, rope_scaling={"rope_type": "linear", "factor": 4.0})
    (base / "config.json").write_text(json.dumps(values))
    expected = forward(load_model(open_model(base)), ids)
    assert np.abs(plain - expected).max() > 1e-2
    found = paddlenlps_logits(write(base, "paddle"), ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_pickled_hugging_face_weights_are_refused(tmp_path: Path) -> None:
    from sft.inference.merge import merge

    with pytest.raises(sft.UsageError, match="would need torch to pickle its tensors; leave safe_serialization true"):
        merge("base", tmp_path, tmp_path / "merged", print, form=WeightFormat("hf", safe=False))


# --- which base an adapter belongs to -----------------------------------------------------------------------


def fingerprint_of(folder: Path) -> str:
    from sft.models.fingerprint import fingerprint
    from sft.models.loading import open_model

    return fingerprint(open_model(folder, allow_pickle=True))


@pytest.mark.parametrize("case", CASES)
def test_the_same_weights_have_the_same_fingerprint_in_every_format(write: Any, models: Path, case: str) -> None:
    found = {fingerprint_of(write(models / case, form, form)) for form in FORMS}
    assert found == {fingerprint_of(models / case)}


def test_a_tied_matrix_that_is_stored_twice_makes_no_difference(paddle: Any, models: Path, tmp_path: Path) -> None:
    from sft.files import save_tensors

    base = tmp_path / "base"
    shutil.copytree(models / "llama-tied-gqa", base)
    tensors = load_file(base / "model.safetensors")
    save_tensors(base / "model.safetensors", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert fingerprint_of(base) == fingerprint_of(models / "llama-tied-gqa")


def test_training_of_any_tensor_changes_the_fingerprint(paddle: Any, models: Path, tmp_path: Path) -> None:
    from sft.files import save_tensors

    base = tmp_path / "base"
    shutil.copytree(models / "llama-tied-gqa", base)
    tensors = load_file(base / "model.safetensors")
    found = {fingerprint_of(base)}
    for name, tensor in tensors.items():
        save_tensors(base / "model.safetensors", {**tensors, name: tensor * np.float32(1.001)})
        found.add(fingerprint_of(base))
    assert len(found) == 1 + len(tensors)


@pytest.mark.parametrize("column", [0, 50, 150, 309], ids="column {}".format)
@pytest.mark.parametrize("row", [0, 20, 100, 193], ids="row {}".format)
def test_a_change_of_a_part_of_a_matrix_changes_the_fingerprint(
    paddle: Any, models: Path, tmp_path: Path, row: int, column: int
) -> None:
    """7 x 11 values of a matrix [200, 320] are doubled."""
    from sft.files import save_tensors

    base = tmp_path / "base"
    shutil.copytree(models / "llama-tied-gqa", base)
    name, tensors = "model.layers.1.mlp.down_proj.weight", load_file(base / "model.safetensors")
    weight = np.random.default_rng(0).normal(size=(200, 320)).astype(np.float32)
    found = set()
    for factor in (1, 2):
        weight[row : row + 7, column : column + 11] *= factor
        save_tensors(base / "model.safetensors", {**tensors, name: weight})
        found.add(fingerprint_of(base))
    assert len(found) == 2

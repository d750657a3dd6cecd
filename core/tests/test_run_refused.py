"""The output folder of a run, and the runs that are refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft
from sft.testing import needs

Train = Callable[..., sft.Summary]


@needs("lora")
def test_overwriting_removes_the_old_run_and_nothing_else(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(max_steps=2, save_strategy="steps", save_steps=1)
    (out / "notes.txt").write_text("mine")
    (out / "checkpoint-notes").mkdir()
    (out / "checkpoint-notes" / "more.txt").write_text("mine too")
    assert {path.name for path in out.iterdir()} >= {"model.safetensors", "config.json", "checkpoint-1", "checkpoint-2"}
    train(max_steps=1, plugin=["lora"], overwrite_output_dir=True)
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    written = {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "run.json", "sft.log", "steps.bin"}
    written |= {"report.html", "report.json", "rows.json"}
    kept = {"notes.txt", "checkpoint-notes/more.txt"}
    assert left - {"generation_config.json"} == tokenizer | written | kept
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    assert (out / "notes.txt").read_text() == "mine"


def test_a_folder_that_holds_a_run_is_left_alone(train: Train, tmp_path: Path) -> None:
    train(max_steps=1)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(sft.UsageError, match=r"already holds a run; choose another folder, .*--overwrite_output_dir"):
        train(max_steps=1)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*")} == before


def test_the_models_own_folder_is_no_output(train: Train, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llama-tied-gqa", tmp_path / "model")
    with pytest.raises(sft.UsageError, match=r"contains model_name_or_path .* which would be overwritten"):
        train("model", model_name_or_path=str(tmp_path / "model"), overwrite_output_dir=True)


def test_a_file_is_no_output(train: Train, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(sft.UsageError, match="is a file; give a folder"):
        train()


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name_or_path", "output_dir"])
def test_what_a_run_needs_is_asked_for(tmp_path: Path, models: Path, dataset: Path, name: str) -> None:
    settings = {
        "model_name_or_path": str(models / "llama-tied-gqa"),
        "dataset_name_or_path": str(dataset),
        "output_dir": str(tmp_path / "out"),
    }
    del settings[name]
    with pytest.raises(sft.UsageError, match=f"{name} is not set; add --{name} VALUE"):
        sft.run(settings)


def refused(train: Train, tmp_path: Path, message: str, **settings: Any) -> None:
    """Refused, and nothing has been written."""
    with pytest.raises(sft.UsageError, match=message):
        train(**settings)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(train: Train, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "llama-untied", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models / "llama-tied-gqa" / name, folder)
    refused(train, tmp_path, "its tokenizer has 320 tokens, its model 128", model_name_or_path=str(folder))


def test_records_longer_than_the_models_positions_are_refused(train: Train, models: Path, tmp_path: Path) -> None:
    data = tmp_path / "long.json"
    data.write_text(json.dumps({"src": "a b c " * 30, "tgt": "d e f"}))
    message = r"A record has \d+ tokens and .* reads at most 65, the last .* predicted \(max_position_embeddings, or"
    refused(train, tmp_path, message, dataset_name_or_path=str(data))


def test_evaluation_without_dev_data_is_refused(train: Train, dataset: Path, tmp_path: Path) -> None:
    data = str(dataset / "train.json")
    refused(train, tmp_path, "Evaluation is asked for", dataset_name_or_path=data, evaluation_strategy="epoch")
    refused(train, tmp_path, "Evaluation is asked for", dataset_name_or_path=data, do_eval=True)


def test_settings_can_come_from_a_file(paddle: Any, models: Path, dataset: Path, tmp_path: Path) -> None:
    said: list[str] = []
    values = {
        "model_name_or_path": str(models / "llama-tied-gqa"),
        "dataset-name-or-path": str(dataset),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
    }
    (tmp_path / "run.json").write_text(json.dumps(values))
    summary = sft.run(tmp_path / "run.json", say=said.append)
    assert summary.steps == 1
    assert summary.output_dir == tmp_path / "out"
    assert any(line.startswith("train data: 30 records") for line in said)


# --- cheap things first -------------------------------------------------------------------------------------

FIRST = """
import json, sys
import sft
from sft.inference.open import load_for_inference
from sft.inference.evaluate import evaluate_finished
for model, data, message, with_data in json.loads(sys.argv[1]):
    values = {"model_name_or_path": model, "dataset_name_or_path": data}
    said = []
    for open_it in (
        lambda: sft.run({**values, "output_dir": sys.argv[2]}, say=said.append),
        lambda: evaluate_finished(values, None, said.append),
        lambda: load_for_inference(model, None, said.append),
    ):
        try:
            open_it()
        except sft.UsageError as error:
            assert message in str(error), (message, str(error))
        else:
            raise AssertionError(message)
        if with_data:
            break
    assert "paddle" not in sys.modules, message
    assert not any(" data:" in line for line in said), said
"""


def test_a_model_that_cannot_be_used_is_refused_before_data_is_read_or_paddle_imported(
    models: Path, tmp_path: Path
) -> None:
    """The data is no JSON, which nobody gets to see; and once it holds a record that is too long."""
    broken, long = tmp_path / "broken", tmp_path / "long"
    for folder, text in ((broken, "{"), (long, json.dumps({"src": "a b c " * 30, "tgt": "d e f"}))):
        folder.mkdir()
        for split in ("train", "dev"):
            (folder / f"{split}.json").write_text(text)
    cases = []

    def case(
        message: str, data: Path = broken, without: str = "", text: str = "", file: str = "config.json", **config: Any
    ) -> None:
        model = tmp_path / f"model-{len(cases)}"
        shutil.copytree(models / "llama-tied-gqa", model)
        values = {**json.loads((model / "config.json").read_text()), **config}
        (model / "config.json").write_text(json.dumps(values))
        if text:
            (model / file).write_text(text)
        if without:
            (model / without).unlink()
        cases.append((str(model), str(data), message, "reads at most" in message or "its tokenizer has" in message))

    case("model_type 'mamba' is not a family", model_type="mamba")
    case("model_type ['llama'] is not a family", model_type=["llama"])
    case("is not valid JSON", text="{")
    case("is not valid JSON", text="[" * 100_000)
    case("rotary scaling 'spiral' is not known", rope_scaling={"rope_type": "spiral", "factor": 2.0})
    case("rope_scaling as an object or null, not 'linear'", rope_scaling="linear")
    case("rope_theta as a number above 1, not 'high'", rope_parameters=None, rope_theta="high")
    case("rope_scaling.factor as a number above 0, not None", rope_scaling={"rope_type": "linear"})
    case("must hold one JSON object, and holds a list", text="[]", file="tokenizer_config.json")
    case("must give eos_token as text", text='{"eos_token": {"x": 1}}', file="tokenizer_config.json")
    case("has no tokenizer.json", without="tokenizer.json")
    case("has no weights", without="model.safetensors")
    case("has no config.json", without="config.json")
    case("its tokenizer has 320 tokens, its model 128", vocab_size=128)
    case("reads at most 65", data=long)
    line = [sys.executable, "-c", FIRST, json.dumps(cases), str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_the_number_that_is_offered_for_max_length_works_and_a_larger_one_does_not(
    train: Train, models: Path, tmp_path: Path
) -> None:
    data = tmp_path / "long.json"
    data.write_text(json.dumps({"src": "a b c", "tgt": "d e f " * 30}))
    with pytest.raises(sft.UsageError, match=r"to cut longer records, give --max_length (\d+)\.") as caught:
        train("out", dataset_name_or_path=str(data), max_steps=1)
    offered = int(re.findall(r"--max_length (\d+)", str(caught.value))[0])
    with pytest.raises(sft.UsageError, match="to cut longer records"):
        train("out", dataset_name_or_path=str(data), max_steps=1, max_length=offered + 1)
    assert train("out", dataset_name_or_path=str(data), max_steps=1, max_length=offered).tokens == 64

"""The output folder of a run, and the runs that are refused."""

from __future__ import annotations

import json
import shutil
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
    written = {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "run.json"}
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
    message = r"longest record has \d+ tokens and .* reads 64 \(max_position_embeddings, or a smaller sliding_window\)"
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

"""Replays of runs in which several plugins take part: every step is the same to the last bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replays import again
from stopped_runs import StoppedError, stopping

import sft
from sft.testing import needs, write_data

MODEL = Path(__file__).parent.parent / "core" / "tests" / "fixtures" / "models" / "llama-tied-gqa"
DEMO = Path(sft.__file__).parent / "demo"
SETTINGS: dict[str, Any] = {
    "model_name_or_path": str(MODEL),
    "learning_rate": 1e-3,
    "max_length": 64,
    "max_steps": 9,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "warmup_steps": 2,
    "weight_decay": 0.1,
}
LORA = {"plugin": ["lora"], "lora_rank": 4, "lora_dropout": 0.2}
EVERYTHING = {
    "plugin": ["lora", "greedy-zero-padding", "flashmask", "neftune"],
    "lora_rank": 4,
    "lora_dropout": 0.2,
}
CASES = {
    "everything": EVERYTHING,
    "lazy": {**EVERYTHING, "lazy": True},
    "quantized": {**EVERYTHING, "plugin": [*EVERYTHING["plugin"], "nf4"]},
    "pissa": {**LORA, "plugin": ["lora", "pissa"]},
    "dora": {**LORA, "plugin": ["lora", "dora"]},
    "vera": {"plugin": ["vera"]},
    "full, packed": {"plugin": ["zero-padding", "neftune"]},
    "label smoothing": {**LORA, "plugin": ["lora", "label-smoothing"]},
    "muon": {**LORA, "optim": "muon"},
    "adamw 8 bit": {**LORA, "optim": "adamw_8bit"},
    "bfloat16": {**EVERYTHING, "bf16": True},
    "early stopping": {
        **LORA,
        "plugin": ["lora", "early-stopping"],
        "evaluation_strategy": "steps",
        "eval_steps": 3,
        "early_stopping_patience": 5,
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = ["coat", "shirt", "dress", "skirt"]
    records = [{"src": kinds[n % 4], "tgt": f"A {kinds[n % 4]}" + " for you" * (n % 3) + f" {n}."} for n in range(40)]
    return write_data(tmp_path_factory.mktemp("data"), records[:36], records[36:])


def stopped_and_resumed(data: Path, out: Path, **settings: Any) -> None:
    """A run that ends after step 5 and goes on from its checkpoint of step 3."""
    values = {**SETTINGS, "dataset_name_or_path": str(data), "output_dir": str(out), **settings}
    with pytest.raises(StoppedError):
        sft.run(values, plugins=(stopping(5),), say=lambda text: None)
    sft.run({**values, "resume_from_checkpoint": "auto"}, say=lambda text: None)


def needed(settings: dict[str, Any]) -> list[str]:
    by_word = {"muon": "muon", "adamw_8bit": "adamw-8bit"}
    return [*settings.get("plugin", []), *(by_word[word] for word in [settings.get("optim")] if word in by_word)]


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(one, marks=needs(*needed(CASES[one]))) for one in CASES])
def test_every_step_of_a_run_that_went_on_is_the_same(data: Path, tmp_path: Path, case: str) -> None:
    stopped_and_resumed(data, tmp_path / "out", **CASES[case])
    found = again(tmp_path / "out", *range(1, 10))
    assert [(one.loss, one.grad_norm) for one in found.steps] == [one.recorded for one in found.steps]
    assert found.starts == [0, 3, 6]
    assert found.differences == []
    for step in found.steps:
        if not found.minimises:
            assert abs(step.mean_loss - step.loss) <= (2e-2 if case == "bfloat16" else 1e-6) * step.loss
        assert sum(one.tokens for one in step.records) == sum(row.tokens for row in step.rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs("lora", "greedy-zero-padding", "neftune")
def test_all_steps_of_a_killed_run_on_the_demos_model_differ_by_nothing(tmp_path: Path) -> None:
    """What docs/replay.md says that was measured, by the commands: 60 steps, SIGKILL behind step 20, a resume."""
    out, steps = tmp_path / "out", 60
    settings = {
        "plugin": ["lora", "greedy-zero-padding", "neftune"],
        "lora_dropout": 0.1,
        "model_name_or_path": str(DEMO / "model"),
        "dataset_name_or_path": str(DEMO / "data"),
        "output_dir": str(out),
        "learning_rate": 1e-2,
        "max_length": 128,
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 20,
        "do_eval": False,
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    line = [sys.executable, "-m", "sft"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*line, "run", str(tmp_path / "settings.json")], stdout=log, stderr=log)
        while not (out / "checkpoint-20").is_dir() or len(figures(out)) < 23:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert 23 <= len(figures(out)) < 40
    going_on = [*line, "run", str(tmp_path / "settings.json"), "--resume_from_checkpoint", "auto"]
    assert "after step 20" in subprocess.run(going_on, check=True, capture_output=True, text=True).stdout
    asked = [word for step in range(1, steps + 1) for word in ("--step", str(step))]
    shown = subprocess.run([*line, "replay", str(out), *asked, "--json"], check=True, capture_output=True, text=True)
    found = json.loads(shown.stdout)
    computed = np.array([(one["loss"], one["grad_norm"]) for one in found["steps"]])
    assert computed.shape == (steps, 2)
    assert np.abs(computed - figures(out)).max() == 0
    assert found["from_steps"] == [0, 20, 40]
    assert any(len(row["lengths"]) > 1 for one in found["steps"] for row in one["rows"])  # packed


def figures(out: Path) -> Any:
    """Loss and gradient norm of each step that a run has written down, read as docs/replay.md reads them."""
    return np.fromfile(out / "steps.bin", "<f8", offset=16).reshape(-1, 2) if (out / "steps.bin").exists() else []


@pytest.mark.slow
@needs("lora", "greedy-zero-padding", "flashmask", "neftune")
def test_records_of_packed_rows_stand_where_they_say(data: Path, tmp_path: Path) -> None:
    from sft.data.tokenizer import Tokenizer

    stopped_and_resumed(data, tmp_path / "out", **EVERYTHING)
    (step,) = again(tmp_path / "out", 8).steps
    tokenizer, lines = Tokenizer(MODEL), (data / "train.json").read_text(encoding="utf-8").splitlines()
    assert any(len(row.lengths) > 1 for row in step.rows)
    for record in step.records:
        row, span = step.rows[record.span.row], record.span
        text = json.loads(lines[int(record.place.rpartition(" ")[2]) - 1])["tgt"]
        labels = row.labels[span.start : span.end]
        assert tokenizer.decode(labels[labels != -100]).startswith(text)
        assert (row.ends[span.start : span.end] == span.end).all()  # nobody behind it sees it
        assert row.position_ids[span.start] == 0


@pytest.mark.slow
@needs("lora", "tensorboard")
def test_what_only_watches_hears_nothing_of_a_replay(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    values = {**SETTINGS, **LORA, "dataset_name_or_path": str(data), "output_dir": str(tmp_path / "out")}
    sft.run({**values, "report_to": "tensorboard"}, say=lambda text: None)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert [one.is_same for one in again(tmp_path / "out", 5).steps] == [True]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.slow
@needs("lora", "parallel-4d")
@pytest.mark.timeout(300)
def test_a_run_of_two_processes_is_replayed_in_one_which_is_said(data: Path, tmp_path: Path) -> None:
    """Without dropout only the order of sums differs; and the rows are the same ones."""
    values = {**SETTINGS, "plugin": ["lora"], "dataset_name_or_path": str(data), "max_steps": 4}
    (tmp_path / "settings.json").write_text(json.dumps({**values, "output_dir": str(tmp_path / "out")}))
    line = [sys.executable, "-m", "sft", "run", str(tmp_path / "settings.json"), "--nproc", "2"]
    subprocess.run(line, check=True, capture_output=True, timeout=200)
    found = again(tmp_path / "out", 2, 4)
    assert any(clause.startswith("processes: 2 (now 1") for clause in found.differences)
    for step in found.steps:
        assert len(step.records) == 8
        assert step.recorded is not None
        assert abs(step.loss - step.recorded[0]) <= 1e-5 * step.loss
        assert abs(step.grad_norm - step.recorded[1]) <= 1e-4 * step.grad_norm

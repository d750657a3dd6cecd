"""A run opened again: its steps, its records and its model are those of the run; what cannot be opened is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.settings.again import settings_again
from sft.testing import load, needs, read_metrics, write_data
from sft.training.loss import batch_loss

Train = Callable[..., sft.Summary]
SETTINGS: dict[str, Any] = {
    "max_steps": 7,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "warmup_steps": 3,
    "do_eval": False,
}


class Watch(sft.Plugin):
    """Keeps the rows of each step, and what the run says of it."""

    name = "watch"
    api_version = ">=1.1,<2"
    rows: list[list[tuple[int, ...]]]
    records: list[dict[str, Any]]

    @sft.hookimpl
    def sft_run_started(self, run: sft.Run) -> None:
        Watch.rows, Watch.records, self.now = [], [], []

    @sft.hookimpl
    def sft_micro_batch(self, run: sft.Run, batch: sft.Batch) -> None:
        self.now += [tuple(row[: sum(each)].tolist()) for row, each in zip(batch.input_ids, batch.lengths, strict=True)]

    @sft.hookimpl
    def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
        Watch.rows.append(self.now)
        Watch.records.append(record)
        self.now = []


def quiet(text: str) -> None:
    pass


def test_steps_records_and_model_are_those_of_the_run(train: Train, dataset: Path, tmp_path: Path) -> None:
    train("out", (Watch,), **SETTINGS)
    rows, records = Watch.rows, Watch.records
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with sft.reopened(tmp_path / "out", quiet, plugins=(Watch,)) as opened:
        assert opened.checkpoints == [3, 6]
        assert len(opened) == 30
        steps = list(opened.steps())
        assert [step.rate for step in steps] == [record["learning_rate"] for record in records]
        assert [step.weight for step in steps] == [record["target_tokens"] for record in records]
        clips = [min(1.0, 1.0 / record["grad_norm"]) for record in records]
        assert [step.clip for step in steps] == pytest.approx(clips, rel=1e-12)
        assert min(clips) < 1.0
        read = [tuple(opened.batch(number).input_ids[0].tolist()) for number in range(30)]
        assert [[read[number] for number in step.records] for step in steps] == rows

        lines = (dataset / "train.json").read_text(encoding="utf-8").splitlines()
        assert opened.places([29, 0]) == [f"{dataset / 'train.json'}, line {n}" for n in (30, 1)]
        record = json.loads(lines[7])
        assert record["src"] in opened.text(7)
        assert record["tgt"] in opened.text(7)
        batch = opened.answered([sft.Turn("user", record["src"])], sft.Turn("assistant", record["tgt"]))
        own = opened.batch(7)
        assert np.array_equal(batch.input_ids, own.input_ids)
        assert np.array_equal(batch.labels, own.labels)

        last = float(opened.loss(own))
        opened.restore(3)
        assert opened.run.step == 3
        expected = float(batch_loss(load(tmp_path / "out" / "checkpoint-3"), own))
        assert float(opened.loss(own)) == pytest.approx(expected, rel=1e-6)
        assert float(opened.cross_entropy(own)) == pytest.approx(expected, rel=1e-6)
        opened.restore(6)
        assert float(opened.loss(own)) == last != expected
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_a_step_that_was_skipped_has_moved_nothing(train: Train, tmp_path: Path) -> None:
    """By what the run wrote down of it; where it wrote nothing, every step has gone the whole way."""
    train("out", **SETTINGS, max_grad_norm=0)
    written = tmp_path / "out" / "steps.bin"
    figures = np.fromfile(written, "<f8")  # two of the head, two of each step
    figures[2 + 2 * 4 + 1] = np.inf
    figures.tofile(written)
    with sft.reopened(tmp_path / "out", quiet) as opened:
        assert [step.clip for step in opened.steps()] == [1, 1, 1, 1, 0, 1, 1]
        written.unlink()
        assert [step.clip for step in opened.steps()] == [1] * 7


def test_only_what_differs_from_its_default_is_given_again() -> None:
    """A run.json of before ``given`` was written."""
    settings = {"plugin": [], "learning_rate": 1e-3, "max_steps": -1, "bf16": True, "fp16_opt_level": "O1", "seed": 42}
    report = {"settings": {**settings, "output_dir": "x", "tokenizer_name_or_path": None}}
    for frozen, expected in (("bfloat16", {}), ("float32", {"fp16_opt_level": "O1"})):
        found = settings_again({**report, "precision": {"frozen": frozen}})
        assert [name for name in found.pop("plugin") if not name.startswith("no:")] == []
        assert found == {"learning_rate": 1e-3, "bf16": True, **expected}


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        (None, "holds no run (no run.json with its settings); give the output_dir of a run"),
        ({"lazy": True}, "streamed its data (lazy), and none of its records can be looked up"),
        ({}, "has kept no checkpoint, and only in those a run can be looked into; train with --save_strategy steps"),
    ],
)
def test_what_is_no_run_with_checkpoints_is_refused(
    tmp_path: Path, settings: dict[str, Any] | None, cause: str
) -> None:
    if settings is not None:
        (tmp_path / "run.json").write_text(json.dumps({"settings": {"plugin": [], **settings}}))
    with pytest.raises(sft.UsageError) as caught, sft.reopened(tmp_path, quiet):
        pass
    assert cause in str(caught.value)


def test_where_data_has_moved_to_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    settings = {"plugin": [], "dataset_name_or_path": "no/where"}
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
    cause = r"was trained on no/where, which is not there \(a relative path .*; say .* with --dataset_name_or_path"
    with pytest.raises(sft.UsageError, match=cause), sft.reopened(tmp_path, quiet):
        pass


@pytest.mark.slow
def test_data_that_has_changed_is_refused_and_may_be_named_anew(train: Train, dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    text = (dataset / "train.json").read_text(encoding="utf-8")
    (data / "train.json").write_text(text, encoding="utf-8")
    train("out", dataset_name_or_path=str(data), **SETTINGS)
    (data / "train.json").write_text(text.replace("coat", "goat", 1), encoding="utf-8")
    with pytest.raises(sft.UsageError, match="was trained on other tokens than its data gives now"):  # noqa: SIM117
        with sft.reopened(tmp_path / "out", quiet):
            pass
    with sft.reopened(tmp_path / "out", quiet, {"dataset_name_or_path": str(dataset)}) as opened:
        assert opened.places([0])[0].startswith(str(dataset))


@pytest.mark.slow
def test_parts_of_a_record_and_skipped_records_keep_their_places(train: Train, tmp_path: Path) -> None:
    words = " ".join(f"word{n}" for n in range(40))
    records: list[Any] = [{"text": "a coat"}, {"text": words}, {"src": 1}, {"text": "a shirt for you"}]
    data = write_data(tmp_path / "data", records)
    settings = {**SETTINGS, "max_length": 32, "on_bad_record": "skip", "on_bad_record_limit": 0.5}
    train("out", dataset_name_or_path=str(data), **settings)
    with sft.reopened(tmp_path / "out", quiet) as opened:
        parts = len(opened) - 2
        assert parts > 1
        assert opened.read_as(range(len(opened))) == [0, *[1] * parts, 3]
        lines = [place.rpartition(" ")[2] for place in opened.places(range(len(opened)))]
        assert lines == ["1", *["2"] * parts, "4"]


@pytest.mark.slow
@needs("parallel-4d", "lora")
def test_a_run_of_two_processes_is_opened_on_one(train: Train, tmp_path: Path) -> None:
    train("out", plugin=["lora"], nproc=2, sharding="stage1", sharding_parallel_degree=2, **SETTINGS)
    made = [line["target_tokens"] for line in read_metrics(tmp_path / "out") if "loss" in line]
    with sft.reopened(tmp_path / "out", quiet) as opened:
        assert [step.weight for step in opened.steps()] == made
        assert np.isfinite(float(opened.loss(opened.batch(0))))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"fp16": True}, {"bf16": True, "fp16_opt_level": "O1"}], ids=["fp16", "bf16"])
def test_runs_in_16_bits_give_gradients_in_float32(train: Train, tmp_path: Path, changes: dict[str, Any]) -> None:
    train("out", **SETTINGS, **changes)
    with sft.reopened(tmp_path / "out", quiet) as opened:
        gradients = opened.gradients(opened.loss(opened.batch(0)))
        assert gradients.keys() == opened.trainable.keys()
        assert {str(gradient.dtype) for gradient in gradients.values()} == {"paddle.float32"}
        assert all(parameter.grad is None for parameter in opened.trainable.values())

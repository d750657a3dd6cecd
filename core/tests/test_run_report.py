"""What `sft.read_run` reads of a run's folder, against what the run wrote, and against recounts of its data."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_reports import turns_of
from reported_runs import Reported, written
from toy_plugins import toy

import sft
from sft.data.encoding import encode
from sft.data.tokenizer import Tokenizer
from sft.folder_lock import FolderLock
from sft.run_report import pictures, words
from sft.run_report.page import page
from sft.testing import read_metrics
from sft.training.steps_file import StepsFile

Train = Callable[..., sft.Summary]


def test_curves_are_the_lines_that_were_written(reported: Reported) -> None:
    run = reported.report
    lines = read_metrics(reported.folder)
    steps, evaluations = ([one for one in lines if key in one] for key in ("loss", "eval_loss"))
    expected = {
        ("loss", "train"): [(one["step"], one["loss"]) for one in steps],
        ("loss", "dev"): [(one["step"], one["eval_loss"]) for one in evaluations],
        ("learning_rate", "train"): [(one["step"], one["learning_rate"]) for one in steps],
        ("grad_norm", "train"): [(one["step"], one["grad_norm"]) for one in steps],
        ("tokens_per_second", "train"): [(one["step"], one["tokens"] / one["seconds"]) for one in steps],
        ("memory_mib", "train"): [(one["step"], one["peak_memory_mib"]) for one in steps],
        ("padding", "train"): [
            (one["step"], one["padding_tokens"] / (one["padding_tokens"] + one["tokens"])) for one in steps
        ],
        ("accuracy", "dev"): [(one["step"], one["eval_accuracy"]) for one in evaluations],
    }
    found = {(one.chart, one.name): list(zip(one.steps, one.values, strict=True)) for one in run.curves}
    assert found == expected
    assert [step for step, _ in found["loss", "dev"]] == [0, 2, 4]
    assert run.moments.tokens == np.cumsum([one["tokens"] for one in steps]).tolist()
    assert (run.status, run.step, run.total_steps, run.error) == ("finished", 4, 4, None)


def test_rows_are_those_of_the_data(reported: Reported, dataset: Path, base_model: Path) -> None:
    """By an encoding of the test's own: what is in each row, which tokens are learned, and how much is padding."""
    run = reported.report
    records = [json.loads(line) for line in (dataset / "train.json").read_text().splitlines()]
    data = encode([turns_of(one) for one in records], Tokenizer(base_model), 1024, 2048)
    assert run.packs
    assert [row.step for row in run.rows] == [1] * 4 + [2] * 4 + [3] * 2 + [4] * 4  # of three steps a pass
    numbers = [one.record for row in run.rows for one in row.documents]
    assert numbers == [*range(1, 31), *range(1, 13)]
    for row in run.rows:
        for one in row.documents:
            learned = data[one.record - 1].labels != -100
            assert np.repeat(np.arange(len(one.spans)) % 2 == 1, one.spans).tolist() == learned.tolist()
    # Micro-batches of two rows are as wide as the wider one.
    for pair in zip(run.rows[::2], run.rows[1::2], strict=True):
        assert {row.width for row in pair} == {max(row.tokens for row in pair)}


def test_answers_are_kept_before_during_and_after(reported: Reported) -> None:
    run = reported.report
    samples = reported.summary.samples
    assert [one.prompt for one in run.answers] == [one["prompt"] for one in samples]
    for one, sample in zip(run.answers, samples, strict=True):
        assert one.reference == sample["reference"]
        assert [(given.when, given.step) for given in one.given] == [("before", 0), ("during", 2), ("after", 4)]
        assert (one.given[0].text, one.given[-1].text) == (sample["before"], sample["after"])
    texts = [json.loads(line)["answer"] for line in (reported.folder / "samples-2.jsonl").read_text().splitlines()]
    assert [one.given[1].text for one in run.answers] == texts


def test_what_trains_is_told_by_layer(reported: Reported) -> None:
    run = reported.report
    found = {one.name: one.trained for one in run.layers}
    assert sum(sum(parts.values()) for parts in found.values()) == run.trained == run.total
    assert {"model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"} <= set(found)
    assert found["model.layers.0"] == found["model.layers.1"]
    assert found["model.layers.0"].keys() >= {"self_attn.q_proj", "mlp.down_proj", "input_layernorm"}
    names = [name for name, _ in pictures.alike(run.layers)]
    assert "model.layers.0 to 1 (2 alike)" in names


def test_settings_are_those_that_were_given(reported: Reported) -> None:
    run = reported.report
    assert run.changed["seed"] == 42
    assert run.changed["learning_rate"] == 5e-5
    given = {"max_steps", "logging_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"}
    assert given <= set(run.changed) < set(run.settings)
    assert "weight_decay" not in run.changed


def test_steps_since_the_last_line_count(tmp_path: Path) -> None:
    """By default every 500th step has a line: what comes after it is not lost."""
    (tmp_path / "run.json").write_text(json.dumps({"status": "interrupted", "settings": {}, "total_steps": 400}))
    line = {"step": 1, "epoch": 0.01, "loss": 3.0, "tokens": 10, "seconds": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    steps = StepsFile(tmp_path / "steps.bin")
    for step in range(1, 106):
        steps.add(step, 3.0 - 0.01 * (step - 1), 1.0)
    steps.close()
    os.utime(tmp_path / "metrics.jsonl", (1000.0, 1000.0))
    os.utime(tmp_path / "steps.bin", (1040.0, 1040.0))
    run = sft.read_run(tmp_path)
    assert (run.step, run.seconds) == (105, 42.0)
    assert words.sentence(run) == "after step 105 of 400, in 0:00:42"
    assert words.figures(run)[0] == ("train loss", "1.9600", "3.0000 at step 1")
    (tmp_path / "steps.bin").unlink()
    run = sft.read_run(tmp_path)
    assert words.sentence(run) == "after step 1 of 400 (0.01 epochs), in 0:00:02"
    assert words.figures(run)[0] == ("train loss", "3.0000", "")


def test_steps_that_have_no_line_have_a_curve_too(train: Train, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    watches = toy("watches", sft_step_ended=lambda self, record: found.append(record))
    train("out", (watches,), max_steps=4, logging_steps=4, do_eval=False)
    run = sft.read_run(tmp_path / "out")
    for chart, key in (("loss", "loss"), ("grad_norm", "grad_norm")):
        curve = run.curve(chart, "each step")
        assert curve is not None
        assert (curve.steps, curve.values) == ([1, 2, 3, 4], [record[key] for record in found])
    assert run.curve("loss", "train") is not None
    assert run.skipped_steps == 0


def test_the_best_model_answers_last(train: Train, tmp_path: Path) -> None:
    """The learning rate grows, so that the first evaluation is the best one."""
    rises = toy("rises", sft_schedule=lambda self, run, total: lambda step: 1e-3 if step == 1 else 1.0)
    saves = {"save_strategy": "steps", "save_steps": 1, "evaluation_strategy": "steps", "eval_steps": 1}
    summary = train("out", (rises,), max_steps=2, load_best_model_at_end=True, num_samples=1, max_new_tokens=3, **saves)
    (one,) = sft.read_run(tmp_path / "out").answers
    assert [given.when for given in one.given] == ["before", "during", "during", "after"]
    assert one.given[-1].text == one.given[1].text == summary.samples[0]["after"]
    assert one.given[2].text != one.given[-1].text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo'),
        ("metrics.jsonl", b'[1]\n{"loss": 1.0}\n{"step": "a"}\n\xff\xfe\n{"step": 1, "loss": NaN, "eval_loss": "x"}\n'),
        ("metrics.jsonl", b'{"step": 1, "eval_loss": 1.0, "eval_sets": {"a": 3}}\n{"step": 1, "loss": true}\n'),
        ("rows.json", b'{"rows": [{"step": 1}], "mask": 3, "packs": 1}'),
        ("rows.json", b"[]"),
        ("rows.json", b'{"rows": [{"step": 1, "width": 1e999, "documents": []}], "mask": null, "packs": true}'),
        ("metrics.jsonl", b'{"step": 1, "loss": 1' + b"0" * 400 + b"}"),
        ("samples-1.jsonl", b'{"prompt": 1}\n{"answer'),
        ("samples-x.jsonl", b"{}"),
        ("bad_records.jsonl", b'{"split": 1}\n{"spl'),
    ],
)
def test_a_file_that_is_broken_costs_what_it_says_and_no_more(tmp_path: Path, name: str, content: bytes) -> None:
    folder = written(tmp_path / "out", settings={"seed": 3}, data={"train": {"records": 5}})
    (folder / name).write_bytes(content)
    run = sft.read_run(folder)
    assert (run.changed, run.counts) == ({"seed": 42}, {"train": {"records": 5}})
    assert "</html>" in page([run])


@pytest.mark.parametrize(
    "record",
    [
        {
            "result": 3,
            "plugins": [],
            "packages": None,
            "machine": "x",
            "parameters": {"layers": {"a": 1, "b": {"c": "d"}}},
        },
        {"total_steps": 10**400, "parameters": {"trained": 10**400, "total": 1}},
        {"changed": 4, "without_effect": [1, ["a", 2]], "data": {"train": 5}, "total_steps": -1, "started": 7},
        {"result": {"samples": [1, {"before": 2}], "data": {"train": {"records": "x"}}, "skipped_steps": "y"}},
    ],
)
def test_a_run_json_of_other_shapes_is_read_as_far_as_it_goes(tmp_path: Path, record: dict[str, Any]) -> None:
    assert "</html>" in page([sft.read_run(written(tmp_path / "out", **record))])


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match=r"is no folder; give the output_dir of a run\."):
        sft.read_run(tmp_path / "nowhere")
    with pytest.raises(sft.UsageError, match=r"holds no run of sft"):
        sft.read_run(tmp_path)


def test_a_run_in_its_folder_is_running(train: Train, tmp_path: Path) -> None:
    found: list[sft.RunReport] = []
    looks = toy("looks", sft_step_ended=lambda self, run: found.append(sft.read_run(run.output_dir)))
    train("out", (looks,), max_steps=2, logging_steps=1)
    assert [(one.status, one.step, one.total_steps) for one in found] == [("running", 1, 2), ("running", 2, 2)]


def test_a_run_that_was_killed_has_died(tmp_path: Path) -> None:
    assert sft.read_run(written(tmp_path / "out", status="running")).status == "died"


def test_where_a_disk_has_no_locks_a_run_that_breathes_is_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, kind: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FolderLock(written(tmp_path / "out", status="running"), lambda text: None)
    assert sft.read_run(tmp_path / "out").status == "running"
    lock.release()
    assert sft.read_run(tmp_path / "out").status == "died"

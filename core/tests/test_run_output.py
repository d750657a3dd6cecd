"""What a run writes and tells: the model, metrics.jsonl, run.json, sample answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_files import largest_difference, steps_of, weights_of
from toy_plugins import toy

import sft
from sft.conversations import Turn
from sft.plugins.requests import by_device
from sft.seams import Example
from sft.testing import forward, read_metrics

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]

STEP_KEYS = {
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "seconds",
    "tokens",
    "target_tokens",
    "padding_tokens",
    "peak_memory_mib",
}
EVALUATION_KEYS = {"step", "epoch", "eval_loss", "eval_ppl", "eval_accuracy", "eval_seconds", "eval_tokens"}


def catching(caught: list[Any]) -> type[sft.Plugin]:
    """A plugin that hands the run out of it."""

    class Catch(sft.Plugin):
        name = "catch"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            caught.append(run)

    return Catch


def full_logits_loss(folder: Path, examples: list[Example]) -> float:
    """Mean loss a target token: each example alone, log-softmax in float64."""
    from sft.models.loading import load_model, open_model

    model = load_model(open_model(folder))
    total, targets = 0.0, 0
    for example in examples:
        logits = forward(model, example.input_ids[None])[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.nonzero(example.labels != -100)[0]
        total -= log_softmax[places, example.labels[places]].sum()
        targets += len(places)
    return total / targets


# --- what comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied", "mistral-gqa", "gemma-tied"])
def test_full_training_lowers_the_loss_and_writes_a_model_that_loads(
    train: Train, models: Path, tmp_path: Path, case: str
) -> None:
    """The dev loss before and after is that of full logits, without batches, padding or chunks: 1e-5 of about 7."""
    caught: list[sft.Run] = []
    summary = train(plugins=(catching(caught),), model_name_or_path=str(models / case), per_device_eval_batch_size=3)
    examples = [next(iter(caught[0].dev_data.sets.values()))[index] for index in range(7)]
    assert summary.eval_loss_before == pytest.approx(full_logits_loss(models / case, examples), rel=1e-5)
    assert summary.eval_loss_after == pytest.approx(full_logits_loss(tmp_path / "out", examples), rel=1e-5)
    assert summary.eval_loss_after < summary.eval_loss_before - 1
    assert summary.train_loss_last < summary.train_loss_first - 1
    assert summary.trainable_parameters == summary.total_parameters
    original, written = weights_of(models / case), weights_of(tmp_path / "out")
    assert {n: (t.shape, t.dtype) for n, t in written.items()} == {n: (t.shape, t.dtype) for n, t in original.items()}
    assert all(np.any(written[name] != original[name]) for name in original)
    assert summary.total_parameters == sum(tensor.size for tensor in original.values())


def test_steps_and_epochs_are_counted(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    """30 records in rows of 8 are 4 steps an epoch; one and a half epochs are 6."""
    summary = train(num_train_epochs=1.5)
    lines = steps_of(metrics(tmp_path / "out"))
    assert (summary.steps, summary.epochs) == (6, 1.5)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3 * (6 - step) / 6 for step in range(6)])


def test_a_line_has_these_keys_and_no_others(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    train(max_steps=4, evaluation_strategy="steps", eval_steps=2)
    lines = metrics(tmp_path / "out")
    kinds = [("evaluation" if "eval_loss" in line else "step", line["step"]) for line in lines]
    assert kinds == [
        ("evaluation", 0),
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
        ("step", 3),
        ("step", 4),
        ("evaluation", 4),
    ]
    for line, (kind, _) in zip(lines, kinds, strict=True):
        assert set(line) == (STEP_KEYS if kind == "step" else EVALUATION_KEYS)
    assert all(line["peak_memory_mib"] > 0 and line["seconds"] >= 0 for line in steps_of(lines))


def test_windows_of_several_steps_add_up_to_the_data(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    """Two epochs of 10 steps, a line every 3: the first, 3, 6 ... 18 and the last."""
    caught: list[sft.Run] = []
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 3}
    summary = train("windows", (catching(caught),), logging_steps=3, **settings)
    train("steps", **settings)
    lines, single = (steps_of(metrics(tmp_path / name)) for name in ("windows", "steps"))
    assert [line["step"] for line in lines] == [1, 3, 6, 9, 12, 15, 18, 20]
    data = caught[0].train_data
    assert sum(line["tokens"] for line in lines) == 2 * int(data.lengths.sum()) == summary.tokens
    targets = sum(int((data[index].labels != -100).sum()) for index in range(30))
    assert sum(line["target_tokens"] for line in lines) == 2 * targets == summary.target_tokens
    start = 0
    for line in lines:
        window = single[start : line["step"]]
        start = line["step"]
        total = sum(each["loss"] * each["target_tokens"] for each in window)
        assert line["loss"] == pytest.approx(total / sum(each["target_tokens"] for each in window), rel=1e-12)
        for key in ("tokens", "target_tokens", "padding_tokens"):
            assert line[key] == sum(each[key] for each in window)
        for key in ("learning_rate", "grad_norm", "epoch"):
            assert line[key] == window[-1][key]
    assert (summary.train_loss_first, summary.train_loss_last) == (lines[0]["loss"], lines[-1]["loss"])


def test_padding_is_what_fills_the_rows(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    batches: list[sft.Batch] = []

    class Watch(sft.Plugin):
        name = "watch"
        api_version = 1

        @sft.hookimpl
        def sft_collator(self, run: sft.Run) -> Any:
            from sft.data.batches import PaddedCollator

            class Collator(PaddedCollator):
                def batch(self, rows: Any) -> sft.Batch:
                    batches.append(super().batch(rows))
                    return batches[-1]

            return Collator(run.tokenizer.pad_id)

    train("out", (Watch,), max_steps=3, per_device_train_batch_size=5, do_eval=False)
    for batch, line in zip(batches, metrics(tmp_path / "out"), strict=True):
        lengths = [sum(row) for row in batch.lengths]
        assert len(lengths) == 5
        assert line["tokens"] == sum(lengths)
        assert line["padding_tokens"] == 5 * max(lengths) - sum(lengths) > 0
    train("single", max_steps=3, per_device_train_batch_size=1, do_eval=False)
    assert [line["padding_tokens"] for line in metrics(tmp_path / "single")] == [0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"evaluation_strategy": "steps", "eval_steps": 3}, [0, 3, 6, 8]),
        ({"evaluation_strategy": "steps", "logging_steps": 4}, [0, 4, 8]),
        ({"evaluation_strategy": "epoch"}, [0, 4, 8]),
        ({}, [0, 8]),
        ({"do_eval": False}, []),
    ],
    ids=["steps", "logging-steps", "epoch", "before-and-after", "never"],
)
def test_evaluation_comes_when_it_was_asked_for(
    train: Train, metrics: Metrics, tmp_path: Path, settings: dict[str, Any], steps: list[int]
) -> None:
    summary = train(num_train_epochs=2, **settings)
    lines = [line for line in metrics(tmp_path / "out") if "eval_loss" in line]
    assert [line["step"] for line in lines] == steps
    if steps:
        assert summary.eval_loss_before == lines[0]["eval_loss"]
        assert summary.eval_loss_after == lines[-1]["eval_loss"]
        assert len({line["eval_loss"] for line in lines}) == len(steps)
    else:
        assert (summary.eval_loss_before, summary.eval_loss_after) == (None, None)


def test_evaluation_does_not_change_training(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    train("with", max_steps=5, evaluation_strategy="steps", num_samples=1, max_new_tokens=4)
    train("without", max_steps=5, do_eval=False)
    found, expected = (steps_of(metrics(tmp_path / name, same=True)) for name in ("with", "without"))
    assert found == expected
    assert largest_difference(tmp_path / "with", tmp_path / "without") == 0.0


def test_run_json_tells_what_was_run(train: Train, models: Path, dataset: Path, tmp_path: Path) -> None:
    class Idle(sft.Plugin):
        name = "idle"
        api_version = 1

    summary = train(plugins=(Idle,), max_steps=2, seed=9)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert set(record) == {
        *("status", "started", "date", "settings", "given", "changed", "without_effect", "total_steps", "schedule"),
        *("base_fingerprint", "plugins", "packages", "machine", "arithmetic", "precision", "hub", "data"),
        *("parameters", "result"),
    }
    assert record["changed"]["seed"] == 42  # each with its default
    assert "weight_decay" not in record["changed"]
    assert record["total_steps"] == 2
    assert record["hub"] == {}  # the model is a folder
    assert record["status"] == "finished"
    assert record["settings"]["seed"] == 9
    assert record["settings"]["weight_decay"] == 0.0  # defaults are written too
    assert record["settings"]["model_name_or_path"] == str(models / "llama-tied-gqa")
    assert {*record["plugins"]} == {"idle", *by_device({})}
    assert record["plugins"]["idle"] == f"given directly as {Idle.__qualname__}"
    assert record["packages"]["paddlepaddle"] == version("paddlepaddle")
    assert "paddlenlp" not in record["packages"]
    assert {"system", "python", "cpu", "cores", "device", "threads", "runtime"} <= set(record["machine"])
    assert record["result"] == json.loads(json.dumps(summary.as_dict()))
    assert record["result"]["data"]["train"]["records"] == 30
    assert record["result"]["data"]["dev"]["records"] == 7
    assert record["result"]["steps"] == 2


def test_a_clock_that_is_set_back_does_not_count(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two days, while the run goes on."""
    own, clock = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: own() + clock[0])
    back = toy("back", sft_step_ended=lambda self: clock.append(clock.pop() - 172_800))
    summary = train("out", (back,), max_steps=1)
    assert 0 <= summary.seconds < 100
    assert all(line.get("seconds", 0) >= 0 for line in read_metrics(tmp_path / "out"))


def test_run_json_says_while_a_run_is_not_finished(train: Train, tmp_path: Path) -> None:
    found = []

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            found.append(json.loads((run.output_dir / "run.json").read_text()))
            written = sorted(path.name for path in run.output_dir.iterdir())
            assert written == ["metrics.jsonl", "rows.json", "run.json", "run.lock", "sft.log", "steps.bin"]

    train(plugins=(Look,), max_steps=1)
    assert [record["status"] for record in found] == ["running"]
    assert "result" not in found[0]


# --- samples ------------------------------------------------------------------------------------------------


def test_samples_are_answers_before_and_after(train: Train, models: Path, dataset: Path, tmp_path: Path) -> None:
    from sft.data.questions import encode_prompt
    from sft.data.tokenizer import Tokenizer
    from sft.models.generation import answers
    from sft.models.loading import load_model, open_model
    from sft.settings.arguments import GenerationArguments

    summary = train(num_samples=2, max_new_tokens=6)
    records = [json.loads(line) for line in (dataset / "dev.json").read_text().splitlines()][:2]
    assert [(s["prompt"], s["reference"]) for s in summary.samples] == [(r["src"], r["tgt"]) for r in records]
    for when, folder in (("before", models / "llama-tied-gqa"), ("after", tmp_path / "out")):
        model, tokenizer = load_model(open_model(folder)), Tokenizer(folder)
        for sample in summary.samples:
            prompt = encode_prompt([Turn("user", sample["prompt"])], tokenizer)
            assert [sample[when]] == answers(model, tokenizer, [prompt], GenerationArguments(max_new_tokens=6), seed=0)
    assert any(sample["before"] != sample["after"] for sample in summary.samples)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["result"]["samples"] == summary.samples


def test_the_result_is_written_before_the_last_measurement(train: Train, tmp_path: Path) -> None:
    class Fails(sft.Plugin):
        name = "fails"
        api_version = 1

        @sft.hookimpl
        def sft_evaluated(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"]:
                raise RuntimeError("out of memory")

    with pytest.raises(sft.PluginError, match="out of memory"):
        train(plugins=(Fails,), max_steps=1)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"


def test_a_sample_that_has_no_room_is_refused_before_training(train: Train, tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match="do not fit into the model's 64 positions"):
        train(num_samples=1, max_new_tokens=60)
    assert not (tmp_path / "out").exists()


def test_without_dev_data_samples_come_from_the_training_data(
    train: Train, metrics: Metrics, dataset: Path, tmp_path: Path
) -> None:
    summary = train(dataset_name_or_path=str(dataset / "train.json"), num_samples=1, max_new_tokens=2, max_steps=1)
    first = json.loads((dataset / "train.json").read_text().splitlines()[0])
    assert [(s["prompt"], s["reference"]) for s in summary.samples] == [(first["src"], first["tgt"])]
    assert summary.eval_loss_after is None
    assert len(metrics(tmp_path / "out")) == 1


def test_a_diverged_run_stops_with_a_sentence_and_valid_lines(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    with pytest.raises(sft.SftError, match=r"no longer finite at step \d+ .*lower learning_rate"):
        train(learning_rate=1e30, max_grad_norm=0, max_steps=13, per_device_train_batch_size=4)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path / "out") if "loss" in line)

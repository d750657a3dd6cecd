"""Resuming: a run that was stopped and resumed is, bit by bit, the run that was never stopped."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import KINDS, LORA, SETTINGS, StoppedError, checkpoints_of, contents, stop, watching

import sft
from sft.testing import needs

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]

# --- resuming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("stopped_at", "first"),
    [
        pytest.param(5, 4, id="epoch-1", marks=pytest.mark.slow),
        pytest.param(11, 10, id="epoch-2"),
        pytest.param(13, 13, id="last-step"),
    ],
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    train: Train, metrics: Metrics, whole: Any, tmp_path: Path, kind: dict[str, Any], stopped_at: int, first: int
) -> None:
    """Lines, result and later checkpoints, bit by bit: 3 and 9 lie inside epochs and inside windows of lines."""
    steps: list[int] = []
    expected = json.loads((whole(kind) / "run.json").read_text())["result"]
    stop(train, stopped_at, **SETTINGS, **kind)
    found = train("out", (watching(steps),), resume_from_checkpoint="auto", **SETTINGS, **kind)
    assert steps == list(range(first, 14))
    assert metrics(tmp_path / "out", same=True) == metrics(whole(kind), same=True)
    assert contents(tmp_path / "out") == contents(whole(kind))
    differ = {"output_dir", "seconds", "peak_memory_mib"}
    one, other = ({k: v for k, v in result.items() if k not in differ} for result in (found.as_dict(), expected))
    assert one == other


@needs("lora")
def test_dropout_is_in_play_above(train: Train, metrics: Metrics, whole: Any, tmp_path: Path) -> None:
    """The control of the test above: dropout changes the losses, so its draws must have been the same ones."""
    train("without", **{**SETTINGS, **LORA, "lora_dropout": 0.0})
    found, expected = (metrics(folder, same=True) for folder in (whole(LORA), tmp_path / "without"))
    # B is zero before the first step, so dropout cannot matter there.
    assert [a["loss"] != b["loss"] for a, b in zip(found, expected, strict=True) if "loss" in a] == [False, *[True] * 4]


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_run_that_was_stopped_after_its_last_checkpoint_only_finishes(
    train: Train, metrics: Metrics, tmp_path: Path, strategy: str
) -> None:
    """No step is done again, and no line comes twice, though the last evaluation had been written already."""

    class StopAtTheEnd(sft.Plugin):
        name = "stop"
        api_version = 1

        @sft.hookimpl
        def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
            record = json.loads((run.output_dir / "run.json").read_text())
            (run.output_dir / "run.json").write_text(json.dumps({**record, "status": "running"}))
            raise StoppedError

    settings = {
        **SETTINGS,
        "max_steps": 6,
        "evaluation_strategy": strategy,
        "eval_steps": 3 if strategy == "steps" else None,
    }
    steps: list[int] = []
    train("whole", **settings)
    with pytest.raises(StoppedError):
        train("out", (StopAtTheEnd,), **settings)
    train("out", (watching(steps),), resume_from_checkpoint="auto", **settings)
    assert steps == []
    assert metrics(tmp_path / "out", same=True) == metrics(tmp_path / "whole", same=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_process_is_resumed(
    train: Train, metrics: Metrics, models: Path, dataset: Path, tmp_path: Path
) -> None:
    """SIGKILL for a real ``sft run``, as the kernel does it when memory is short."""
    settings = {
        "model_name_or_path": str(models / "llama-tied-gqa"),
        "dataset_name_or_path": str(dataset),
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_steps": 40,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": 2,
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        "from sft.commands.cli import main; main()",
        "run",
        str(tmp_path / "settings.json"),
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--output_dir", str(out)], stdout=log, stderr=log)
        try:
            while process.poll() is None and not (out / "checkpoint-8").exists():
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    (newest,) = checkpoints_of(out)[-1:]
    assert int(newest.split("-")[1]) < 40

    steps: list[int] = []
    train("whole", **settings)
    train("out", (watching(steps),), resume_from_checkpoint="auto", **settings)
    assert steps[0] == int(newest.split("-")[1]) + 1
    assert metrics(out, same=True) == metrics(tmp_path / "whole", same=True)
    assert contents(out) == contents(tmp_path / "whole")
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


def test_lines_after_the_checkpoint_are_dropped(train: Train, metrics: Metrics, whole: Any, stopped: Path) -> None:
    seen: list[list[int]] = []

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            seen.append([line["step"] for line in metrics(run.output_dir)])

    assert [line["step"] for line in metrics(stopped)] == [0, 1, 4]
    with (stopped / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "loss": 1.')  # cut off in the middle of a line
    train("out", (Look,), resume_from_checkpoint="auto", **SETTINGS)
    assert seen == [[0, 1]]
    assert metrics(stopped, same=True) == metrics(whole(), same=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_folder_is_gone_on_from_here(
    train: Train, metrics: Metrics, whole: Any, tmp_path: Path, kind: dict[str, Any]
) -> None:
    """The other folder is left as it is; its lines up to the checkpoint come along."""
    other = whole(kind)
    before = contents(other, without=())
    train("out", resume_from_checkpoint=str(other / "checkpoint-6"), **SETTINGS, **kind)
    assert metrics(tmp_path / "out", same=True) == metrics(other, same=True)
    assert contents(other, without=()) == before
    final = {name: data for name, data in contents(other).items() if "checkpoint-" not in name}
    assert {n: data for n, data in contents(tmp_path / "out").items() if "checkpoint-" not in n} == final
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-9", "checkpoint-12"]


def test_a_checkpoint_of_another_folder_does_not_replace_a_run(train: Train, tmp_path: Path) -> None:
    settings = {**SETTINGS, "max_steps": 3}
    train("first", **settings)
    train("second", seed=1, **settings)
    before = contents(tmp_path / "second", without=())
    elsewhere = str(tmp_path / "first" / "checkpoint-3")
    with pytest.raises(sft.UsageError, match="already holds a run"):
        train("second", resume_from_checkpoint=elsewhere, **settings)
    assert contents(tmp_path / "second", without=()) == before
    train("second", resume_from_checkpoint=elsewhere, overwrite_output_dir=True, **settings)
    assert checkpoints_of(tmp_path / "second") == []  # nothing of the run that was there
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == (
        tmp_path / "first" / "model.safetensors"
    ).read_bytes()


def test_resuming_keeps_the_samples_from_before_training(train: Train, tmp_path: Path) -> None:
    settings = {**SETTINGS, "max_steps": 4, "num_samples": 1, "max_new_tokens": 4, "learning_rate": 1e-2}
    expected = train("whole", **settings)
    stop(train, 4, **settings)
    found = train("out", resume_from_checkpoint="auto", **settings)
    assert found.samples == expected.samples
    assert found.samples[0]["before"] != found.samples[0]["after"]
    again = {**settings, "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-3")}
    more = train("out", **{**again, "num_samples": 3})
    assert more.samples[0] == expected.samples[0]
    assert [sample["before"] for sample in more.samples[1:]] == ["", ""]
    assert all(sample["after"] for sample in more.samples)
    assert train("out", **{**again, "num_samples": 0}).samples == []


def test_auto_without_a_checkpoint_is_a_fresh_start(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    """In an empty folder, and in one whose run was stopped before its first checkpoint."""
    settings = {**SETTINGS, "max_steps": 4}
    train("whole", **settings)
    train("fresh", resume_from_checkpoint="auto", **settings)
    stop(train, 2, **settings)
    train("out", resume_from_checkpoint="auto", **settings)
    for name in ("fresh", "out"):
        assert metrics(tmp_path / name, same=True) == metrics(tmp_path / "whole", same=True)
        assert contents(tmp_path / name) == contents(tmp_path / "whole")


def test_auto_does_not_replace_a_finished_run_without_checkpoints(train: Train, tmp_path: Path) -> None:
    train(max_steps=1)
    with pytest.raises(sft.UsageError, match="already holds a run"):
        train(max_steps=1, resume_from_checkpoint="auto")


def test_auto_does_not_replace_a_result_without_checkpoints(train: Train, tmp_path: Path) -> None:
    """The run had been stopped while it was measured after the training, or its run.json has been damaged since."""
    train(max_steps=1)
    path, before = tmp_path / "out" / "run.json", contents(tmp_path / "out")
    record = json.loads(path.read_text())
    for text in (json.dumps({**record, "status": "interrupted"}), json.dumps({**record, "status": "failed"}), "{"):
        path.write_text(text)
        with pytest.raises(sft.UsageError, match="holds the result of a run that was stopped after it was written"):
            train(max_steps=1, resume_from_checkpoint="auto")
        assert contents(tmp_path / "out") == before
    path.write_text(json.dumps({**record, "status": "running", "clears": True}))  # an overwriting start was killed
    train(max_steps=1, resume_from_checkpoint="auto")


# --- futures that a run does not have -----------------------------------------------------------------------


def test_resuming_from_an_older_checkpoint_drops_the_newer_ones(train: Train, tmp_path: Path) -> None:
    """They belong to a run that this one leaves; kept, they would be resumed later and count in the limit."""
    settings = {**SETTINGS, "save_steps": 2, "max_steps": 8}
    train(**settings)
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    older = str(tmp_path / "out" / "checkpoint-4")
    train(resume_from_checkpoint=older, **{**settings, "save_steps": 3, "max_steps": 7, "save_total_limit": 2})
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-4", "checkpoint-6"]


def test_a_run_that_would_end_before_its_checkpoint_is_refused(train: Train, tmp_path: Path) -> None:
    train(**{**SETTINGS, "max_steps": 6})
    with pytest.raises(sft.UsageError, match=r"is after step 6 and this run ends at step 5"):
        train(resume_from_checkpoint="auto", **{**SETTINGS, "max_steps": 5})


def test_continuing_and_overwriting_contradict_each_other(train: Train, tmp_path: Path) -> None:
    train(**{**SETTINGS, "max_steps": 3})
    with pytest.raises(sft.UsageError, match="cannot be continued and overwritten"):
        train(resume_from_checkpoint="auto", overwrite_output_dir=True, **SETTINGS)


def test_a_template_that_prints_the_date_keeps_that_of_the_beginning(
    train: Train, models: Path, metrics: Metrics, tmp_path: Path
) -> None:
    """Llama 3's templates do; the next day a resumed run must read the same tokens."""
    import datetime

    shutil.copytree(models / "qwen2-untied", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = "{{ strftime_now('%H%M%S%f') }}" + config["chat_template"]
    path.write_text(json.dumps(config))
    settings = {**SETTINGS, "model_name_or_path": str(tmp_path / "model"), "max_steps": 6, "max_length": 60}
    stop(train, 4, **settings)
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer" / "state.json").read_text())
    assert datetime.datetime.fromisoformat(state["date"]) < datetime.datetime.now()
    train(resume_from_checkpoint="auto", **settings)
    assert [line["step"] for line in metrics(tmp_path / "out") if "loss" in line][-1] == 6

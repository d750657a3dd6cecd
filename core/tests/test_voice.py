"""What of a run is said, and how: levels, quiet, and events in JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import sft
from sft.training.journal import read_metrics

Train = Callable[..., sft.Summary]


def command(*settings: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", "from sft.commands.cli import main; main()", "run", *settings]
    return subprocess.run(
        line, capture_output=True, text=True, timeout=110, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )


def arguments(models: Path, dataset: Path, out: Path) -> list[str]:
    values = {"model_name_or_path": models / "llama-tied-gqa", "dataset_name_or_path": dataset, "output_dir": out}
    return [
        word for name, value in {**values, "max_steps": 2, "power": 2}.items() for word in (f"--{name}", str(value))
    ]


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        ({"log_level": "warning"}, ["settings without effect here:", "note: records that cannot be read"]),
        ({"quiet": True}, ["settings without effect here:", "note: records that cannot be read"]),
        ({"log_level": "error"}, []),
    ],
)
def test_levels(train: Train, tmp_path: Path, settings: dict[str, Any], starts: list[str]) -> None:
    """Notes, and what does nothing, from warning on; of other lines none."""
    data = tmp_path / "train.jsonl"
    data.write_text('{"src": "a", "tgt": "b"}\n' * 40 + '{"src": 1}\n')
    said: list[str] = []
    train(say=said.append, dataset_name_or_path=str(data), max_steps=1, on_bad_record="skip", power=2, **settings)
    assert [text for text in said if not text.startswith("note: the first of")] == [
        text for start in starts for text in said if text.startswith(start)
    ]
    assert len(said) >= len(starts)


def test_quiet_is_a_level(train: Train) -> None:
    with pytest.raises(sft.UsageError, match=r"^quiet is log_level warning, and log_level is error; leave one of"):
        train(quiet=True, log_level="error")
    with pytest.raises(sft.UsageError, match=r"^json_logs: expected one of true, false, stderr, got 'file'\.$"):
        train(json_logs="file")


def test_events(train: Train, tmp_path: Path) -> None:
    """One JSON object a line. Those of steps and evaluations have what metrics.jsonl has."""
    said: list[str] = []
    summary = train(
        say=said.append,
        json_logs=True,
        max_steps=2,
        logging_steps=1,
        power=2,
        evaluation_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=2,
    )
    events = [json.loads(line) for line in said]
    assert all("\n" not in line and line.isascii() for line in said)
    times = [datetime.fromisoformat(event.pop("time")) for event in events]
    assert times == sorted(times)
    assert {event["level"] for event in events} == {"info", "warning"}
    assert all(event["text"] for event in events if event["event"] in ("line", "note"))
    (plan,) = [event for event in events if event["event"] == "plan"]
    assert plan["parameters"] == summary.total_parameters
    assert plan["steps"]["total"] == 2
    told = [event for event in events if event["event"] in ("step", "evaluation")]
    lines = read_metrics(tmp_path / "out")
    by_step = {(line["step"], "loss" in line): line for line in lines}
    assert {(event["step"], event["event"] == "step") for event in told} == set(by_step)
    for event in told:
        line = by_step[event["step"], event["event"] == "step"]
        assert {key: event[key] for key in line} == line
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [2]


def test_what_looks_like_a_secret_is_masked_and_no_number_is_lost() -> None:
    from sft.voice import event_line

    line = event_line(
        "note", {"text": 'see https://me:pw@host/?token=abc\\"x', "loss": float("nan"), "n": [1.5]}, "info"
    )
    found = json.loads(line)
    assert found["text"].startswith("see https://***@host/")
    assert (found["loss"], found["n"]) == (None, [1.5])


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_command_logs_events_to_its_end(models: Path, dataset: Path, tmp_path: Path, stream: str) -> None:
    """The last one is the summary, with what run.json has; or the error, with the exit code."""
    line = [*arguments(models, dataset, tmp_path / "out"), "--json_logs", "true" if stream == "stdout" else "stderr"]
    done = command(*line)
    assert done.returncode == 0, done.stderr
    events = [json.loads(text) for text in getattr(done, stream).splitlines() if text.startswith("{")]
    assert [text for text in done.stdout.splitlines() if not text.startswith("{")] == []
    result = json.loads((tmp_path / "out" / "run.json").read_text())["result"]
    assert {key: events[-1][key] for key in result} == result
    failed = command(*line)
    assert failed.returncode == 2
    last = json.loads(getattr(failed, stream).splitlines()[-1])
    assert (last["event"], last["level"], last["exit_code"]) == ("error", "error", 2)
    assert "already holds a run" in last["text"]
    assert failed.stderr.startswith("sft: output_dir ") == (stream == "stdout")


@pytest.mark.slow
def test_a_quiet_command_says_one_line(models: Path, dataset: Path, tmp_path: Path) -> None:
    done = command(*arguments(models, dataset, tmp_path / "out")[:-2], "--quiet")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("done: dev loss ")
    assert line.endswith(f"written to {tmp_path / 'out'}")
    silent = command(*arguments(models, dataset, tmp_path / "silent"), "--log_level", "error")
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")

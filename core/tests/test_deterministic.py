"""Setting ``deterministic``: what it sets on a GPU, which is a stub here, and that a run is held to it anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft import deterministic
from sft.files import read_report
from sft.training.manifest import write_manifest


@pytest.fixture
def flags(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Those of a paddle with CUDA, but for one that it does not have."""
    known: dict[str, Any] = {"FLAGS_cudnn_deterministic": False, "FLAGS_embedding_deterministic": 2}
    monkeypatch.setattr(paddle.base.core, "globals", lambda: known)
    monkeypatch.setattr(paddle, "get_flags", lambda names: {name: known[name] for name in names})
    monkeypatch.setattr(paddle, "set_flags", known.update)
    return known


def test_a_gpu_gets_what_it_needs_and_is_afterwards_as_it_was(
    flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    before = dict(flags)
    with deterministic.repeatable(True):
        deterministic.switch_on({"device": "gpu:0", "dynamic_threads": True})
        assert flags == {"FLAGS_cudnn_deterministic": True, "FLAGS_embedding_deterministic": 1}
        assert deterministic.flags_in_effect() == flags
        assert (os.environ["NVIDIA_TF32_OVERRIDE"], os.environ["NCCL_ALGO"]) == ("0", "Tree")
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert flags == before
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    assert os.environ["NCCL_ALGO"] == "Tree"
    with deterministic.repeatable(False):
        assert "NVIDIA_TF32_OVERRIDE" not in os.environ


def test_a_cpu_whose_threads_come_and_go_is_refused(paddle: Any) -> None:
    with pytest.raises(sft.UsageError, match=r"^deterministic: OpenMP may choose .* unset OMP_DYNAMIC"):
        deterministic.switch_on({"device": "cpu", "dynamic_threads": True})
    deterministic.switch_on({"device": "cpu", "dynamic_threads": False})


def test_a_run_is_checked_and_learns_what_it_would_without(
    train: Callable[..., Any], metrics: Callable[..., Any], tmp_path: Path
) -> None:
    """Plugins hear of no micro-batch that nothing is learned from, and dropout draws as ever."""
    heard: list[int] = []

    class Hears(sft.Plugin):
        name = "hears"
        api_version = 1

        @sft.hookimpl
        def sft_micro_batch(self, run: sft.Run, batch: sft.Batch) -> None:
            heard.append(run.step)

    settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    train("plain", **settings)
    said: list[str] = []
    train("checked", (Hears,), deterministic=True, say=said.append, **settings)
    assert "deterministic: the first micro-batch was computed twice, with the same bits" in said
    assert heard == [0, 0, 1, 1]
    assert metrics(tmp_path / "checked", same=True) == metrics(tmp_path / "plain", same=True)
    assert json.loads((tmp_path / "checked" / "run.json").read_text())["settings"]["deterministic"] is True


def test_what_does_not_repeat_is_named(train: Callable[..., Any]) -> None:
    """An attention whose last bits are random, as those of kernels that add in any order."""
    from sft.models.attention import DefaultAttention

    generator = np.random.default_rng(0)

    class Shaky(DefaultAttention):
        def attend(self, *arguments: Any, **more: Any) -> Any:
            return super().attend(*arguments, **more) * (1 + 1e-6 * generator.random())

    class Plugin(sft.Plugin):
        name = "shaky"
        api_version = 1

        @sft.hookimpl
        def sft_attention_backend(self, run: sft.Run, config: Any) -> Any:
            return Shaky()

    with pytest.raises(sft.SftError, match=r"not the same to the last bit; here .* is the first of \d+ that differ"):
        train("shaky", (Plugin,), max_steps=1, deterministic=True)
    train("unchecked", (Plugin,), max_steps=1)


def test_strict_refuses_a_checkpoint_of_another_arithmetic(train: Callable[..., Any], tmp_path: Path) -> None:
    """Otherwise a line says so, and run.json, and the checkpoints that come of it."""
    settings = {"save_strategy": "steps", "save_steps": 1, "deterministic": "strict"}
    train("first", max_steps=1, **settings)
    path = tmp_path / "first" / "checkpoint-1" / "trainer" / "state.json"
    state = json.loads(path.read_text())
    state["arithmetic"]["threads"] = 77
    path.write_text(json.dumps(state))
    write_manifest(path.parents[1])
    resumed = {"max_steps": 2, "resume_from_checkpoint": str(tmp_path / "first" / "checkpoint-1")}
    refusal = (
        r"^deterministic strict: checkpoint-1 was computed with another arithmetic, threads 77 \(now \d+\); compute"
    )
    for measures in ({}, {"do_train": False}):
        with pytest.raises(sft.UsageError, match=refusal):
            train("second", **settings, **resumed, **measures)
    assert not (tmp_path / "second").exists()
    said: list[str] = []
    train("third", say=said.append, **{**settings, "deterministic": True}, **resumed)
    (note,) = [line for line in said if "another arithmetic" in line]
    assert note.startswith("note: checkpoint-1 was computed with another arithmetic, threads 77 (now ")
    (found,) = read_report(tmp_path / "third")["other_arithmetic"]
    assert (found["step"], found["from"]) == (1, "checkpoint-1")
    assert found["differences"].startswith("threads 77 (now ")
    later = {"max_steps": 3, "resume_from_checkpoint": "auto"}
    train("third", **{**settings, "deterministic": True}, **later)
    assert read_report(tmp_path / "third")["other_arithmetic"] == [found]


def test_strict_refuses_a_checkpoint_that_does_not_say(train: Callable[..., Any], tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    train("first", max_steps=1, **settings)
    folder = tmp_path / "first" / "checkpoint-1"
    path = folder / "trainer" / "state.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "arithmetic"}))
    write_manifest(folder)
    resumed = {"max_steps": 2, "resume_from_checkpoint": str(folder)}
    with pytest.raises(sft.UsageError, match=r"^deterministic strict: checkpoint-1 does not say with which arithmetic"):
        train("second", deterministic="strict", **resumed)
    assert not (tmp_path / "second").exists()
    train("second", deterministic=True, **resumed)


def test_a_run_that_is_repeated_is_held_against_what_it_replaces(train: Callable[..., Any], tmp_path: Path) -> None:
    train("out", max_steps=1)
    path = tmp_path / "out" / "run.json"
    report = json.loads(path.read_text())
    assert "other_arithmetic" not in report
    changed = {**report, "arithmetic": {**report["arithmetic"], "cores": 5000, "processes_differ": True}}
    path.write_text(json.dumps(changed))
    again = {"overwrite_output_dir": True, "max_steps": 1}
    with pytest.raises(sft.UsageError, match=r"^deterministic strict: the run that .* holds was .* cores 5000 \(now"):
        train("out", deterministic="strict", **again)
    assert json.loads(path.read_text()) == changed
    said: list[str] = []
    train("out", say=said.append, learning_rate=1e-4, **again)  # another run, which repeats nothing
    assert not [line for line in said if "another arithmetic" in line]
    path.write_text(json.dumps(changed))
    train("out", say=said.append, **again)
    assert len([line for line in said if "another arithmetic" in line]) == 1
    assert json.loads(path.read_text())["other_arithmetic"][0]["step"] == 0


def test_processes_of_unlike_machines_are_noticed(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process has a greater digest."""
    from sft.training.strategy import SingleProcess

    monkeypatch.setattr("sft.arithmetic.digest", lambda found: 65_000)
    monkeypatch.setattr(SingleProcess, "largest", lambda self, value: 65_001 if value == 65_000 else value)
    said: list[str] = []
    train("out", say=said.append, max_steps=1)
    assert any("the processes of this run have different processors" in line for line in said)
    with pytest.raises(sft.UsageError, match="the processes of this run have different processors"):
        train("other", max_steps=1, deterministic="strict")


def test_strict_is_one_of_three_words(train: Callable[..., Any]) -> None:
    with pytest.raises(sft.UsageError, match="deterministic: expected one of true, false, strict, got 'exact'"):
        train("out", deterministic="exact")

"""Checkpoints: a run that was stopped and resumed is, bit by bit, the run that was never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]

needs_lora = pytest.mark.skipif(find_spec("sft_peft_lora") is None, reason="plugin lora is not installed")
LORA = {"plugin": ["lora"], "lora_dropout": 0.3}
KINDS = [pytest.param({}, id="full"), pytest.param(LORA, id="lora-dropout", marks=needs_lora)]

# 8 steps an epoch; a line every 4 steps, a checkpoint every 3; everything that could be forgotten is in play.
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 13,
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "evaluation_strategy": "steps",
    "eval_steps": 5,
}


class StoppedError(Exception):
    """The end of the process, as it were."""


def stopping(step: int) -> type[sft.Plugin]:
    """A plugin that ends the run after ``step``."""

    class Stop(sft.Plugin):
        name = "stop"

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] == step:
                raise StoppedError

    return Stop


def stop(train: Train, step: int, name: str = "out", plugins: tuple[type, ...] = (), **settings: Any) -> None:
    with pytest.raises(StoppedError):
        train(name, (*plugins, stopping(step)), **settings)


def watching(steps: list[int]) -> type[sft.Plugin]:
    """A plugin that writes down which steps were really done."""

    class Watch(sft.Plugin):
        name = "watch"

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            steps.append(record["step"])

    return Watch


def contents(folder: Path, without: tuple[str, ...] = ("metrics.jsonl", "run.json", "state.json")) -> dict[str, bytes]:
    """Every file under ``folder`` but those that hold times or paths."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


def checkpoints_of(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs stand that several tests compare with or begin from."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def whole(train: Train, shared: Path) -> Callable[..., Path]:
    """The run of SETTINGS that was never stopped, full or with ``LORA``; not to be changed."""

    def get(kind: dict[str, Any] | None = None) -> Path:
        folder = shared / ("whole-lora" if kind else "whole")
        if not folder.exists():
            train(str(folder), **SETTINGS, **(kind or {}))
        return folder

    return get


@pytest.fixture
def stopped(train: Train, shared: Path, tmp_path: Path) -> Path:
    """A copy of the run of SETTINGS that was stopped after step 5, with a checkpoint of step 3."""
    if not (shared / "stopped").exists():
        stop(train, 5, str(shared / "stopped"), **SETTINGS)
    return shutil.copytree(shared / "stopped", tmp_path / "out")


# --- resuming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stopped_at", "first"), [(5, 4), (11, 10), (13, 13)], ids=["epoch-1", "epoch-2", "last-step"])
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


@needs_lora
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
    command = [sys.executable, "-c", "from sft.commands import main; main()", "run", str(tmp_path / "settings.json")]
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


# --- what plugins keep --------------------------------------------------------------------------------------


def keeping(log: list[Any]) -> type[sft.Plugin]:
    """A plugin with state of every kind, which changes at every step."""

    class Keep(sft.Plugin):
        name = "keep"

        def __init__(self, options: Any = None) -> None:
            super().__init__(options)
            self.count, self.names = 0, ["start"]
            self.sums, self.table = np.zeros(3), np.zeros((2, 2), np.int32)

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            self.count += 1
            self.names.append(f"step {record['step']}")
            self.sums = self.sums + record["loss"] * np.arange(3)
            self.table = (self.table + record["step"]).T

        @sft.hookimpl
        def sft_state(self, run: sft.Run) -> dict[str, Any]:
            return {"count": self.count, "more": {"names": self.names}, "sums": self.sums, "table": self.table}

        @sft.hookimpl
        def sft_restore(self, run: sft.Run, state: dict[str, Any]) -> None:
            assert set(state) == {"count", "more", "sums", "table"}
            log.append((state["sums"].dtype, state["table"].dtype, state["table"].shape))
            self.count, self.names = state["count"], state["more"]["names"]
            self.sums, self.table = state["sums"], state["table"]

        @sft.hookimpl
        def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
            log.append((self.count, self.names, self.sums.tolist(), self.table.tolist()))

    return Keep


def test_a_plugin_gets_its_state_back(train: Train) -> None:
    expected: list[Any] = []
    unfinished: list[Any] = []
    resumed: list[Any] = []
    settings = {**SETTINGS, "max_steps": 6}
    train("whole", (keeping(expected),), **settings)
    stop(train, 5, "out", (keeping(unfinished),), **settings)
    train("out", (keeping(resumed),), resume_from_checkpoint="auto", **settings)
    assert unfinished == []
    assert resumed == [(np.dtype(np.float64), np.dtype(np.int32), (2, 2)), *expected]
    assert expected[0][0] == 6


def test_plugins_do_not_see_each_others_state(train: Train) -> None:
    seen: dict[str, list[Any]] = {"one": [], "one-more": [], "silent": []}

    def plugin(called: str, state: dict[str, Any] | None) -> type[sft.Plugin]:
        class Keep(sft.Plugin):
            name = called

            @sft.hookimpl
            def sft_state(self, run: sft.Run) -> dict[str, Any] | None:
                return state

            @sft.hookimpl
            def sft_restore(self, run: sft.Run, state: dict[str, Any]) -> None:
                seen[called].append(state)

        return Keep

    plugins = (plugin("one", {"x": 1}), plugin("one-more", {"x": 2}), plugin("silent", None))
    stop(train, 4, "out", plugins, **SETTINGS)
    train("out", plugins, resume_from_checkpoint="auto", **{**SETTINGS, "max_steps": 4})
    assert seen == {"one": [{"x": 1}], "one-more": [{"x": 2}], "silent": []}


# --- what a checkpoint is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_safetensors_and_json_under_structured_names(
    train: Train, whole: Any, kind: dict[str, Any]
) -> None:
    """No pickle; and nothing of paddle's own names (linear_0.w_0), which differ from process to process."""
    folder = whole(kind) / "checkpoint-3"
    trainer = folder / "trainer"
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".safetensors", ".json", ".jinja"}
    names = {"optimizer.safetensors", "plugins.safetensors", "state.json"}
    assert {path.name for path in trainer.iterdir()} == (names | {"trainable.safetensors"} if kind else names)
    projections = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    projections += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    linears = [f"llama.layers.{n}.{name}" for n in (0, 1) for name in projections]
    if kind:
        trained = {f"{name}.lora_{half}" for name in linears for half in "AB"}
        assert set(load_file(trainer / "trainable.safetensors")) == trained
        assert (folder / "adapter_model.safetensors").is_file()
        assert not (folder / "model.safetensors").exists()
    else:
        norms = [f"llama.layers.{n}.{name}_layernorm" for n in (0, 1) for name in ("input", "post_attention")]
        trained = {f"{name}.weight" for name in [*linears, *norms, "llama.norm", "llama.embed_tokens"]}
        assert (folder / "model.safetensors").is_file()
    kinds = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")
    assert set(load_file(trainer / "optimizer.safetensors")) == {f"{name}.{kind}" for name in trained for kind in kinds}
    state = json.loads((trainer / "state.json").read_text())
    assert (state["format"], state["step"], state["random"]) == (1, 3, {"seed": 42, "step": 3})
    assert state["settings"]["save_steps"] == 3


def test_a_checkpoint_of_a_whole_model_is_a_model_directory(train: Train, tmp_path: Path) -> None:
    train(**{**SETTINGS, "max_steps": 3})
    final, folder = (contents(path) for path in (tmp_path / "out", tmp_path / "out" / "checkpoint-3"))
    assert {name: data for name, data in final.items() if "/" not in name} == {
        name: data for name, data in folder.items() if "/" not in name
    }
    summary = train("next", model_name_or_path=str(tmp_path / "out" / "checkpoint-3"), max_steps=1)
    assert summary.steps == 1


@pytest.mark.parametrize(("limit", "left"), [(1, [6]), (2, [4, 6]), (None, [2, 4, 6])])
def test_the_oldest_checkpoints_go(train: Train, tmp_path: Path, limit: int | None, left: list[int]) -> None:
    train(save_total_limit=limit, **{**SETTINGS, "save_steps": 2, "max_steps": 7})
    assert checkpoints_of(tmp_path / "out") == [f"checkpoint-{step}" for step in left]
    assert not list((tmp_path / "out").glob(".staging*"))


def test_checkpoints_at_the_end_of_epochs(train: Train, tmp_path: Path) -> None:
    train(**{**SETTINGS, "save_strategy": "epoch", "save_steps": 500, "per_device_train_batch_size": 6, "max_steps": 7})
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-3", "checkpoint-6"]  # 30 records in steps of 12


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    from sft.training.checkpoint import checkpoints, find_checkpoint

    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "checkpoint-x", "checkpoint-11-old", ".staging-9"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-200").touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert find_checkpoint("auto", tmp_path) == tmp_path / "checkpoint-100"
    assert find_checkpoint("True", tmp_path) == tmp_path / "checkpoint-100"
    assert find_checkpoint("false", tmp_path) is None
    assert find_checkpoint(None, tmp_path) is None
    assert find_checkpoint("auto", tmp_path / "nowhere") is None


def test_what_was_half_written_is_ignored_and_removed(
    train: Train, metrics: Metrics, whole: Any, stopped: Path
) -> None:
    out = stopped
    shutil.copytree(out / "checkpoint-3", out / ".staging-checkpoint-6")
    (out / ".staging-checkpoint-6" / "trainer" / "state.json").write_text('{"format": 1, "st')
    shutil.copytree(out / "checkpoint-3", out / ".staging-removed-checkpoint-0")
    (out / ".staging-result").mkdir()
    (out / ".staging-run.json").write_text("{")
    train(resume_from_checkpoint="auto", **SETTINGS)
    assert not list(out.glob(".staging*"))
    assert metrics(out, same=True) == metrics(whole(), same=True)
    assert contents(out) == contents(whole())


def test_a_checkpoint_that_could_not_be_written_is_not_there(train: Train, tmp_path: Path) -> None:
    """The model is written by the time a plugin's state is asked for; still no folder appears."""

    class Broken(sft.Plugin):
        name = "broken"

        @sft.hookimpl
        def sft_state(self, run: sft.Run) -> dict[str, Any]:
            if run.output_dir.joinpath("checkpoint-3").exists():
                raise OSError("No space left on device")
            return {}

    with pytest.raises(OSError, match="No space left"):
        train(plugins=(Broken,), **SETTINGS)
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-3"]
    assert not list((tmp_path / "out").glob(".staging*"))


# --- what cannot be resumed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name_or_path": "other.json"}, "was trained on other tokens"),
        ({"max_length": 45}, "was trained on other tokens"),
        ({"seed": 7}, "was trained with seed 42 and 4 rows a step, this run has seed 7 and 4"),
        ({"per_device_train_batch_size": 4}, "was trained with seed 42 and 4 rows a step, this run has seed 42 and 8"),
        ({"gradient_accumulation_steps": 1}, "4 rows a step, this run has seed 42 and 2"),
    ],
    ids=["data", "length", "seed", "batch", "accumulation"],
)
def test_what_would_not_be_the_same_run_is_refused(
    train: Train, dataset: Path, tmp_path: Path, stopped: Path, changes: dict[str, Any], message: str
) -> None:
    """And the run that could go on with other settings is left as it is."""
    if "dataset_name_or_path" in changes:
        lines = (dataset / "train.json").read_text().splitlines()
        changes = {
            "dataset_name_or_path": str(tmp_path / "other.json"),
            "evaluation_strategy": "no",
            "eval_steps": None,
        }
        (tmp_path / "other.json").write_text("\n".join(reversed(lines)))
    before = contents(stopped, without=())
    with pytest.raises(sft.UsageError, match=message):
        train(resume_from_checkpoint="auto", **{**SETTINGS, **changes})
    assert contents(stopped, without=()) == before


def test_the_same_rows_in_other_micro_batches_may_go_on(train: Train, metrics: Metrics, stopped: Path) -> None:
    said: list[str] = []
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    summary = train(resume_from_checkpoint="auto", say=said.append, **{**SETTINGS, **changes})
    assert summary.steps == 13
    assert "note: per_device_train_batch_size was 2 in checkpoint-3 and is now 4" in said


def test_other_settings_may_change_and_are_said(train: Train, stopped: Path) -> None:
    said: list[str] = []
    changes = {"learning_rate": 3e-4, "logging_steps": 5, "disable_tqdm": False}
    train(resume_from_checkpoint="auto", say=said.append, **{**SETTINGS, **changes})
    assert [line for line in said if line.startswith("note: ")] == [
        "note: learning_rate was 0.001 in checkpoint-3 and is now 0.0003",
        "note: logging_steps was 4 in checkpoint-3 and is now 5",
        "note: plugin was ['stop'] in checkpoint-3 and is now []",
    ]
    assert f"resuming from {stopped / 'checkpoint-3'} after step 3" in said


def test_nothing_is_said_where_nothing_changed(train: Train, stopped: Path) -> None:
    said: list[str] = []

    class Stop(sft.Plugin):  # active in the stopped run, so it must be here
        name = "stop"

    train(plugins=(Stop,), resume_from_checkpoint="auto", say=said.append, **SETTINGS)
    assert not [line for line in said if line.startswith("note: ")]


@needs_lora
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 4}, r"down_proj\.lora_A: \[48, 8\] there, \[48, 4\] in this run"),
        ({"lora_target_modules": ["q_proj"]}, r"down_proj\.lora_A: \[48, 8\] there, none in this run"),
    ],
)
def test_other_trainable_parameters_are_refused(
    train: Train, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    stop(train, 4, **SETTINGS, **LORA)
    before = contents(tmp_path / "out", without=())
    with pytest.raises(sft.UsageError, match=rf"was trained with other parameters .*{message}"):
        train(resume_from_checkpoint="auto", **SETTINGS, **{**LORA, **changes})
    assert contents(tmp_path / "out", without=()) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"state\.json cannot be read"),
        ('{"format": 1, "step": 3, "epo', r"state\.json cannot be read"),
        ("[]", r"state\.json is not the state of a run"),
        ("{}", r"state\.json is not the state of a run"),
        ('{"format": 99}', r"written by another version of sft \(format 99\)"),
    ],
    ids=["empty", "cut-off", "list", "bare", "version"],
)
def test_a_damaged_state_is_named(train: Train, stopped: Path, text: str, message: str) -> None:
    (stopped / "checkpoint-3" / "trainer" / "state.json").write_text(text)
    before = contents(stopped, without=())
    with pytest.raises(sft.UsageError, match=message):
        train(resume_from_checkpoint="auto", **SETTINGS)
    assert contents(stopped, without=()) == before


def test_a_folder_that_is_no_checkpoint_is_refused(train: Train, models: Path, tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match=r"llama-untied is not a checkpoint of sft \(no trainer/state\.json\)"):
        train(resume_from_checkpoint=str(models / "llama-untied"))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_folder_may_be_given_from_where_one_stands(
    train: Train, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stopped)
    steps: list[int] = []
    train(plugins=(watching(steps),), resume_from_checkpoint="checkpoint-3", **SETTINGS)
    assert steps == list(range(4, 14))
    assert os.listdir(stopped).count("checkpoint-12") == 1


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


def test_a_diverged_run_stops_with_a_sentence_and_valid_lines(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    with pytest.raises(sft.SftError, match=r"no longer finite at step \d+ .*lower learning_rate"):
        train(**{**SETTINGS, "learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": 0, "logging_steps": 1})
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "running"
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path / "out") if "loss" in line)


def test_what_is_written_may_be_read_by_whom_the_umask_lets(train: Train, tmp_path: Path) -> None:
    import os

    before = os.umask(0o027)
    try:
        train(**{**SETTINGS, "max_steps": 3})
    finally:
        os.umask(before)
    files = list((tmp_path / "out").rglob("*.safetensors"))
    assert len(files) >= 4
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}

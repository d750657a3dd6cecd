"""Checkpoints: what is in one, when it is written, and what plugins keep in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from stopped_runs import KINDS, SETTINGS, checkpoints_of, contents, stop

import sft

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]

# --- what a checkpoint is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_safetensors_and_json_under_structured_names(
    train: Train, whole: Any, kind: dict[str, Any]
) -> None:
    """No pickle; and nothing of paddle's own names (linear_0.w_0), which differ from process to process."""
    folder = whole(kind) / "checkpoint-3"
    trainer = folder / "trainer"
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".safetensors", ".json", ".jinja"}
    names = {"manifest.json", "optimizer.safetensors", "plugins.safetensors", "state.json"}
    assert {path.name for path in trainer.iterdir()} == names
    projections = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    projections += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    linears = [f"model.layers.{n}.{name}" for n in (0, 1) for name in projections]
    if kind:
        trained = {f"{name}.lora_{half}" for name in linears for half in "AB"}
        assert (folder / "adapter_model.safetensors").is_file()
        assert not (folder / "model.safetensors").exists()
    else:
        norms = [f"model.layers.{n}.{name}_layernorm" for n in (0, 1) for name in ("input", "post_attention")]
        trained = {f"{name}.weight" for name in [*linears, *norms, "model.norm", "model.embed_tokens"]}
        assert (folder / "model.safetensors").is_file()
    kinds = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")
    assert set(load_file(trainer / "optimizer.safetensors")) == {f"{name}.{kind}" for name in trained for kind in kinds}
    state = json.loads((trainer / "state.json").read_text())
    assert (state["format"], state["step"], state["seed"]) == (4, 3, 42)
    assert set(state["in_adapter"]["trainable"]) == (trained if kind else set())
    assert state["settings"]["save_steps"] == 3


def test_a_checkpoint_of_a_whole_model_is_a_model_directory(train: Train, tmp_path: Path) -> None:
    train(**{**SETTINGS, "max_steps": 3})
    final, folder = (contents(path) for path in (tmp_path / "out", tmp_path / "out" / "checkpoint-3"))
    assert {
        name: data for name, data in final.items() if "/" not in name and name not in ("steps.bin", "rows.json")
    } == {name: data for name, data in folder.items() if "/" not in name}
    summary = train("next", model_name_or_path=str(tmp_path / "out" / "checkpoint-3"), max_steps=1)
    assert summary.steps == 1


@pytest.mark.parametrize(("limit", "left"), [(1, [6]), (2, [4, 6]), (None, [2, 4, 6])])
def test_the_oldest_checkpoints_go(train: Train, tmp_path: Path, limit: int | None, left: list[int]) -> None:
    train(save_total_limit=limit, **{**SETTINGS, "save_steps": 2, "max_steps": 7})
    assert checkpoints_of(tmp_path / "out") == [f"checkpoint-{step}" for step in left]
    assert not list((tmp_path / "out").glob(".staging*"))


def test_checkpoints_at_the_end_of_epochs(train: Train, tmp_path: Path) -> None:
    train(**{**SETTINGS, "save_strategy": "epoch", "save_steps": 500, "per_device_train_batch_size": 6, "max_steps": 7})
    # 30 records in steps of 12; an epoch that the last step cuts short ends there.
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    from sft.training.checkpoint_folder import checkpoints, find_checkpoint

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
        api_version = 1

        @sft.hookimpl
        def sft_state(self, run: sft.Run) -> dict[str, Any]:
            if run.output_dir.joinpath("checkpoint-3").exists():
                raise OSError("No space left on device")
            return {}

    with pytest.raises(sft.PluginError, match=r"failed in sft_state \(OSError: No space left"):
        train(plugins=(Broken,), **SETTINGS)
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-3"]
    assert not list((tmp_path / "out").glob(".staging*"))


def test_what_is_written_may_be_read_by_whom_the_umask_lets(train: Train, tmp_path: Path) -> None:

    before = os.umask(0o027)
    try:
        train(**{**SETTINGS, "max_steps": 3})
    finally:
        os.umask(before)
    files = list((tmp_path / "out").rglob("*.safetensors"))
    assert len(files) >= 4
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


# --- what plugins keep --------------------------------------------------------------------------------------


def keeping(log: list[Any]) -> type[sft.Plugin]:
    """A plugin with state of every kind, which changes at every step."""

    class Keep(sft.Plugin):
        name = "keep"
        api_version = 1

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
            api_version = 1

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

"""Checkpoints that a run cannot go on from, and settings that may differ from those of the stopped run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stopped_runs import LORA, SETTINGS, contents, stop, watching

import sft
from sft.plugins.requests import by_device
from sft.testing import needs
from sft.training.checkpoint_folder import read_state
from sft.training.resume_checks import check_agreed
from sft.training.strategy import SingleProcess

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]


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
    always = list(by_device({}))  # what is installed for this device, in every run
    changes = {"learning_rate": 3e-4, "logging_steps": 5, "disable_tqdm": False}
    train(resume_from_checkpoint="auto", say=said.append, **{**SETTINGS, **changes})
    assert [line for line in said if line.startswith("note: ")] == [
        "note: learning_rate was 0.001 in checkpoint-3 and is now 0.0003",
        "note: logging_steps was 4 in checkpoint-3 and is now 5",
        f"note: plugin was {['stop', *always]} in checkpoint-3 and is now {always}",
    ]
    assert f"resuming from {stopped / 'checkpoint-3'} after step 3" in said


def test_nothing_is_said_where_nothing_changed(train: Train, stopped: Path) -> None:
    said: list[str] = []

    class Stop(sft.Plugin):  # active in the stopped run, so it must be here
        name = "stop"
        api_version = 1

    train(plugins=(Stop,), resume_from_checkpoint="auto", say=said.append, **SETTINGS)
    assert not [line for line in said if line.startswith("note: ")]


@needs("lora", "rslora")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 4}, "with lora_rank 8 of plugin lora, and this run has 4"),
        (
            {"lora_target_modules": ["q_proj"]},
            r"with lora_target_modules \[\] of plugin lora, .* \['q_proj'\]",
        ),
        ({"lora_alpha": 4}, r"with lora_alpha None of plugin lora, and this run has 4\.0"),
        ({"plugin": ["lora", "rslora"]}, "with plugins lora, and this run has lora, rslora"),
        ({"plugin": []}, "with plugins lora, and this run has none"),
    ],
)
def test_other_shaping_plugins_and_options_are_refused(
    train: Train, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    stop(train, 4, **SETTINGS, **LORA)
    before = contents(tmp_path / "out", without=())
    kept = {} if changes.get("plugin") == [] else LORA
    with pytest.raises(sft.UsageError, match=rf"was trained {message}; resume with the same"):
        train(resume_from_checkpoint="auto", **{**SETTINGS, **kept, **changes})
    assert contents(tmp_path / "out", without=()) == before


@needs("lora")
@pytest.mark.parametrize("training", [True, False], ids=["resumed", "measured"])
def test_a_refinement_that_requires_nothing_is_refused_when_it_is_gone(
    train: Train, tmp_path: Path, training: bool
) -> None:
    """It answers another plugin's question, and so decides what is learned."""

    class Doubled(sft.Plugin):
        name = "doubled"
        api_version = 1

        @sft.hookimpl
        def lora_scaling(self, rank: int, alpha: float) -> float:
            return 2 * alpha / rank

    train(plugins=(Doubled,), **{**SETTINGS, **LORA, "max_steps": 3})
    changes = {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-3"), "do_train": training}
    with pytest.raises(sft.UsageError, match="was trained with plugins doubled, lora, and this run has lora"):
        train("again", **{**SETTINGS, **LORA, **changes})


def test_other_trainable_parameters_are_refused(train: Train, tmp_path: Path) -> None:
    """A plugin that trains other layers than before, without an option that says so."""

    def training(*names: str) -> type[sft.Plugin]:
        class Only(sft.Plugin):
            name = "only"
            api_version = 1

            @sft.hookimpl
            def sft_adapt_model(self, run: sft.Run, model: Any) -> None:
                for name, parameter in model.named_parameters():
                    parameter.stop_gradient = not name.endswith(names)

            @sft.hookimpl
            def sft_export_adapter(self, run: sft.Run, model: Any) -> sft.AdapterFiles:
                trained = {n: p.numpy() for n, p in model.named_parameters() if not p.stop_gradient}
                return sft.AdapterFiles({"peft_type": "ONLY"}, trained)

        return Only

    train(plugins=(training("q_proj.weight"),), **SETTINGS)
    message = r"was trained with other parameters .*k_proj\.weight: none there, \[32, 16\] in this run"
    with pytest.raises(sft.UsageError, match=message):
        train(plugins=(training("k_proj.weight"),), resume_from_checkpoint="auto", **{**SETTINGS, "max_steps": 14})


@needs("lora", "flashmask")
def test_an_attention_backend_may_come_and_go(train: Train, tmp_path: Path) -> None:
    """It is how something is computed, not what."""
    stop(train, 4, **SETTINGS, **LORA)
    train(resume_from_checkpoint="auto", **{**SETTINGS, **LORA, "plugin": ["lora", "flashmask"]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"state\.json cannot be read"),
        ('{"format": 1, "step": 3, "epo', r"state\.json cannot be read"),
        ("[]", r"state\.json is not the state of a run"),
        ("{}", r"state\.json is not the state of a run"),
        ('{"format": 99}', r"written by another version of sft \(format 99\)"),
        ('{"format": 3, "date": 3}', r"state\.json holds an int as date"),
        ('{"format": 3, "step": 3, "seed": 1}', r"state\.json is not complete"),
        ("[" * 100_000, r"state\.json cannot be read"),
    ],
    ids=["empty", "cut-off", "list", "bare", "version", "type", "few", "deep"],
)
def test_a_damaged_state_is_named(train: Train, stopped: Path, text: str, message: str) -> None:
    """Where there is no manifest, as earlier versions wrote none."""
    (stopped / "checkpoint-3" / "trainer" / "state.json").write_text(text)
    (stopped / "checkpoint-3" / "trainer" / "manifest.json").unlink()
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


def test_a_run_that_does_not_ask_to_resume_loses_nothing(train: Train, tmp_path: Path) -> None:
    """``resume_from_checkpoint false`` beside checkpoints of a stopped run: refused, and they are still there."""
    stop(train, 4, **SETTINGS)
    before = contents(tmp_path / "out", without=())
    for value in (False, "false"):
        with pytest.raises(sft.UsageError, match="already holds a run"):
            train(resume_from_checkpoint=value, **SETTINGS)
    assert contents(tmp_path / "out", without=()) == before


@pytest.mark.parametrize("key", ["step", "data", "data.place", "loss_scale.value", "journal.lines", "best", "date"])
def test_a_state_of_another_type_is_named(stopped: Path, key: str) -> None:
    """Where there is no manifest, by which it would be noticed."""
    path = stopped / "checkpoint-3" / "trainer" / "state.json"
    state = json.loads(path.read_text())
    state["format"] = 3
    *above, name = key.split(".")
    (state[above[0]] if above else state)[name] = ["?"]
    path.write_text(json.dumps(state))
    with pytest.raises(sft.UsageError, match=rf"state\.json holds a list as {key}; resume from another"):
        read_state(path.parents[1])


@pytest.mark.parametrize("values", [np.zeros(3, np.int64), np.zeros(3, bool), np.array([1, np.nan, 1], np.float32)])
def test_weights_that_no_training_writes_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    """Where there is no manifest; read as they are they would train on."""
    from sft.training.checkpoint import _load_trainable

    strategy, parameter = SingleProcess(), paddle_parameter(3)
    with pytest.raises(sft.UsageError, match=r"holds values as w that no training writes"):
        _load_trainable(strategy, {"w": parameter}, {"w": values}, tmp_path)
    _load_trainable(strategy, {"w": parameter}, {"w": np.array([1, 2, 3], np.float32)}, tmp_path)
    assert parameter.tolist() == [1, 2, 3]


def paddle_parameter(size: int) -> Any:
    import paddle

    return paddle.create_parameter([size], "float32")


@pytest.mark.parametrize(("steps", "agree"), [((3.0, 3.0), True), ((3.0, 6.0), False), ((6.0, 3.0), False)])
def test_processes_that_find_different_checkpoints_do_not_go_on(steps: tuple[float, float], agree: bool) -> None:
    """One of them may not be able to read what another one can."""

    class Two(SingleProcess):
        def largest(self, value: float) -> float:
            return max(value, steps[1] if value > 0 else -steps[1])

    run: Any = SimpleNamespace(strategy=Two(), step=int(steps[0]))
    if agree:
        check_agreed(run)
        return
    with pytest.raises(sft.UsageError, match=r"would go on from different checkpoints, of steps 3 and 6; give all"):
        check_agreed(run)


def test_other_dev_data_is_said(train: Train, dataset: Path, stopped: Path, tmp_path: Path) -> None:
    folder, said = tmp_path / "data", []
    shutil.copytree(dataset, folder)
    lines = (folder / "dev.json").read_text().splitlines()
    (folder / "dev.json").write_text("\n".join(lines[:-1]))
    settings = {**SETTINGS, "max_steps": 4, "resume_from_checkpoint": "auto"}
    train(dataset_name_or_path=str(folder), say=said.append, **settings)
    assert "note: checkpoint-3 measured other dev data, so what was measured before it does not compare" in said

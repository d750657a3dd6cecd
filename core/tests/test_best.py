"""Ending a run with the checkpoint whose evaluation was best."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.settings.arguments import Settings
from sft.settings.best_metric import best_metric
from sft.testing import needs

STEPS = {"save_strategy": "steps", "evaluation_strategy": "steps", "save_steps": 1, "eval_steps": 1}


def judged(losses: list[float], accuracies: list[float] | None = None) -> type[sft.Plugin]:
    """A plugin that measures given dev losses (and accuracies) after steps 1, 2, …; before, what is true."""

    class Judge(sft.Plugin):
        name = "judge"
        api_version = 1

        @sft.hookimpl
        def sft_parallel_strategy(self, run: sft.Run) -> Any:
            from sft.training.strategy import SingleProcess

            class Judging(SingleProcess):
                def scores(self, model: Any, batches: Any, *more: Any) -> list[float]:
                    found = super().scores(model, batches, *more)
                    targets = sum(batch.target_tokens for batch in batches)
                    if not run.step:
                        return found
                    right = accuracies[run.step - 1] * targets if accuracies else found[1]
                    return [losses[run.step - 1] * targets, right]

            return Judging()

    return Judge


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("losses", "greater", "expected"),
    [
        ([3.0, 1.0, 2.0, 4.0], None, 2),
        ([3.0, 1.0, 2.0, 1.0], None, 2),
        ([4.0, 3.0, 2.0, 1.0], None, 4),
        ([3.0, 5.0, 2.0, 4.0], True, 2),
    ],
    ids=["middle", "the earlier of equals", "last", "greater"],
)
@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=needs("lora"))])
def test_the_result_is_the_best_checkpoint(
    train: Callable[..., Any], tmp_path: Path, losses: list[float], greater: bool | None, expected: int, adapter: bool
) -> None:
    more = {"plugin": ["lora"]} if adapter else {}
    train(
        "out", (judged(losses),), max_steps=4, load_best_model_at_end=True, greater_is_better=greater, **STEPS, **more
    )
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    found, wanted = (load_file(tmp_path / "out" / part / weights) for part in ("", f"checkpoint-{expected}"))
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    other = load_file(tmp_path / "out" / f"checkpoint-{expected % 4 + 1}" / weights)
    assert not all(np.array_equal(found[name], other[name]) for name in other)
    result = json.loads((tmp_path / "out" / "run.json").read_text())["result"]
    assert result["eval_loss_after"] == losses[expected - 1]


def test_another_metric_decides(train: Callable[..., Any], tmp_path: Path) -> None:
    """Accuracies that rise and fall while the loss only falls."""
    judge = judged([1.0, 1 / 2, 1 / 3], [0.1, 0.7, 0.3])
    said: list[str] = []
    same: dict[str, Any] = {"max_steps": 3, "load_best_model_at_end": True, "say": said.append, **STEPS}
    train("accuracy", (judge,), metric_for_best_model="accuracy", **same)
    train("loss", (judge,), **same)
    assert [line for line in said if line.startswith("best model")] == [
        "best model: checkpoint-2, eval_accuracy 0.7000",
        "best model: checkpoint-3, eval_loss 0.3333",
    ]


@pytest.mark.parametrize("metric", ["loss", "bleu4"], ids=["gone", "not comparable"])
def test_a_best_model_that_cannot_be_had_is_forgotten(train: Callable[..., Any], tmp_path: Path, metric: str) -> None:
    """Resuming into another folder, or with another idea of what best means."""
    same: dict[str, Any] = {"load_best_model_at_end": True, "lr_scheduler_type": "constant", **STEPS}
    train("one", (judged([1.0, 3.0]),), max_steps=2, **same)
    said: list[str] = []
    source = tmp_path / "one" / "checkpoint-2"
    scores = {"eval_with_do_generation": True, "max_new_tokens": 2} if metric == "bleu4" else {}
    where = "one" if metric == "bleu4" else "two"
    more = {"metric_for_best_model": metric, "resume_from_checkpoint": str(source), **scores}
    train(where, (judged([0, 0, 5.0, 4.0]),), max_steps=4, say=said.append, **same, **more)
    assert any("the best model so far (step 1) is not comparable or not here" in line for line in said)
    assert any(line.startswith("best model: checkpoint-") for line in said)
    assert (tmp_path / where / "model.safetensors").is_file()


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=needs("lora"))], ids=["whole", "adapter"])
@pytest.mark.parametrize("save_steps", [1, 3])
def test_a_best_checkpoint_that_is_damaged_at_the_end(
    train: Callable[..., Any], tmp_path: Path, save_steps: int, adapter: bool
) -> None:
    """The error says where the last weights are: in a checkpoint, or where they have been written instead."""
    best, file = save_steps, "adapter_model.safetensors" if adapter else "model.safetensors"

    class Hurt(sft.Plugin):
        name = "hurt"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] == 4:
                (run.output_dir / f"checkpoint-{best}" / file).write_bytes(b"x")

    losses = [9.0, 9.0, 9.0, 9.0]
    losses[best - 1] = 1.0
    settings = {**STEPS, "save_steps": save_steps, "eval_steps": save_steps, "load_best_model_at_end": True}
    more = {"plugin": ["lora"]} if adapter else {}
    with pytest.raises(sft.SftError) as caught:
        train("out", (judged(losses), Hurt), max_steps=4, **settings, **more)
    message = str(caught.value)
    assert message.startswith("The run cannot end with its best model (")
    assert f"checkpoint-{best} is damaged: {file} has 1 bytes instead of" in message
    before, _, left = message.rpartition(" are in ")
    assert before.endswith("; the weights after its last step, 4,")
    if save_steps == 1:
        assert left == f"{tmp_path / 'out' / 'checkpoint-4'}."
    else:
        assert Path(left).parent == tmp_path / "out"
        train("whole", (judged(losses),), max_steps=4, **{**settings, "load_best_model_at_end": False}, **more)
        assert (Path(left[:-1]) / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"


def test_the_best_checkpoint_outlives_the_limit(train: Callable[..., Any], tmp_path: Path) -> None:
    losses = [1.0, 3.0, 2.0, 4.0]
    train("out", (judged(losses),), max_steps=4, load_best_model_at_end=True, save_total_limit=1, **STEPS)
    assert checkpoints(tmp_path / "out") == ["checkpoint-1", "checkpoint-4"]


def test_a_resumed_run_remembers_the_best(train: Callable[..., Any], tmp_path: Path) -> None:
    same: dict[str, Any] = {"load_best_model_at_end": True, **STEPS}
    train("out", (judged([1.0, 3.0]),), max_steps=2, **same)
    said: list[str] = []
    train("out", (judged([0, 0, 2.0, 4.0]),), max_steps=4, resume_from_checkpoint="auto", say=said.append, **same)
    assert "best model: checkpoint-1, eval_loss 1.0000" in said


def test_without_evaluated_checkpoint_the_last_weights_stay(train: Callable[..., Any]) -> None:
    said: list[str] = []
    same = {**STEPS, "save_steps": 5, "eval_steps": 5}
    train("out", max_steps=1, load_best_model_at_end=True, say=said.append, **same)
    assert any("no checkpoint was evaluated" in line for line in said)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "save_strategy is no"),
        ({"save_strategy": "epoch"}, "set both to steps or both to epoch"),
        ({**STEPS, "save_steps": 3, "eval_steps": 2}, "3 is no multiple of eval_steps 2"),
        ({**STEPS, "metric_for_best_model": "speed"}, "expected one of loss, ppl, objective, accuracy, got 'speed'"),
        ({**STEPS, "metric_for_best_model": "bleu4"}, "needs eval_with_do_generation"),
    ],
)
def test_what_cannot_be_is_refused(train: Callable[..., Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(sft.UsageError, match=message):
        train(load_best_model_at_end=True, **settings)


@pytest.mark.parametrize(
    ("name", "greater", "expected"),
    [
        (None, None, ("eval_loss", False)),
        ("accuracy", None, ("eval_accuracy", True)),
        ("eval_ppl", None, ("eval_ppl", False)),
        ("accuracy", False, ("eval_accuracy", False)),
    ],
)
def test_names_of_metrics(name: str | None, greater: bool | None, expected: tuple[str, bool]) -> None:
    from sft.settings.arguments import DataArguments, GenerationArguments, ModelArguments, TrainingArguments

    training = TrainingArguments(metric_for_best_model=name, greater_is_better=greater)
    assert best_metric(Settings(ModelArguments(), DataArguments(), GenerationArguments(), training)) == expected

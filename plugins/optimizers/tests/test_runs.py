"""Whole runs: asked for by any name, resumed to the bit, on several processes, refused where it cannot work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.testing import needs, read_metrics

Train = Callable[..., sft.Summary]

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "lion": {"optim": "lion", "learning_rate": 1e-4},
    "adafactor": {"optim": "adafactor", "adafactor_beta1": 0.9},
    "adamw_8bit": {"optim": "adamw_8bit", "adamw_8bit_min_size": 600},
    "muon": {"optim": "muon"},
}
SAVES = {"save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1, "max_length": 60}


def weights(folder: Path) -> dict[str, np.ndarray]:
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("lion", {}),
        pytest.param("adamw_8bit", {}, marks=pytest.mark.slow),
        pytest.param("adafactor", {}, marks=pytest.mark.slow),
        pytest.param("muon", {}, marks=pytest.mark.slow),
        *(
            pytest.param(name, {"plugin": ["lora"], "lora_rank": 4}, marks=[needs("lora"), pytest.mark.slow])
            for name in OPTIMIZERS
        ),
    ],
)
def test_a_resumed_run_is_the_same_to_the_bit_and_learns(
    train: Train, tmp_path: Path, name: str, more: dict[str, Any]
) -> None:
    settings = {**OPTIMIZERS[name], **SAVES, **more}
    whole = train("whole", max_steps=4, do_eval=True, **settings)
    train("half", **{**settings, "max_steps": 2})
    train("half", max_steps=4, resume_from_checkpoint=True, **settings)
    states = [tmp_path / folder / "checkpoint-4" / "trainer" / "optimizer.safetensors" for folder in ("whole", "half")]
    assert states[0].read_bytes() == states[1].read_bytes()
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert {key: array.tobytes() for key, array in ours.items()} == {k: array.tobytes() for k, array in theirs.items()}
    assert whole.eval_loss_before is not None
    assert whole.eval_loss_after is not None
    assert whole.eval_loss_after < whole.eval_loss_before
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["settings"]["optim"] == OPTIMIZERS[name]["optim"]


def test_a_schedule_is_branched_off_a_checkpoint(train: Train, tmp_path: Path) -> None:
    """The plateau goes on; then, from the same checkpoint, a decay. Rates are those of a run that had it all along."""
    said: list[str] = []
    train("out", max_steps=2, lr_scheduler_type="constant", **SAVES)
    decay = {"lr_scheduler_type": "warmup_stable_decay", "wsd_decay_steps": 3, "wsd_decay_type": "linear"}
    train("out", max_steps=5, resume_from_checkpoint=True, say=said.append, **{**SAVES, **decay})
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "out") if "loss" in line]
    assert rates[-1] == pytest.approx(1e-3 / 3)
    assert any("lr_scheduler_type was 'constant'" in text and "warmup_stable_decay" in text for text in said)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "lion", "plugin": ["muon"]}, "both provide sft_optimizer"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs the rate that it ends with: set min_lr or min_lr_rate"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "min_lr": 1e-6, "min_lr_rate": 0.1},
            "both min_lr and min_lr_rate are set; keep one",
        ),
        ({"plugin": ["cosine-with-min-lr"], "min_lr": 1.0}, r"min_lr 1 is above learning_rate 0\.001; lower it"),
        ({"plugin": ["wsd"], "wsd_decay_steps": 5}, "The run has 4 steps, and wsd 0 of warm-up and 5 of decay"),
        ({"lion_beta1": 0.8}, "Unknown setting lion_beta1; if it belongs to plugin lion, add --plugin lion"),
    ],
)
def test_what_cannot_be_is_refused(train: Train, settings: dict[str, Any], message: str) -> None:
    given = {**settings}
    if "plugin" in given and "lr_scheduler_type" not in given and given["plugin"] != ["muon"]:
        given["lr_scheduler_type"] = None
    with pytest.raises(sft.UsageError, match=message):
        train("out", **given)


def test_settings_that_only_another_optimizer_reads_are_said(train: Train) -> None:
    said: list[str] = []
    train("out", max_steps=1, adam_beta1=0.8, adam_epsilon=1e-6, say=said.append, **OPTIMIZERS["lion"])
    (line,) = [text for text in said if text.startswith("settings without effect")]
    assert "adam_beta1 0.8, adam_epsilon 1e-06: optim is lion" in line
    said.clear()
    more = {"lr_scheduler_type": "cosine_with_min_lr", "min_lr_rate": 0.1, "num_cycles": 1.5}
    train("other", max_steps=1, adam_beta1=0.8, say=said.append, **{**OPTIMIZERS["adamw_8bit"], **more})
    assert not [text for text in said if text.startswith("settings without effect")]

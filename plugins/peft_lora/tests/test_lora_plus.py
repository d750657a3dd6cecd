"""LoRA+: measured on the first AdamW updates of real steps, in groups that keep everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.testing import needs

Pairs = dict[str, np.ndarray]
RATE = 1e-2


@pytest.fixture
def step(train: Any, peft: Path) -> Callable[..., tuple[Pairs, Pairs]]:
    """Parameters that train, before and after one step whose gradients are not zero for A either.

    From B = 0, the first gradient of A is zero, so the run starts from an adapter (or from PiSSA, if that is active).
    """

    def run(*plugins: type, **settings: Any) -> tuple[Pairs, Pairs]:
        states: list[Pairs] = []

        def keep(run: sft.Run) -> None:
            states.append({name: p.numpy() for name, p in run.model.named_parameters() if not p.stop_gradient})

        class Keep(sft.Plugin):
            name = "keep"
            api_version = 1

            @sft.hookimpl
            def sft_run_started(self, run: sft.Run) -> None:
                keep(run)

            @sft.hookimpl
            def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
                keep(run)

        given = {"plugin": ["lora", "lora-plus"], "learning_rate": RATE, "max_steps": 1, "do_eval": False, **settings}
        if "pissa" not in given["plugin"]:
            given["lora_path"] = str(peft / "llama-lora-all-linear")
        train("out", (Keep, *plugins), overwrite_output_dir=True, max_grad_norm=0.0, **given)
        return states[0], states[1]

    return run


def update(before: Pairs, after: Pairs, half: str) -> float:
    """The size of an AdamW update: its first one is rate · sign(gradient), where the gradient is not nearly zero."""
    changes = [np.abs(after[name] - before[name]).ravel() for name in before if name.endswith(f".lora_{half}")]
    return float(np.median(np.concatenate(changes)))


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 16.0),
        ({"lora_plus_scale": 4}, 4.0),
        ({"lora_plus_scale": 0.5}, 0.5),
        ({"weight_decay": 1e-6}, 16.0),
        ({"plugin": ["lora", "lora-plus", "pissa"], "lora_rank": 4}, 16.0),
        ({"plugin": ["lora", "lora-plus", "pissa", "rslora"], "lora_rank": 4, "lora_plus_scale": 8}, 8.0),
    ],
    ids=["default", "4", "half", "weight-decay", "pissa", "pissa-rslora"],
)
def test_trap_the_ratio_of_the_first_updates_of_b_and_a_is_lambda_and_not_1(
    step: Any, settings: dict[str, Any], scale: float
) -> None:
    """A rate given by ParamAttr is overwritten when the optimizer gets groups; here the update itself is measured."""
    before, after = step(**settings)
    assert update(before, after, "A") == pytest.approx(RATE, rel=1e-3)
    assert update(before, after, "B") / update(before, after, "A") == pytest.approx(scale, rel=1e-3)


@needs("nf4")
def test_trap_over_a_quantized_base_it_is_not_ignored(step: Any) -> None:
    before, after = step(plugin=["lora", "lora-plus", "nf4"])
    assert update(before, after, "B") / update(before, after, "A") == pytest.approx(16.0, rel=1e-3)


def test_the_groups_keep_their_weight_decay(step: Any) -> None:
    """Decoupled: a step takes rate · decay · value more off, at each half's own rate."""
    groups: list[sft.ParameterGroup] = []

    class Look(sft.Plugin):
        name = "look"
        api_version = 1
        order = 9

        @sft.hookimpl
        def sft_parameter_groups(self, run: sft.Run, groups: list[sft.ParameterGroup]) -> None:
            found.extend(groups)

    found = groups
    _, plain = step()
    before, decayed = step(Look, weight_decay=0.1)
    described = [(group.name, group.learning_rate, group.weight_decay, len(group.parameters)) for group in groups]
    assert described == [("decay", 1.0, 0.1, 14), ("decay_lora_B", 16.0, 0.1, 14)]
    assert {name.rpartition(".")[2] for name in groups[1].parameters} == {"lora_B"}
    for name, value in before.items():
        rate = RATE * (16.0 if name.endswith(".lora_B") else 1.0)
        np.testing.assert_allclose(decayed[name] - plain[name], -rate * 0.1 * value, atol=1e-6, err_msg=name)


def test_a_group_that_is_slower_already_stays_so_in_both_halves(step: Any) -> None:
    """λ multiplies what the group has: another plugin's rates count."""

    class Slow(sft.Plugin):
        name = "slow"
        api_version = 1
        order = -1

        @sft.hookimpl
        def sft_parameter_groups(self, run: sft.Run, groups: list[sft.ParameterGroup]) -> None:
            for group in groups:
                group.learning_rate *= 0.5

    before, after = step(Slow)
    assert update(before, after, "A") == pytest.approx(0.5 * RATE, rel=1e-3)
    assert update(before, after, "B") == pytest.approx(8 * RATE, rel=1e-3)


@pytest.mark.parametrize(("scale", "active"), [(4, True), (0.5, True), (1, False), (1.0, False), ("1.0", False)])
def test_a_scale_in_the_settings_activates_it_and_1_does_not(
    step: Any, tmp_path: Path, scale: Any, active: bool
) -> None:
    before, after = step(plugin=["lora"], lora_plus_scale=scale)
    plugins = json.loads((tmp_path / "out" / "run.json").read_text())["plugins"]
    assert ("lora-plus" in plugins) is active
    assert update(before, after, "B") / update(before, after, "A") == pytest.approx(float(scale), rel=1e-3)


@pytest.mark.parametrize("scale", [-2, -0.5])
def test_a_scale_below_zero_is_refused(train: Any, scale: float) -> None:
    with pytest.raises(sft.UsageError, match="lora_plus_scale"):
        train(lora_plus_scale=scale)


def test_a_resumed_run_is_the_same_bit_by_bit(train: Any, tmp_path: Path) -> None:
    settings = {"plugin": ["lora", "lora-plus"], "max_steps": 4, "learning_rate": 1e-3, "weight_decay": 0.1}
    train("whole", **settings, save_strategy="steps", save_steps=2)
    train("resumed", **settings, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    whole, resumed = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


def test_without_lora_it_is_refused(train: Any, tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match="Plugin lora-plus refines lora, which is not active; add --plugin lora"):
        train(plugin=["lora-plus"])
    assert not (tmp_path / "out").exists()

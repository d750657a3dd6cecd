"""Optimizers that are not AdamW under plans: pieces are stepped as wholes are, state moves between plans where it can
be cut, and what cannot be cut is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import RankError
from safetensors.numpy import load_file
from trainings import PLANS, TOLERANCE, Trainings, assert_equal, weights

from sft.testing import needs

pytestmark = [pytest.mark.slow, needs("lion", "adamw-8bit", "adafactor", "muon")]

SAVES = {"save_strategy": "steps", "save_steps": 2}
LION = {"optim": "lion", "learning_rate": 1e-3, "max_grad_norm": 0.0}
CODED = {"optim": "adamw_8bit", "adamw_8bit_min_size": 600, "max_grad_norm": 0.0}


def apart(one: Path, other: Path) -> np.ndarray:
    """How far each trained value of one run is from that of the other."""
    ours, theirs = weights(one), weights(other)
    return np.concatenate([np.abs(ours[name] - theirs[name]).ravel() for name in ours])


def few_differ(one: Path, other: Path, step: float) -> None:
    """Where gradients differ in last digits, a sign may where one is nothing but noise, and so may a code."""
    values = apart(one, other)
    assert (values > TOLERANCE).mean() < 0.01
    assert values.max() <= step


@pytest.mark.parametrize(
    ("optimizer", "plan"),
    [
        *((pytest.param(LION, plan, id=f"lion-{plan}")) for plan in ("stage1", "stage2", "tp2")),
        *((pytest.param(CODED, plan, id=f"adamw_8bit-{plan}")) for plan in ("stage1", "stage3", "stage2-offload")),
    ],
)
def test_pieces_are_stepped_as_wholes_are(trainings: Trainings, optimizer: dict[str, Any], plan: str) -> None:
    """Of stage 1 to the bit: both runs have the same gradients, for two data ranks sum a + b either way, and matrices
    are cut at multiples of 256 here, so that blocks are the same."""
    whole = trainings.one(**optimizer) if plan == "tp2" else trainings.many(PLANS["dp2"], **optimizer)[0]
    pieces, _ = trainings.many(PLANS[plan], **optimizer)
    if plan == "stage1":
        assert apart(whole, pieces).max() == 0
    else:
        few_differ(whole, pieces, 0.05)


@pytest.mark.parametrize("optimizer", [LION, CODED], ids=["lion", "adamw_8bit"])
@pytest.mark.parametrize("new", ["dp2", "stage1"])
def test_state_goes_on_under_another_plan(trainings: Trainings, optimizer: dict[str, Any], new: str) -> None:
    settings = {**optimizer, **SAVES, "lr_scheduler_type": "constant"}
    whole, _ = trainings.many(PLANS["dp2"], **settings)
    half, _ = trainings.many(PLANS["stage1"], **{**settings, "max_steps": 2})
    again, _ = trainings.many(PLANS[new], **settings, resume_from_checkpoint=str(half / "checkpoint-2"))
    assert apart(whole, again).max() == 0


def test_a_checkpoint_of_pieces_holds_each_code_once(trainings: Trainings) -> None:
    def held(folder: Path) -> dict[str, int]:
        found: dict[str, int] = {}
        for path in (folder / "checkpoint-2" / "trainer").glob("optimizer*.safetensors"):
            for key, array in load_file(path).items():
                if not key.endswith("_pow_acc"):
                    found[key] = found.get(key, 0) + array.size
        return found

    one = trainings.one(**CODED, **SAVES)
    many, _ = trainings.many(PLANS["stage1"], **CODED, **SAVES)
    assert held(one) == held(many)
    assert any(key.endswith(".scale1") for key in held(one))


@pytest.mark.parametrize("plan", ["dp2", "pp2"])
@pytest.mark.parametrize("name", ["adafactor", "muon", "adamw_8bit"])
def test_what_needs_whole_matrices_goes_with_plans_that_leave_them_whole(
    trainings: Trainings, plan: str, name: str
) -> None:
    assert_equal(trainings.one(optim=name), trainings.many(PLANS[plan], optim=name)[0])


@pytest.mark.parametrize("plan", ["stage1", "stage3", "tp2"])
@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_and_is_refused_where_they_are_divided(trainings: Trainings, plan: str, name: str) -> None:
    with pytest.raises(RankError, match=rf"The optimizer of plugin {name} steps a parameter as a whole, and "):
        trainings.many(PLANS[plan], optim=name)

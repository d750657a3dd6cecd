"""Runs that are killed under one plan and go on under another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import RankError, run_ranks
from trainings import ALL, ROWS, TOLERANCE, Plan, Trainings, assert_equal

import sft
from sft.distributed.pieces import SavedState

SAVES = {"save_strategy": "steps", "save_steps": 2}


def killed(trainings: Trainings, plan: Plan, **settings: Any) -> dict[str, Any]:
    """The settings of a run whose last rank was killed in step 3, after the checkpoint of step 2."""
    values = trainings.settings(plan, **SAVES, **settings)
    with pytest.raises(RankError) as caught:
        run_ranks(plan.processes, "mishaps:train_and_die", values, plan.processes - 1, 3, timeout=60)
    assert caught.value.rank == plan.processes - 1
    output = Path(values["output_dir"])
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    return values


def resumed(values: dict[str, Any], old: Plan, new: Plan) -> Path:
    changed = {name: value for name, value in values.items() if name not in old.settings} | new.settings
    changed["gradient_accumulation_steps"] = ROWS // (values["per_device_train_batch_size"] * new.data)
    run_ranks(new.processes, "jobs:train", {**changed, "resume_from_checkpoint": "auto"}, timeout=60)
    return Path(values["output_dir"])


def checked(trainings: Trainings, old: str, new: str, **settings: Any) -> None:
    one = trainings.one(**SAVES, **settings)
    values = killed(trainings, ALL[old], **settings)
    output = resumed(values, ALL[old], ALL[new])
    assert_equal(one, output)
    wanted, found = (
        SavedState(folder / "checkpoint-4" / "trainer", "optimizer", sft.AdamW.grains) for folder in (one, output)
    )
    assert set(wanted) == set(found)
    for key in wanted:
        np.testing.assert_allclose(found.whole(key), wanted.whole(key), rtol=0, atol=TOLERANCE, err_msg=key)

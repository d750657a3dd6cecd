"""Whole trainings under a plan, and what must be equal between two of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from processes import Result, run_ranks
from safetensors.numpy import load_file

from sft.testing import read_metrics

TOLERANCE = 1e-5
ROWS = 8  # of a step, whatever the plan
SAME_LINES = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "target_tokens")
SAME_EVALUATIONS = ("step", "epoch", "eval_loss", "eval_accuracy", "eval_tokens")

BASE = {
    # Float noise in a gradient must stay noise in a step of AdamW. With the usual epsilon, 1e-8, a value whose gradient
    # is noise alone moves as far as any other; with this one a step also shows the size of gradients, not their sign
    # alone, so that a sum that is wrong by a factor is seen in the weights.
    "adam_epsilon": 1e-3,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "max_steps": 5,
    "logging_steps": 1,
    "evaluation_strategy": "steps",
    "eval_steps": 3,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "max_length": 60,
    "src_length": 40,
    "disable_tqdm": True,
    "seed": 1,
}


@dataclass(frozen=True)
class Plan:
    """So many processes, of which ``data`` read different records."""

    processes: int
    data: int
    settings: dict[str, Any] = field(default_factory=dict)


def tensor(degree: int = 2, **more: Any) -> dict[str, Any]:
    return {"tensor_parallel_degree": degree, **more}


def context(degree: int = 2, **more: Any) -> dict[str, Any]:
    return {"context_parallel_degree": degree, **more}


def pipeline(degree: int = 2, **more: Any) -> dict[str, Any]:
    return {"pipeline_parallel_degree": degree, **more}


PLANS = {
    "one": Plan(1, 1),
    "dp2": Plan(2, 2),
    "stage1": Plan(2, 2, {"sharding": "stage1"}),
    "stage1-offload": Plan(2, 2, {"sharding": "stage1 offload"}),
    "stage2": Plan(2, 2, {"sharding": "stage2"}),
    "stage2-offload": Plan(2, 2, {"sharding": "stage2 offload"}),
    "stage3": Plan(2, 2, {"sharding": "stage3"}),
    "tp2": Plan(2, 1, tensor()),
    "tp2-sequence": Plan(2, 1, tensor(sequence_parallel=True)),
    "tp2-offload": Plan(2, 1, tensor(sharding="stage2 offload")),  # nobody shares pieces, here and below
    "tp4": Plan(4, 1, tensor(4)),
    "tp4-sequence": Plan(4, 1, tensor(4, sequence_parallel=True)),
    "pp2": Plan(2, 1, pipeline()),
    "pp2-offload": Plan(2, 1, pipeline(sharding="stage1 offload")),
    "tp2-dp2": Plan(4, 2, tensor()),
    "tp2-pp2": Plan(4, 1, tensor() | pipeline()),
    "tp2-sequence-pp2": Plan(4, 1, tensor(sequence_parallel=True) | pipeline()),
    "tp2-stage1": Plan(4, 2, tensor(sharding="stage1")),
    "tp2-sequence-stage1": Plan(4, 2, tensor(sharding="stage1", sequence_parallel=True)),
    "tp2-stage2": Plan(4, 2, tensor(sharding="stage2")),
    "tp2-stage3": Plan(4, 2, tensor(sharding="stage3")),
    "tp2-sequence-stage3": Plan(4, 2, tensor(sharding="stage3", sequence_parallel=True)),
    "pp2-dp2": Plan(4, 2, pipeline()),
    "pp2-stage1": Plan(4, 2, pipeline(sharding="stage1")),
    "pp4": Plan(4, 1, pipeline(4)),
    "pp2-virtual": Plan(2, 1, pipeline(virtual_pp_degree=2)),
    "pp2-virtual-dp2": Plan(4, 2, pipeline(virtual_pp_degree=2)),
    "tp2-sequence-pp2-virtual": Plan(4, 1, tensor(sequence_parallel=True) | pipeline(virtual_pp_degree=2)),
    "cp2": Plan(2, 1, context()),
    "cp4": Plan(4, 1, context(4)),
    "cp2-dp2": Plan(4, 2, context()),
    "cp2-stage1": Plan(2, 1, context(sharding="stage1")),
    "cp2-stage2-offload": Plan(2, 1, context(sharding="stage2 offload")),
    "cp2-stage2": Plan(4, 2, context(sharding="stage2")),
    "cp2-stage3": Plan(4, 2, context(sharding="stage3")),
    "cp2-dp2-stage1": Plan(8, 4, context(sharding="stage1", sharding_parallel_degree=2)),
    "cp2-tp2": Plan(4, 1, context() | tensor()),
    "cp2-tp2-stage3": Plan(4, 1, context() | tensor(sharding="stage3")),
    "cp2-tp2-sequence": Plan(4, 1, context() | tensor(sequence_parallel=True)),
    "cp2-pp2": Plan(4, 1, context() | pipeline()),
    "cp2-pp2-virtual": Plan(4, 1, context() | pipeline(virtual_pp_degree=2)),
    "dp2-stage1": Plan(4, 4, {"sharding": "stage1", "sharding_parallel_degree": 2}),
    "dp2-stage2": Plan(4, 4, {"sharding": "stage2", "sharding_parallel_degree": 2}),
    "dp2-stage3": Plan(4, 4, {"sharding": "stage3", "sharding_parallel_degree": 2}),
}


def experts(degree: int = 2, **more: Any) -> dict[str, Any]:
    return {"expert_parallel_degree": degree, **more}


OF_MIXTURES = {
    "ep2": Plan(2, 2, experts()),
    "ep4": Plan(4, 4, experts(4)),
    "ep2-dp2": Plan(4, 4, experts()),
    "ep2-tp2": Plan(4, 2, experts() | tensor()),
    "ep2-tp2-sequence": Plan(4, 2, experts() | tensor(sequence_parallel=True)),
    "ep2-pp2": Plan(4, 2, experts() | pipeline()),
    "ep2-stage1": Plan(4, 4, experts(sharding="stage1")),
    "ep2-stage2": Plan(4, 4, experts(sharding="stage2")),
    "ep2-stage3": Plan(4, 4, experts(sharding="stage3")),
    "ep2-offload": Plan(2, 2, experts(sharding="stage2 offload")),
    "cp2-ep2": Plan(2, 1, context() | experts()),
    "cp2-ep2-dp2": Plan(4, 2, context() | experts()),
    "cp2-ep4": Plan(4, 2, context() | experts(4)),
    "cp4-ep2": Plan(4, 1, context(4) | experts()),
    "cp2-ep2-tp2-sequence": Plan(4, 1, context() | experts() | tensor(sequence_parallel=True)),
    "cp2-ep2-pp2": Plan(4, 1, context() | experts() | pipeline()),
    "cp2-ep2-stage1": Plan(4, 2, context() | experts(sharding="stage1")),
    "cp2-ep2-stage2": Plan(8, 4, context() | experts(sharding="stage2")),
    "cp2-ep2-stage3": Plan(4, 2, context() | experts(sharding="stage3")),
}
ALL = {**PLANS, **OF_MIXTURES}


def joined(*settings: dict[str, Any]) -> dict[str, Any]:
    """All of them, with all their plugins."""
    plugins = [name for part in settings for name in part.get("plugin", [])]
    return {**{name: value for part in settings for name, value in part.items()}, "plugin": plugins}


class Trainings:
    """Runs in folders of their own below ``folder``; each one-process run is made once."""

    def __init__(self, folder: Path, model: Path, data: Path) -> None:
        self._folder = folder
        self._defaults = {**BASE, "model_name_or_path": str(model), "dataset_name_or_path": str(data)}
        self._known: dict[str, Path] = {}
        self._count = 0

    def one(self, **settings: Any) -> Path:
        """The output folder of a run with ``settings`` on one process, which has no strategy of any plugin."""
        key = json.dumps(settings, sort_keys=True)
        if key not in self._known:
            self._known[key] = self.many(PLANS["one"], **settings)[0]
        return self._known[key]

    def settings(self, plan: Plan, **settings: Any) -> dict[str, Any]:
        """Those of a run under ``plan``, with an output folder of its own; the rows of a step are those of one
        process."""
        self._count += 1
        values = {**self._defaults, **settings, **plan.settings, "output_dir": str(self._folder / str(self._count))}
        values["gradient_accumulation_steps"] = ROWS // (values["per_device_train_batch_size"] * plan.data)
        return values

    def many(
        self, plan: Plan, job: str = "jobs:train", damage: str | None = None, **settings: Any
    ) -> tuple[Path, list[Result]]:
        """The output folder of a run under ``plan``, and what each rank returned; ``settings`` as for one process."""
        values = self.settings(plan, **settings)
        output = Path(values["output_dir"])
        results = run_ranks(plan.processes, job, values, *([damage] if damage else []), timeout=60)
        left = [result.rank for result in results if Path(f"/proc/{result.value['process']}").exists()]
        assert not left, f"Ranks {left} have returned and live on."
        return output, results


def weights(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def differences(one: Path, other: Path) -> dict[str, float]:
    """How far apart two runs are: the greatest absolute difference of each kind of figure and of each saved tensor; of
    gradient norms, which are far above 1, the greatest relative one."""
    found: dict[str, float] = {}
    lines, others = read_metrics(one), read_metrics(other)
    assert [set(line) for line in lines] == [set(line) for line in others]
    for line, their in zip(lines, others, strict=True):
        for key in SAME_EVALUATIONS if "eval_loss" in line else SAME_LINES:
            scale = line[key] if key == "grad_norm" else 1.0
            found[key] = max(found.get(key, 0.0), abs(line[key] - their[key]) / scale)
    tensors, theirs = weights(one), weights(other)
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in theirs.items()
    }
    for name, values in tensors.items():
        found[name] = float(np.abs(values.astype(np.float64) - theirs[name].astype(np.float64)).max())
    return found


def assert_equal(one: Path, other: Path) -> None:
    """Two runs have learned the same and written the same files."""
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    apart = {name: value for name, value in differences(one, other).items() if not value <= TOLERANCE}
    assert not apart, f"{other} is apart from {one}: {apart}"

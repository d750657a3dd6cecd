"""What a step minimises, under each parallel plan: what one process learns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft.testing import needs, read_metrics, write_data

FIXTURES = Path(__file__).parent / "fixtures"
TRL = json.loads((FIXTURES / "dpo.json").read_text())
PLANS = {
    "dp2": {"per_device_train_batch_size": 2},
    "tp2": {"tensor_parallel_degree": 2, "per_device_train_batch_size": 4},
    "tp2-sequence": {"tensor_parallel_degree": 2, "sequence_parallel": "true", "per_device_train_batch_size": 4},
    "stage2": {"sharding": "stage2", "sharding_parallel_degree": 2, "per_device_train_batch_size": 2},
    "stage3": {"sharding": "stage3", "sharding_parallel_degree": 2, "per_device_train_batch_size": 2},
    "pp2": {"pipeline_parallel_degree": 2, "per_device_train_batch_size": 4},
}
ALL = [pytest.mark.slow, needs("parallel-4d", "lora")]


def run(model: Path, data: Path, folder: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    given = {
        **{"model_name_or_path": model, "dataset_name_or_path": data, "output_dir": folder, "disable_tqdm": "true"},
        **{"learning_rate": 0.02, "lr_scheduler_type": "constant", "max_grad_norm": 0, "logging_steps": 1},
        **settings,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    line = [sys.executable, "-m", "sft", "run", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=100)


def dpo_of(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "template.jinja").write_text(TRL["template"])
    more = {"lora_path": FIXTURES / "dpo_start", "max_steps": 3}
    return {"plugin": "dpo,lora", "chat_template": tmp_path / "template.jinja", **more}


@pytest.mark.parametrize("plan", [pytest.param(plan, marks=ALL) for plan in PLANS if plan != "pp2"])
def test_pairs_are_learned_as_trl_learns_them(base_model: Path, tmp_path: Path, plan: str) -> None:
    data = write_data(tmp_path / "data", TRL["pairs"], TRL["pairs"])
    done = run(base_model, data, tmp_path / "out", nproc=2, **dpo_of(tmp_path), **PLANS[plan])
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_metrics(tmp_path / "out")
    steps = [line for line in lines if "loss" in line]
    for line, expected in zip(steps, TRL["runs"]["sigmoid"]["steps"][:3], strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/chosen", "rewards/accuracies"):
            assert line[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-4), (line["step"], name)
    assert lines[-1]["eval_objective"] == pytest.approx(TRL["runs"]["sigmoid"]["steps"][3]["loss"], rel=1e-3)


WHOLE = ("dp2", "tp2", "tp2-sequence", "stage2")


@pytest.mark.parametrize("plan", [pytest.param(plan, marks=ALL) for plan in WHOLE])
def test_a_whole_model_is_compared_with_its_copy(base_model: Path, tmp_path: Path, plan: str) -> None:
    data = write_data(tmp_path / "data", TRL["pairs"], TRL["pairs"])
    settings = {**dpo_of(tmp_path), "plugin": "dpo", "learning_rate": TRL["whole"]["learning_rate"]}
    del settings["lora_path"]
    done = run(base_model, data, tmp_path / "out", nproc=2, **{**settings, **PLANS[plan]})
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line for line in read_metrics(tmp_path / "out") if "loss" in line]
    for line, expected in zip(steps, TRL["whole"]["steps"][:3], strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/chosen", "rewards/accuracies"):
            assert line[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-4), (line["step"], name)


@pytest.mark.slow
@needs("parallel-4d")
def test_a_whole_model_in_pieces_has_no_copy(base_model: Path, tmp_path: Path) -> None:
    settings = {**dpo_of(tmp_path), "plugin": "dpo"}
    del settings["lora_path"]
    data = write_data(tmp_path / "data", TRL["pairs"], TRL["pairs"])
    done = run(base_model, data, tmp_path / "out", nproc=2, **{**settings, **PLANS["stage3"]})
    assert done.returncode == 2
    assert "is kept in pieces (sharding stage3)" in done.stdout + done.stderr


@pytest.mark.slow
@needs("parallel-4d", "lora")
def test_a_process_with_fewer_pairs_only_keeps_others_from_waiting(base_model: Path, tmp_path: Path) -> None:
    """Three pairs a step: one of two processes has a micro-batch of nothing, and the reference goes through it too."""
    data = write_data(tmp_path / "data", TRL["pairs"][:3], TRL["pairs"][:1])
    settings = {**dpo_of(tmp_path), "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    plan = {"nproc": 2, "sharding": "stage3", "sharding_parallel_degree": 2}
    alone = {**settings, "gradient_accumulation_steps": 3}
    for name, given in (("two", {**settings, **plan}), ("one", alone)):
        done = run(base_model, data, tmp_path / name, **given)
        assert done.returncode == 0, done.stdout + done.stderr
    for two, one in zip(*(read_metrics(tmp_path / name) for name in ("two", "one")), strict=True):
        for key in {"loss", "grad_norm", "rewards/margins", "eval_objective", "eval_loss"} & set(one):
            assert two[key] == pytest.approx(one[key], rel=2e-4, abs=1e-6), (one["step"], key)


@pytest.mark.slow
@needs("parallel-4d", "lora")
def test_a_pipeline_of_pairs_is_refused(base_model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", TRL["pairs"], TRL["pairs"])
    done = run(base_model, data, tmp_path / "out", nproc=2, **dpo_of(tmp_path), **PLANS["pp2"])
    assert done.returncode == 2
    assert "leave pipeline parallelism out" in done.stdout + done.stderr


@pytest.mark.parametrize("plan", [pytest.param(plan, marks=ALL) for plan in PLANS])
def test_losses_of_tokens_are_those_of_one_process(base_model: Path, dataset: Path, tmp_path: Path, plan: str) -> None:
    """All three together, with the base model training whole, its tied lm_head too."""
    settings = {"plugin": "label-smoothing,focal-loss,z-loss", "z_loss_weight": 0.01, "max_steps": 2}
    for name, given in (("two", {"nproc": 2, **PLANS[plan]}), ("one", {"per_device_train_batch_size": 4})):
        done = run(base_model, dataset, tmp_path / name, **settings, **given)
        assert done.returncode == 0, done.stdout + done.stderr
    for two, one in zip(*(read_metrics(tmp_path / name) for name in ("two", "one")), strict=True):
        for key in {"loss", "grad_norm", "eval_objective", "eval_loss"} & set(one):
            assert two[key] == pytest.approx(one[key], rel=2e-4), (one["step"], key)

"""What benchmarks/parallel_gpu.py counts as a plan that does not suit a model, and as one that is apart."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import sft
from benchmarks import parallel_gpu
from benchmarks.parallel_gpu import RefusedError, failure, plans
from sft.fine_tune import prepare_run
from sft.testing import needs


@pytest.fixture
def says(base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What ``sft run`` prints when it refuses the settings."""

    def refuse(processes: int, **settings: Any) -> str:
        monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(processes))
        values = {"model_name_or_path": str(base_model), "dataset_name_or_path": str(tmp_path)}
        with pytest.raises(sft.UsageError) as refused:
            prepare_run({**values, "output_dir": str(tmp_path / "out"), **settings}, (), print)
        return f"something before\nsft: {refused.value}\n"

    return refuse


@needs("parallel-4d")
@pytest.mark.parametrize(
    ("processes", "settings", "is_refused"),
    [
        (3, {"tensor_parallel_degree": 3}, True),
        (16, {"context_parallel_degree": 16}, True),
        (64, {"pipeline_parallel_degree": 64}, True),
        (64, {"pipeline_parallel_degree": 32, "virtual_pp_degree": 2}, True),
        pytest.param(2, {"pipeline_parallel_degree": 2, "plugin": ["dpo"]}, True, marks=needs("dpo")),
        pytest.param(2, {"sharding": "stage1", "optim": "muon"}, True, marks=needs("muon")),
        (4, {"tensor_parallel_degree": 3}, False),  # of the processes, which this program is to choose
        (2, {"sharding_parallel_degree": 2}, False),
        (2, {"learning_rate": -1}, False),
    ],
)
def test_refusals(says: Callable[..., str], processes: int, settings: dict[str, Any], is_refused: bool) -> None:
    printed = says(processes, **settings)
    assert isinstance(failure(2, printed), RefusedError) == is_refused
    assert not isinstance(failure(1, printed), RefusedError)  # not what sft exits with when it refuses


def test_other_errors_are_failures() -> None:
    assert str(failure(1, "sft: rank 1: x\nlast line")) == "sft: rank 1: x"
    assert str(failure(139, "")) == "no word, exit code 139"
    assert not isinstance(failure(2, "ValueError: shapes do not divide; these go with nothing"), RefusedError)


@pytest.mark.parametrize("gpus", [2, 3, 4, 8])
def test_plans_have_as_many_ranks_as_gpus(gpus: int) -> None:
    dense, mixture = plans(gpus), plans(gpus, has_experts=True)
    assert {"offload" in name for name in dense} == {True, False}
    assert {name for name in mixture if name not in dense} == {name for name in mixture if "ep2" in name}
    for data, settings in mixture.values():
        degrees = [settings.get(f"{way}_parallel_degree", 1) for way in ("tensor", "pipeline", "context")]
        assert data * int(np.prod(degrees)) == gpus
    assert any("ep2" in name for name in mixture) == (gpus % 2 == 0)


@pytest.mark.parametrize(
    ("arguments", "change", "code"),
    [([], 5e-4, 0), ([], 2e-3, 1), ([], np.nan, 1), (["--bf16"], 5e-3, 0), (["--bf16"], 2e-2, 1)],
)
@pytest.mark.parametrize("what", ["loss", "weight"])
def test_a_plan_that_is_apart_makes_the_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], change: float, code: int, what: str
) -> None:
    def trained(folder: Path, processes: int, data_ranks: int, settings: dict[str, Any]) -> Path:
        factors = {one: 1 + change if processes > 1 and one == what else 1.0 for one in ("loss", "weight")}
        folder.mkdir()
        line = {"step": 1, "loss": factors["loss"], "grad_norm": 1.0}
        line |= {"tokens": 1, "seconds": 1.0, "peak_memory_mib": 1}
        (folder / "metrics.jsonl").write_text(json.dumps(line))
        save_file({"w": np.full(4, factors["weight"], np.float32)}, folder / "model.safetensors")
        return folder

    monkeypatch.setattr(parallel_gpu, "train", trained)
    monkeypatch.setattr(parallel_gpu, "has_experts", lambda model: False)
    monkeypatch.setattr(sys, "argv", ["parallel_gpu.py", "model", "data", "--gpus", "2", "--only", "dp2", *arguments])
    assert parallel_gpu.main() == code


@needs("parallel-4d")
def test_who_has_experts(base_model: Path) -> None:
    families = Path(__file__).parents[1] / "core" / "tests" / "fixtures" / "families"
    assert parallel_gpu.has_experts(str(families / "mixtral"))
    assert not parallel_gpu.has_experts(str(base_model))


@pytest.mark.slow
@needs("parallel-4d")
@pytest.mark.parametrize("plan", ["dp2", "stage2x2 offload"])
def test_it_runs_on_cpus(base_model: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, plan: str) -> None:
    arguments = [str(base_model), str(dataset), "--gpus", "2", "--steps", "2", "--max_length", "64", "--only", plan]
    monkeypatch.setattr(sys, "argv", ["parallel_gpu.py", *arguments, "--", "--device", "cpu"])
    assert parallel_gpu.main() == 0

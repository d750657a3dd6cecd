"""What benchmarks/parallel_checks.py tries on several GPUs, and that it says so where something is off."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import parallel_checks, parallel_gpu
from benchmarks.parallel_checks import KILLED, SAVED, STEPS, Checks
from benchmarks.parallel_gpu import RefusedError
from sft.fine_tune import prepare_run
from sft.testing import needs

pytestmark = needs("parallel-4d", "lora", "zero-padding")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """The exit code of the program, for the lines that begin so."""

    def go(only: str) -> int:
        monkeypatch.setattr(sys, "argv", ["parallel_checks.py", "--device", "cpu", "--only", only])
        return parallel_checks.main()

    return go


@pytest.mark.slow
@pytest.mark.parametrize(
    "only",
    [
        "collectives",
        "bf16: pp2",
        "experts: dp2+ep2",
        "lora: cp2",
        "resumed: stage1x2",
        "resumed experts: cp2",
        "killed: rank 0",
        "launchers: dp2",
    ],
)
def test_two_processes_on_cpus(run: Callable[[str], int], capsys: pytest.CaptureFixture[str], only: str) -> None:
    assert run(only) == 0
    printed = capsys.readouterr().out
    assert only in printed
    assert printed.endswith(": none off\n")


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_the_models_suit_every_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """What settings and config.json tell; here no plan may be refused, for it would not be tried."""
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(gpus))
    checks = Checks(tmp_path, gpus, "cpu")
    for kind, chosen in checks.plans.items():
        assert chosen
        for plan in chosen:
            data_ranks, settings = checks._settings(kind, plan)
            assert settings.pop("rows") % data_ranks == 0
            prepare_run({**settings, "output_dir": str(tmp_path / "out")}, (), lambda text: None)


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_each_checkpoint_is_of_a_plan_that_is_tried(tmp_path: Path, gpus: int) -> None:
    checks = Checks(tmp_path, gpus, "cpu")
    known = {f"{kind}: {plan}" for kind, chosen in checks.plans.items() for plan in [*chosen, "one"]}
    resumed = [name.partition(": ") for name in checks.rows() if name.startswith("resumed")]
    wanted = {
        f"{group.partition(' ')[2] or 'float32'}: {plan}" for group, _, both in resumed for plan in both.split(" → ")
    }
    assert len(wanted) > 8
    assert wanted <= known


class Trains:
    """Stands in for runs: each learns what one GPU learns, but where ``off`` says what its losses or weights are to be
    multiplied with, by what the run is (``plan``, ``resumed``, ``killed``)."""

    def __init__(self, **off: Any) -> None:
        self._off = off

    def __call__(self, folder: Path, processes: int, data: int, settings: Mapping[str, Any], limit: float) -> Path:
        resumed, killed = settings.get("resume_from_checkpoint"), "max_restarts" in settings
        kind = "resumed" if resumed else "killed" if killed else "plan" if processes > 1 else "one"
        off = self._off.get(kind, {})
        if "error" in off:
            raise off["error"]
        folder.mkdir()
        lines = [{"step": step + 1, "loss": 2.0, "grad_norm": 1.0, "tokens": 8} for step in range(STEPS)]
        for line in lines:
            line |= {"loss": 2.0 * off.get("loss", 1.0), "seconds": float(folder.name.partition("-")[0])}
            line |= {"peak_memory_mib": 1}
        if resumed and "anew" not in off:
            lines[:SAVED] = map(json.loads, (Path(resumed).parent / "metrics.jsonl").read_text().splitlines()[:SAVED])
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines[: off.get("steps", STEPS)])))
        tensors = load_file(Path(settings["model_name_or_path"]) / "model.safetensors")
        moved = np.float32(1.002 * off.get("weight", 1.0))
        save_file({name: values * moved for name, values in tensors.items()}, folder / "model.safetensors")
        events = [{"lost": off.get("lost", [1]), "of": 2, "left_out": 0, "from_step": SAVED}] if killed else []
        report = {"of_plugins": {"parallel-4d": {"restarts": events}}}
        (folder / "run.json").write_text(json.dumps(report))
        return folder


@pytest.mark.parametrize(
    ("only", "off", "says"),
    [
        ("float32: dp2", {}, None),
        ("float32: dp2", {"plan": {"loss": 1 + 5e-5}}, None),
        ("float32: dp2", {"plan": {"loss": 1 + 2e-4}}, "APART"),
        ("float32: dp2", {"plan": {"loss": np.nan}}, "APART"),
        ("float32: dp2", {"plan": {"weight": 1 + 5e-5}}, None),
        ("float32: dp2", {"plan": {"weight": 1 + 2e-4}}, "APART"),  # a tenth of what it has learned
        ("bf16: dp2", {"plan": {"loss": 1 + 2e-3}}, None),
        ("bf16: dp2", {"plan": {"weight": 1 + 2e-4}}, None),
        ("bf16: dp2", {"plan": {"weight": 1 + 6e-4}}, "APART"),
        ("float32: dp2", {"plan": {"steps": STEPS - 1}}, "FAILED: .* has other steps"),
        ("float32: dp2", {"plan": {"error": RefusedError("heads")}}, "FAILED: heads"),
        ("resumed: one", {}, None),
        ("resumed: one", {"resumed": {"anew": True}}, "FAILED: it has begun anew"),
        ("resumed: one", {"resumed": {"weight": 1 + 2e-4}}, "APART"),
        ("killed: rank 1", {}, None),
        ("killed: rank 1", {"killed": {"lost": [0]}}, f"FAILED: of rank 1, killed after step {KILLED}"),
        ("killed: rank 1", {"killed": {"loss": 1 + 2e-4}}, "APART"),
    ],
)
def test_what_is_off_makes_the_exit_code_1(
    run: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only: str,
    off: dict[str, Any],
    says: str | None,
) -> None:
    monkeypatch.setattr(parallel_gpu, "train", Trains(**off))
    assert run(only) == (0 if says is None else 1)
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith(only))
    assert (re.search(says, line) is not None) if says else ("APART" not in line and "FAILED" not in line)
    assert printed.endswith(f": {'none' if says is None else 1} off\n")


@pytest.mark.parametrize("code", [0, 1])
def test_a_collective_that_is_missing_is_off(
    run: Callable[[str], int], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """And one that ends with an error, whatever it has said before."""
    said = "".join(f"print('{one}: 3 collectives are exact: a, b, c');" for one in ("int32", "int64", "float32")[code:])
    monkeypatch.setattr(parallel_checks, "COLLECTIVES", said)
    assert run("collectives") == code
    monkeypatch.setattr(parallel_checks, "COLLECTIVES", said + "raise ValueError('sum of int32')")
    assert run("collectives") == 1


def test_half_of_the_gpus_for_each_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    checks = Checks(tmp_path, 4, "gpu")
    assert [checks._half(number)["CUDA_VISIBLE_DEVICES"] for number in (0, 1)] == ["4,5", "6,7"]
    assert "CUDA_VISIBLE_DEVICES" not in Checks(tmp_path, 4, "cpu")._half(0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [checks._half(number)["CUDA_VISIBLE_DEVICES"] for number in (0, 1)] == ["0,1", "2,3"]


def test_two_gpus_are_needed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(parallel_checks, "FACTS", "print('{\"count\": 1}')")
    monkeypatch.setattr(sys, "argv", ["parallel_checks.py"])
    with pytest.raises(SystemExit) as ended:
        parallel_checks.main()
    assert ended.value.code == 2
    assert "2 GPUs are needed, and this machine has 1." in capsys.readouterr().err

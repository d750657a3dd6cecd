"""What one process of a run is asked, all of them do, after the same step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trainings import PLANS, Trainings

from sft.testing import read_metrics

PLUGIN = """
import sft


class Asks(sft.Plugin):
    name = "asks"
    api_version = ">=1.1,<2"

    @sft.hookimpl
    def sft_step_ended(self, run, record):
        if run.strategy.is_main:
            return
        if record["step"] == 1:
            run.control.save()
        if record["step"] == 2:
            run.control.evaluate()
        if record["step"] == 4:
            run.control.stop("enough")

    @sft.hookimpl
    def sft_metrics(self, run, record):
        return {"ranks": run.strategy.sum([1.0])[0]}
"""


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp2", "pp2"])
def test_a_process_that_is_not_the_main_one_asks(trainings: Trainings, tmp_path: Path, plan: str) -> None:
    (tmp_path / "asks.py").write_text(PLUGIN, encoding="utf-8")
    values = {**trainings.settings(PLANS[plan]), "nproc": 2, "eval_steps": 5}
    values["plugin"] = [*values.get("plugin", []), str(tmp_path / "asks.py")]
    (tmp_path / "settings.json").write_text(json.dumps(values))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PADDLE_", "CUDA_"))}
    environment |= {"PADDLE_DISTRI_BACKEND": "gloo", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "sft", "run", str(tmp_path / "settings.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    folder = Path(values["output_dir"])
    early = {"step": 4, "reason": "another process of the run has asked for it"}
    report = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert (report["status"], report["result"]["stopped_early"]) == ("finished", early)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    lines = read_metrics(folder)
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4]
    assert {line["asks/ranks"] for line in lines} == {float(PLANS[plan].data)}

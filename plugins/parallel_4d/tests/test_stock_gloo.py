"""Paddle's own gloo, by which processes on CPUs talk: two of them run every plan, without these tests' support."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import FOLDER
from processes import free_ports
from trainings import ALL, Trainings, assert_equal

PLANS = ["dp2", "stage1", "stage3", "tp2-sequence", "pp2", "pp2-virtual", "cp2", "cp2-stage1", "ep2", "cp2-ep2"]


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_two_processes(trainings: Trainings, tokenizer: Path, tmp_path: Path, plan: str) -> None:
    model: dict[str, Any] = {}
    if "ep2" in plan:
        model = {"model_name_or_path": str(FOLDER / "mixtral"), "tokenizer_name_or_path": str(tokenizer)}
        model |= {"max_length": 60, "src_length": 32}
    values = {**trainings.settings(ALL[plan], **model), "nproc": 2}
    (tmp_path / "settings.json").write_text(json.dumps(values))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PADDLE_", "CUDA_"))}
    environment |= {"PADDLE_DISTRI_BACKEND": "gloo", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "sft", "run", str(tmp_path / "settings.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert_equal(trainings.one(**model), Path(values["output_dir"]))


SLEEPER = """
import json, os, sys, time
import sft

class Sleeper(sft.Plugin):
    name, api_version = "sleeper", 1

    @sft.hookimpl
    def sft_step_ended(self, run, record):
        if os.environ["PADDLE_TRAINER_ID"] == "1" and record["step"] == 2:
            time.sleep(33)

sft.run(json.loads(sys.argv[1]), plugins=[Sleeper])
"""


@pytest.mark.slow
def test_a_process_may_be_late_by_more_than_gloo_waits(trainings: Trainings) -> None:
    """Which is 30 seconds: one rank saves, or the machine is busy."""
    values = trainings.settings(ALL["stage1"])
    ports = free_ports(3)
    ends = [f"127.0.0.1:{port}" for port in ports]
    common = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PADDLE_", "CUDA_"))},
        **{"PADDLE_DISTRI_BACKEND": "gloo", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        **{"PADDLE_TRAINERS_NUM": "2", "PADDLE_MASTER": ends[2], "PADDLE_TRAINER_ENDPOINTS": ",".join(ends[:2])},
    }
    ranks = []
    for rank in range(2):
        own = {**common, "PADDLE_TRAINER_ID": str(rank), "PADDLE_CURRENT_ENDPOINT": ends[rank]}
        command = [sys.executable, "-c", SLEEPER, json.dumps(values)]
        ranks.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [rank.communicate(timeout=110)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert_equal(trainings.one(), Path(values["output_dir"]))

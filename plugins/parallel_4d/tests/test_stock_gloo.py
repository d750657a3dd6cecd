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
from trainings import ALL, Trainings, assert_equal

PLANS = ["dp2", "stage1", "stage3", "tp2-sequence", "pp2", "pp2-virtual", "cp2", "cp2-stage1", "ep2"]


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_two_processes(trainings: Trainings, tokenizer: Path, tmp_path: Path, plan: str) -> None:
    model: dict[str, Any] = {}
    if plan == "ep2":
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

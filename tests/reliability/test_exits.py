"""A finished run of several processes exits with 0, however busy the machine is while their threads end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reliability import figures
from reliability.trials import CASES, TRAINING
from sft.testing import needs

RUNS = 100 if figures.WHOLE else 2
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200 if figures.WHOLE else 180)]


@pytest.mark.row("exits", "two ranks, --nproc 2")
@needs("lora", "zero-padding", "parallel-4d")
def test_finished_runs_exit_with_0(records: Path, tmp_path: Path) -> None:
    began, codes, said = time.monotonic(), [], ""
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        for number in range(RUNS):
            settings = {
                **TRAINING,
                **CASES["two ranks"].settings,
                "dataset_name_or_path": str(records),
                "output_dir": str(tmp_path / str(number)),
                "max_steps": 2,
                "nproc": 2,
            }
            line = [sys.executable, "-m", "sft", "run", *(f"--{name}={value}" for name, value in settings.items())]
            done = subprocess.run(line, capture_output=True, text=True, timeout=120)
            codes.append(done.returncode)
            said += done.stderr if done.returncode else ""
    finally:
        for process in load:
            process.kill()
            process.wait()
    failed = sum(code != 0 for code in codes)
    figures.record("exits", "two ranks, --nproc 2", runs=RUNS, failed=failed, seconds=time.monotonic() - began)
    assert not failed, said

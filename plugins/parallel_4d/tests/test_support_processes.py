"""The runner of ranks: what it gives, which error it raises, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import processes
import pytest
from processes import RankError, launcher_environment, run_ranks

STARTS = pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "fresh"])


def gone(folder: Path, seconds: float = 0.0) -> bool:
    """Whether the two processes that each of two ranks wrote down have ended."""
    deadline = time.monotonic() + seconds
    pids = [int(pid) for file in folder.glob("*.pids") for pid in file.read_text().split()]
    assert len(pids) == 4
    while any(_runs(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # an orphan may wait for init


@STARTS
def test_what_a_rank_finds(fresh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    results = run_ranks(2, "group_jobs:surroundings", env={"EXTRA": "1"}, fresh=fresh, timeout=60)
    draws = [result.value.pop("draw") for result in results]
    for rank, result in enumerate(results):
        assert result.rank == rank
        assert result.value == {
            **{"initialized": False, "rank": rank, "world": 2, "session": True},
            **{"threads": "1", "extra": "1", "devices": None},
        }
    assert draws[0][0] != draws[1][0]
    assert draws[0][1] != draws[1][1]


def test_forks_compute_as_new_processes_do() -> None:
    found = [run_ranks(1, "group_jobs:train_alone", fresh=fresh, timeout=60)[0].value for fresh in (False, True)]
    assert found[0] == found[1]


@STARTS
def test_the_first_failing_rank_ends_the_others(fresh: bool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="Rank 1 failed with ArithmeticError: one and one is three") as caught:
        run_ranks(2, "group_jobs:fail", "raise", str(tmp_path), fresh=fresh, timeout=60)
    assert caught.value.rank == 1
    assert "rank 1 is here" in caught.value.output
    assert "in fail" in caught.value.output
    assert gone(tmp_path, 1)


@pytest.mark.parametrize(
    ("how", "message"),
    [("kill", "Rank 1 was ended by SIGKILL"), ("leave", "Rank 1 exited with 0 and without a result")],
)
def test_a_rank_that_vanishes(how: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=message):
        run_ranks(2, "group_jobs:fail", how, str(tmp_path), timeout=60)
    assert gone(tmp_path, 1)


def test_what_follows_from_a_death_is_not_taken_for_its_cause(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="Rank 1 was ended by SIGKILL"):
        run_ranks(2, "group_jobs:fail", "die", str(tmp_path), timeout=60)


def test_a_timeout_shows_every_rank_and_where_it_stood(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="took longer than 5 s") as caught:
        run_ranks(2, "group_jobs:fail", "hang", str(tmp_path), timeout=5)
    said = str(caught.value)
    for rank in (0, 1):
        assert f"Rank {rank} was running" in said
        assert f"rank {rank} is here" in said
    assert said.count("group_jobs.py") >= 2  # the stacks
    assert gone(tmp_path, 1)


def test_a_caller_that_dies_leaves_no_rank(tmp_path: Path) -> None:
    script = (
        "import processes; processes.IMPORTS = ['json']\n"
        f"processes.run_ranks(2, 'group_jobs:fail', 'hang', {str(tmp_path)!r})\n"
    )
    env = {**os.environ, "PYTHONPATH": str(processes.SUPPORT)}
    caller = subprocess.Popen([sys.executable, "-c", script], env=env)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("*.pids"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert gone(tmp_path, 5)


def test_what_is_read_at_import_needs_new_processes() -> None:
    with pytest.raises(ValueError, match=r"FLAGS_check_nan_inf: .* fresh=True"):
        run_ranks(1, "group_jobs:surroundings", env={"FLAGS_check_nan_inf": "1"})


@pytest.mark.slow
def test_paddles_launcher_gets_the_groups(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import group_jobs\n"
        "found = group_jobs.collectives({'dp_degree': 2}, ['data'])\n"
        "print('scattered', found['world']['scattered'], flush=True)\n"
    )
    launch = [
        *"-m paddle.distributed.launch --nproc_per_node 2 --max_restart 0 --log_dir".split(),
        str(tmp_path / "log"),
    ]
    done: Any = subprocess.run(
        [sys.executable, *launch, str(script)], env=launcher_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    logs = [file.read_text() for file in sorted((tmp_path / "log").glob("workerlog.*"))]
    assert len(logs) == 2
    assert all("scattered [" in log for log in logs), logs

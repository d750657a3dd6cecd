"""Two of paddle's launchers, as on two machines with one rank each: the command of docs/parallel.md, on CPUs of one
machine, with paddle's own gloo."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import reserved_port
from trainings import ALL, Trainings, assert_equal

pytestmark = pytest.mark.slow

WITHIN = 15.0
"""Seconds after a rank's death in which both launchers end; on two idle cores it takes less than two."""

Launch = Callable[[dict[str, Any]], list[subprocess.Popen[bytes]]]


@pytest.fixture
def token() -> Iterator[str]:
    """By which the processes of a test find each other; whoever still has it afterwards is ended."""
    token = secrets.token_hex(16)
    yield token
    left = processes_of(token)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, "launchers or ranks live on"


def processes_of(token: str, *more: str) -> list[int]:
    """Those with the ``token``, and ``more`` lines, in their environment."""
    marks = {f"{mark}\0".encode() for mark in (f"SFT_LAUNCH_TOKEN={token}", *more)}
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environ = path.read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
        if all(mark in environ for mark in marks):
            found.append(int(path.parent.name))
    return found


@pytest.fixture
def launch(token: str, tmp_path: Path) -> Iterator[Launch]:
    """Starts the same command twice, each in a folder ``machine0``, ``machine1`` of its own."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PADDLE_", "CUDA_"))}
    environ |= {"PADDLE_DISTRI_BACKEND": "gloo", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environ |= {"SFT_LAUNCH_TOKEN": token, "PORT_RANGE": "20000:32000"}  # below those that systems give out
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ["PATH"]])  # where sft is
    with reserved_port() as port:

        def start(settings: dict[str, Any]) -> list[subprocess.Popen[bytes]]:
            (tmp_path / "settings.json").write_text(json.dumps(settings))
            command = [sys.executable, "-m", "paddle.distributed.launch", "--master", f"127.0.0.1:{port}"]
            command += "--nnodes 2 --nproc_per_node 1 --max_restart 0 -m sft run ../settings.json".split()
            launchers = []
            for number in range(2):
                folder = tmp_path / f"machine{number}"
                folder.mkdir()
                with (folder / "launcher.log").open("wb") as log:
                    launchers.append(subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log))
            return launchers

        yield start


def ended(launchers: list[subprocess.Popen[bytes]], within: float) -> list[int | None]:
    """Their exit codes, None of one that runs on."""
    deadline = time.monotonic() + within
    while None in (codes := [launcher.poll() for launcher in launchers]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return codes


def logs(folder: Path) -> str:
    paths = sorted([*folder.glob("machine?/launcher.log"), *folder.glob("machine?/log/workerlog.*")])
    return "\n".join(f"{path.relative_to(folder)}:\n{path.read_text()}" for path in paths)


@pytest.mark.parametrize("plan", ["dp2", "stage1", "tp2"])
def test_two_launchers_learn_what_one_process_does(
    trainings: Trainings, launch: Launch, tmp_path: Path, plan: str
) -> None:
    one, settings = trainings.one(), trainings.settings(ALL[plan])
    assert ended(launch(settings), 80) == [0, 0], logs(tmp_path)
    assert_equal(one, Path(settings["output_dir"]))


@pytest.mark.parametrize(
    ("killed", "told"), [(0, "or cannot be reached any more at "), (1, "last seen ")], ids=["0", "1"]
)
def test_a_killed_rank_ends_both_launchers_and_is_named(
    trainings: Trainings, launch: Launch, token: str, tmp_path: Path, killed: int, told: str
) -> None:
    """Rank 0 serves the others: what they hear of its end is that nobody answers."""
    settings = trainings.settings(ALL["dp2"], max_steps=100_000, evaluation_strategy="no")
    launchers = launch(settings)
    metrics = Path(settings["output_dir"]) / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or '"step": 2,' not in metrics.read_text():
        assert [launcher.poll() for launcher in launchers] == [None, None], logs(tmp_path)
        assert time.monotonic() < deadline, logs(tmp_path)
        time.sleep(0.05)
    (rank,) = processes_of(token, f"PADDLE_TRAINER_ID={killed}")
    (other,) = {"machine0", "machine1"} - {Path(f"/proc/{rank}/cwd").readlink().name}
    os.kill(rank, signal.SIGKILL)
    assert all(ended(launchers, WITHIN)), logs(tmp_path)
    said = re.findall("^sft: .*", (tmp_path / other / "log" / "workerlog.0").read_text(), re.MULTILINE)
    assert len(said) == 1, logs(tmp_path)
    assert said[0].startswith(f"sft: rank {killed} ended without a word, {told}"), logs(tmp_path)

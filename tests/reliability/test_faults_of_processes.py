"""Processes that are killed, and a clock that jumps: nothing is left behind, and the last checkpoint goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from reliability.faulty import contents, environment, is_sentence, losses, run, small, typed
from reliability.figures import record
from sft.files import read_report
from sft.run_report.gather import read_run
from sft.testing import needs, write_data

pytestmark = pytest.mark.sweep  # as far as its tests are slow


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return small(tmp_path)


@pytest.fixture
def long_run(settings: dict[str, Any]) -> dict[str, Any]:
    """It goes on until it is ended."""
    return {**settings, "max_steps": 1_000_000, "save_steps": 5, "logging_steps": 1000}


def start(line: list[str], **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
        **more,
    )


def until(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.row("faults", "a second run in the folder of a running one")
def test_two_runs_in_one_folder(long_run: dict[str, Any], tmp_path: Path) -> None:
    """The second is refused while the first runs, whatever it asks for, and goes on when the first has been killed."""
    out, began = tmp_path / "out", time.monotonic()
    first = start(typed(out, long_run))
    try:
        until(lambda: list(out.glob("checkpoint-*")), first)
        asked: tuple[dict[str, Any], ...] = ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "auto"})
        for more in asked:
            second = subprocess.run(
                typed(out, long_run, **more), capture_output=True, text=True, env=environment(), timeout=60
            )
            assert second.returncode == 2
            assert second.stderr.startswith(f"sft: Another run is writing to {out} (process {first.pid} on ")
            assert second.stdout == ""
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    step = max(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*"))
    summary = run(out, long_run, resume_from_checkpoint="auto", max_steps=step + 2)
    assert summary.steps == step + 2
    record("faults", "a second run in the folder of a running one", refused=len(asked), harmed=0,
           seconds=time.monotonic() - began)  # fmt: skip


JUMPS = """
import ctypes, os, pathlib, time
import sft
from sft.training import progress

progress.TOLD_AFTER = progress.WORTH_TELLING = 0  # so short a run would not say how long it takes

class Jumps(sft.Plugin):
    # Sets the clock after some steps, and the times of all files of the run with it.

    name = "jumps"
    api_version = ">=1.1,<2"
    HOURS = {2: 5, 4: -14, 5: 30, 7: -48}

    @sft.hookimpl
    def sft_step_ended(self, record):
        seconds = 3600 * self.HOURS.get(record["step"], 0)
        ctypes.CDLL(None).clock_jumps(ctypes.c_long(seconds))
        if seconds:
            for path in pathlib.Path("OUT").rglob("*"):
                os.utime(path, (time.time(),) * 2)
        if record["step"] == 6 and "SFT_TEST_KILLED" in os.environ:
            os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.row("faults", "the clock jumps by hours, forwards and back, in a run that is killed and goes on")
def test_the_clock_jumps(settings: dict[str, Any], tmp_path: Path) -> None:
    """Nothing of a run goes by the time of day: it ends as one whose clock stands right, says the same of how long it
    takes, has its checkpoints in the order of their steps, and keeps its folder to itself."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here, which builds the clock")
    began, out, library = time.monotonic(), tmp_path / "out", tmp_path / "clock.so"
    source = str(Path(__file__).with_name("clock.c"))
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(library), source, "-ldl"], check=True)
    plugin = tmp_path / "jumps.py"
    plugin.write_text(JUMPS.replace("OUT", str(out)))
    longer = {**settings, "max_steps": 9}

    def jumping(hours: int, **more: str) -> subprocess.CompletedProcess[str]:
        """The run again, from a clock that is ``hours`` off."""
        at = {"LD_PRELOAD": str(library), "SFT_TEST_CLOCK": str(3600 * hours)}
        line = [*typed(out, longer, resume_from_checkpoint="auto"), "--plugin", str(plugin)]
        return subprocess.run(line, capture_output=True, text=True, env={**environment(), **at, **more}, timeout=100)

    killed = jumping(0, SFT_TEST_KILLED="1")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    steps = [5, 4]  # the newest two; the kill came before the save
    assert sorted((int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*")), reverse=True) == steps
    done = jumping(-1000)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-5" in done.stdout + done.stderr
    run(tmp_path / "whole", longer)
    assert contents(out) == contents(tmp_path / "whole")
    assert losses(out) == losses(tmp_path / "whole")
    log = [line for line in (out / "sft.log").read_text().splitlines() if line[:1].isdigit()]
    said = [datetime.fromisoformat(line.split(" ")[0]) for line in log]
    hours = [(later - before).total_seconds() / 3600 for before, later in pairwise(said)]
    assert {5, -14, 30, -48} <= {round(each) for each in hours}, "the clock has not jumped"
    (left, *_) = [line for line in log if " time: about " in line]
    found = re.fullmatch(r"(\S+) time: about 0:0[0-4]:\d\d for \d more steps .*, until (\d\d):(\d\d)", left)
    assert found, left
    now = datetime.fromisoformat(found[1])
    assert (60 * (int(found[2]) - now.hour) + int(found[3]) - now.minute) % 1440 <= 5, "it ends by another clock"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line.get("seconds", 0) < 100 for line in lines)
    report = read_run(out)
    assert report.status == "finished"
    assert 0 < report.seconds < 100
    assert 0 < read_report(out)["result"]["seconds"] < 100
    assert not list(out.glob("*.lock"))
    name = "the clock jumps by hours, forwards and back, in a run that is killed and goes on"
    record("faults", name, jumps=5, lost=0, seconds=time.monotonic() - began)


@pytest.mark.slow
@pytest.mark.row("faults", "{victim} is killed while data is encoded")
@pytest.mark.parametrize("victim", ["a worker", "the command"])
def test_a_process_that_encodes_data_is_killed(settings: dict[str, Any], tmp_path: Path, victim: str) -> None:
    """As the system does where memory is short: all end, and nothing is left behind."""
    began = time.monotonic()
    records = [{"src": "a coat " * 40, "tgt": f"number {number}"} for number in range(60_000)]
    data = write_data(tmp_path / "much", records)
    process = start(typed(tmp_path / "out", settings, dataset_name_or_path=str(data), dataset_num_proc=2))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers: list[int] = []

    def found() -> bool:
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        workers[:] = [int(pid) for path in tasks for pid in path.read_text().split()]
        return len(workers) == 2

    assert children.parent.exists()
    until(found, process)
    os.kill(workers[0] if victim == "a worker" else process.pid, signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    if victim == "a worker":
        assert process.returncode == 1
        (line,) = said.splitlines()
        assert (
            "A process that encodes data has ended by itself (signal 9), perhaps for lack of memory; give dataset_num_"
            in line
        )
        assert not (tmp_path / "out").exists()
    deadline = time.monotonic() + (15 if victim == "the command" else 0)
    while any(map(lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(lives, workers))
    record("faults", f"{victim} is killed while data is encoded", runs=1, left_behind=0,
           seconds=time.monotonic() - began)  # fmt: skip


def lives(pid: int) -> bool:
    """Whether the process computes: one whose parent was killed may stay in the table until somebody asks for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ranks_of(launch: int) -> list[int]:
    """The processes below the one that was typed, the launcher's aside."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
            state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        of_launch = f"SFT_TEST_LAUNCH={launch}".encode() in variables
        if of_launch and state != "Z" and any(variable.startswith(b"PADDLE_TRAINER_ID=") for variable in variables):
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@needs("parallel-4d")
@pytest.mark.row("faults", "{victim} of two processes is killed")
@pytest.mark.parametrize("victim", ["a rank", "the command"])
def test_one_of_several_processes_is_killed(long_run: dict[str, Any], tmp_path: Path, victim: str) -> None:
    """All end within seconds, nothing is left behind, and the last checkpoint goes on, on one process too."""
    out, began = tmp_path / "out", time.monotonic()
    mark = time.monotonic_ns()
    process = subprocess.Popen(
        typed(out, long_run, nproc=2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**environment(), "SFT_TEST_LAUNCH": str(mark), "TMPDIR": str(tmp_path)}, start_new_session=True,
    )  # fmt: skip
    try:
        until(lambda: list(out.glob("checkpoint-*")), process, 90)
        pids = ranks_of(mark)
        assert len(pids) == 2
        ended = time.monotonic()
        os.kill(process.pid if victim == "the command" else pids[-1], signal.SIGKILL)
        _, said = process.communicate(timeout=30)
        while ranks_of(mark) and time.monotonic() - ended < 15:
            time.sleep(0.1)
        assert not ranks_of(mark)
        if victim == "a rank":
            assert process.returncode == 1
            assert "sft: rank " in said
            assert is_sentence(said.strip().splitlines()[-1])
            assert not list(tmp_path.glob("sft-launch-*"))
            assert read_report(out)["status"] == "failed"
    finally:
        process.kill()
        for pid in ranks_of(mark):
            os.kill(pid, signal.SIGKILL)
    step = max(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*"))
    more = {"resume_from_checkpoint": "auto", "max_steps": step + 2, "per_device_train_batch_size": 4}
    assert run(out, long_run, **more).steps == step + 2
    record("faults", f"{victim} of two processes is killed", runs=1, left_behind=0, seconds=time.monotonic() - began)

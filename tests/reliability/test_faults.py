"""Faults of the machine: each ends in one sentence and a documented exit code, and earlier work stays as it was."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import sft
from reliability.figures import WHOLE, record
from reliability.full_disk import full_disk
from sft.files import read_report
from sft.run_report.gather import read_run
from sft.testing import needs, write_data

pytestmark = pytest.mark.sweep  # as far as its tests are slow

MODEL = Path(__file__).resolve().parent.parent.parent / "core" / "tests" / "fixtures" / "models" / "llama-tied-gqa"
TRAINING: dict[str, Any] = {
    "model_name_or_path": str(MODEL),
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "do_eval": False,
    "disable_tqdm": True,
    "device": "cpu",
}
LORA = {"plugin": ["lora"], "lora_dropout": 0.2}
KINDS: dict[str, dict[str, Any]] = {"all weights": {}, "LoRA": LORA}
CODES = {"disk full": errno.ENOSPC, "quota": errno.EDQUOT}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    records = [{"src": f"type#{number}", "tgt": "A coat" + " for you" * (number % 5)} for number in range(12)]
    return {**TRAINING, "dataset_name_or_path": str(write_data(tmp_path / "data", records))}


def run(out: Path, settings: dict[str, Any], **more: Any) -> sft.Summary:
    return sft.run({**settings, "output_dir": str(out), **more}, say=lambda text: None)


def contents(folder: Path) -> dict[str, bytes]:
    """All that two equal runs have in common: everything but times and paths."""
    varying = ("metrics.jsonl", "run.json", "sft.log", "state.json", "manifest.json", "report.html", "report.json")
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in varying)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def is_sentence(text: str) -> bool:
    return "\n" not in text and "Traceback" not in text and 20 < len(text) < 1000


# --- a disk that is full ------------------------------------------------------------------------------------


def fill_at_each(
    folder: Path, settings: dict[str, Any], patch: pytest.MonkeyPatch, code: int, stride: int
) -> tuple[int, int]:
    """Fill the disk from every ``stride``-th operation of a run on, then make room and resume: the operations that
    there are, and those that were tried."""
    whole, out = folder / "whole", folder / "out"
    run(whole, settings)
    patch.setattr("tempfile.tempdir", str(folder / "temporary"))
    (folder / "temporary").mkdir()
    disk = full_disk(out, patch)
    for tried, operation in enumerate(range(0, 10_000, stride)):
        shutil.rmtree(out, ignore_errors=True)
        error: BaseException | None = None
        with disk.from_operation(operation, code):
            try:
                run(out, settings)
            except (sft.SftError, OSError) as caught:
                error = caught
        if error is None:
            return disk.count, tried
        assert os.strerror(code) in str(error), (operation, error)
        assert is_sentence(str(error)), (operation, error)
        if (out / "run.json").exists():
            status = read_report(out)["status"]
            assert status in ("running", "failed", "finished")  # it may not be writable any more
            if status == "finished":
                assert contents(out) == contents(whole), operation
        run(out, settings, resume_from_checkpoint="auto")
        assert contents(out) == contents(whole), operation
        assert losses(out) == losses(whole), operation
    raise AssertionError("it never ended")


@pytest.mark.usefixtures("paddle")
def test_a_disk_is_full_at_some_operations(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, tried = fill_at_each(tmp_path, settings, monkeypatch, errno.EDQUOT, 47)
    assert count > 100
    assert tried > 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.row("faults", "{name} at each operation of a run, {kind}, resumed identically")
@pytest.mark.parametrize("kind", ["all weights", pytest.param("LoRA", marks=needs("lora"))])
@pytest.mark.parametrize("name", CODES)
@pytest.mark.usefixtures("paddle")
def test_a_disk_is_full_at_each_operation(
    settings: dict[str, Any], kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    count, tried = fill_at_each(tmp_path, {**settings, **KINDS[kind]}, monkeypatch, CODES[name], 1 if WHOLE else 7)
    record("faults", f"{name} at each operation of a run, {kind}, resumed identically",
           operations=count, tried=tried, lost=0, seconds=time.monotonic() - began)  # fmt: skip


# --- lines of 50 MB -----------------------------------------------------------------------------------------

SIZE = 50_000_000
TURNS = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well."}]
LINES: dict[str, tuple[Callable[[], str], str]] = {
    "one text": (lambda: json.dumps({"src": "a " * (SIZE // 2), "tgt": "b"}), "line 2: the record has 50,000,001 char"),
    "a million turns": (lambda: json.dumps({"messages": TURNS * (SIZE // 96)}), "line 2: the record has "),
    "no JSON": (lambda: '{"src": "' + "a" * SIZE, "line 2 is not JSON"),
    "a field that nobody reads": (lambda: json.dumps({"src": "a", "tgt": "b", "note": "c" * SIZE}), ""),
}
"""For each what is made, and what is said of it, where it is refused."""


@pytest.mark.slow
@pytest.mark.row("faults", "a line of 50 MB: {name}")
@pytest.mark.parametrize("name", LINES)
def test_a_line_of_50_mb_is_read_or_refused_in_seconds(settings: dict[str, Any], tmp_path: Path, name: str) -> None:
    make, said = LINES[name]
    first = json.dumps({"messages": TURNS} if "turns" in name else {"src": "a", "tgt": "b"})
    (tmp_path / "long.json").write_text(f"{first}\n{make()}\n")
    line = typed(tmp_path / "out", settings, dataset_name_or_path=str(tmp_path / "long.json"), max_steps=1)
    began = time.monotonic()
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=100)
    seconds = time.monotonic() - began
    assert done.returncode == (2 if said else 0), done.stderr
    if said:
        (error,) = done.stderr.splitlines()
        assert said in error
        assert is_sentence(error)
        assert not (tmp_path / "out").exists()
    assert seconds < 60  # it is 4 to 8 on an idle core, most of them for paddle
    record("faults", f"a line of 50 MB: {name}", MB=(tmp_path / "long.json").stat().st_size // 10**6,
           refused=int(bool(said)), read=int(not said), seconds=seconds)  # fmt: skip


# --- whole processes ----------------------------------------------------------------------------------------


def typed(out: Path, settings: dict[str, Any], **more: Any) -> list[str]:
    """``sft run`` with these settings."""
    line = [sys.executable, "-m", "sft", "run"]
    for name, value in {**settings, "output_dir": str(out), **more}.items():
        line += [
            f"--{name}",
            ",".join(value)
            if isinstance(value, list)
            else str(value).lower()
            if isinstance(value, bool)
            else str(value),
        ]
    return line


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


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


@pytest.fixture
def long_run(settings: dict[str, Any]) -> dict[str, Any]:
    """It goes on until it is ended."""
    return {**settings, "max_steps": 1_000_000, "save_steps": 5, "logging_steps": 1000}


@pytest.mark.slow
@pytest.mark.row("faults", "the system refuses to write on within a file")
def test_the_size_of_files_is_limited(settings: dict[str, Any], tmp_path: Path) -> None:
    """The system itself refuses to write on, in the midst of a file."""
    began = time.monotonic()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(typed(tmp_path / "out", settings), capture_output=True, text=True, env=environment(),
                          timeout=60, preexec_fn=limit)  # fmt: skip
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("sft: ")
    assert "File too large" in line
    assert is_sentence(line)
    assert read_report(tmp_path / "out")["status"] == "failed"
    assert not list((tmp_path / "out").glob("*.safetensors"))
    run(tmp_path / "out", settings, resume_from_checkpoint="auto")
    run(tmp_path / "whole", settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    record("faults", "the system refuses to write on within a file", runs=1, lost=0, seconds=time.monotonic() - began)


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

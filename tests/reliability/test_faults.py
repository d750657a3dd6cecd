"""Faults of the machine: each ends in one sentence and a documented exit code, and earlier work stays as it was."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft
from reliability.figures import WHOLE, record
from reliability.full_disk import full_disk
from sft.files import read_report
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
KINDS = [pytest.param({}, id="full"), pytest.param(LORA, id="lora", marks=needs("lora"))]


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
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["disk full", "quota"])
@pytest.mark.usefixtures("paddle")
def test_a_disk_is_full_at_each_operation(
    settings: dict[str, Any], kind: dict[str, Any], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    began = time.monotonic()
    count, tried = fill_at_each(tmp_path, {**settings, **kind}, monkeypatch, code, 1 if WHOLE else 7)
    name = {errno.ENOSPC: "disk full", errno.EDQUOT: "quota"}[code]
    record("faults", f"{name} at each operation of a run, {'LoRA' if kind else 'all weights'}, resumed identically",
           operations=count, tried=tried, lost=0, seconds=time.monotonic() - began)  # fmt: skip


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
def test_the_size_of_files_is_limited(settings: dict[str, Any], tmp_path: Path) -> None:
    """The system itself refuses to write on, in the midst of a file."""

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_process_that_encodes_data_is_killed(settings: dict[str, Any], tmp_path: Path) -> None:
    """As the system does where memory is short."""
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
    os.kill(workers[0], signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    (line,) = said.splitlines()
    assert (
        "A process that encodes data has ended by itself (signal 9), perhaps for lack of memory; give dataset_num_"
        in line
    )
    assert not (tmp_path / "out").exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


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

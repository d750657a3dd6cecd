"""The board shows runs as they are, and what its buttons ask a run does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

import sft
from sft.folder_lock import FolderLock
from sft_ui_board import watch
from sft_ui_board.command import command
from sft_ui_board.watch import Watched, log_of, memory_of, seconds_left

Train = Callable[..., sft.Summary]
RunFolder = Callable[..., Path]


def quiet(text: str) -> None:
    raise AssertionError(text)


@pytest.fixture
def seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has changed is read again at the next look."""
    monkeypatch.setattr(watch, "SHARE", 0.0)
    monkeypatch.setattr(watch, "LOOK_EVERY", 0.0)


# --- what is shown ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("seen_at_once")
def test_a_run_is_followed_and_seen_to_have_died(board: Any, run_folder: RunFolder, tmp_path: Path) -> None:
    """Its lock goes with its process, whatever run.json says; what it has said is still there."""
    assert board.ask("/api/runs").json["runs"] == []
    folder = run_folder("of/today/out")
    lock = FolderLock(folder, quiet)
    answer = board.ask("/api/runs").json
    (line,) = answer["runs"]
    assert (line["id"], line["status"], line["step"], line["total_steps"]) == ("of/today/out", "running", 3, 10)
    assert line["loss"] == 2.7
    assert 0 < answer["machine"]["used"] < answer["machine"]["total"] == psutil.virtual_memory().total
    one = board.ask("/api/run?run=of%2Ftoday%2Fout").json
    assert one["status"] == "running"
    assert one["holder"].startswith(f"process {os.getpid()} on ")
    assert one["loss"] == 2.7
    assert one["memory"] > 2**20
    assert one["log"] == ["2026-01-02T03:04:06+00:00 model: 12 parameters"]
    assert [curve["chart"] for curve in one["report"]["curves"]][:2] == ["loss", "learning_rate"]
    # What the page has is not sent again; what has come is.
    again = board.ask(f"/api/run?run=of%2Ftoday%2Fout&seen={one['seen']}&log_seen={one['log_seen']}").json
    assert "report" not in again
    assert "log" not in again
    assert again["loss"] == 2.7
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "epoch": 0.4, "loss": 2.0, "seconds": 1.0, "tokens": 5}) + "\n")
    assert board.ask(f"/api/run?run=of%2Ftoday%2Fout&seen={one['seen']}").json["report"]["step"] == 4
    said = (folder / "run.lock").read_bytes()
    lock.release()
    (folder / "run.lock").write_bytes(said)  # a process that is killed leaves its file, and no lock
    dead = board.ask("/api/run?run=of%2Ftoday%2Fout").json
    assert (dead["status"], dead["holder"], dead["left"], dead["asked"]) == ("died", None, None, [])
    assert dead["log"] == one["log"]
    assert board.ask("/api/runs").json["runs"][0]["status"] == "died"


@pytest.mark.usefixtures("seen_at_once")
def test_a_run_that_cannot_be_read_is_named_and_one_that_goes_vanishes(
    board: Any, run_folder: RunFolder, tmp_path: Path
) -> None:
    run_folder("good", status="finished", result={"steps": 3, "seconds": 6.0})
    folder = run_folder("bad")
    (folder / "run.json").write_text('{"status": "run')
    lines = {line["id"]: line for line in board.ask("/api/runs").json["runs"]}
    assert (lines["good"]["status"], lines["bad"]["status"]) == ("finished", "unreadable")
    assert "run.json" in board.ask("/api/run?run=bad").json["fault"]
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    gone = board.ask("/api/run?run=bad")
    assert (gone.status, gone.json["error"]) == (404, f"There is no run bad in {tmp_path} any more.")
    assert [line["id"] for line in board.ask("/api/runs").json["runs"]] == ["good"]


def test_the_folder_may_be_a_run_itself(tmp_path: Path, run_folder: RunFolder) -> None:
    found = watch.Watch(run_folder("out"))
    assert [line["id"] for line in found.lines()] == ["."]


def test_the_time_that_is_left_is_that_of_the_last_steps_and_evaluations() -> None:
    """Lines every 5 steps; 2 s a step, but 10 s for the first five; an evaluation of 30 s at step 110; 200 to go."""
    steps = list(range(5, 155, 5))
    moments = SimpleNamespace(steps=steps, seconds=[50.0 + 2.0 * (step - 5) for step in steps])
    evaluations = [{"step": 0, "eval_seconds": 99.0}, {"step": 110, "eval_seconds": 30.0}]
    evaluations.append({"step": 120, "eval_seconds": "long"})  # somebody has edited the file
    report = SimpleNamespace(total_steps=350, step=150, seconds=340.0, moments=moments, evaluations=evaluations)
    # The last 20 lines are 100 steps, which took 200 s and an evaluation.
    assert seconds_left(report, age=0.0) == pytest.approx(200 * 230 / 100)
    assert seconds_left(report, age=60.0) == pytest.approx(400)
    assert seconds_left(report, age=1e6) == 0.0
    first = SimpleNamespace(steps=[5], seconds=[50.0])

    def left(moments: Any, total: int | None, step: int = 5, seconds: float = 50.0) -> float | None:
        report = SimpleNamespace(total_steps=total, step=step, seconds=seconds, moments=moments, evaluations=[])
        return seconds_left(report, 0.0)

    assert left(first, 15) == pytest.approx(100)
    assert left(SimpleNamespace(steps=[], seconds=[]), 15) is None
    assert left(first, None) is None
    # Twenty steps more have come without a line, in 30 s: 80 s for 25.
    assert left(first, 125, step=25, seconds=80.0) == pytest.approx(100 * 80 / 25)
    # Of ten steps since the evaluation of step 150 the time is known: 340 s of lines, and 40 s.
    evaluations.append({"step": 150, "eval_seconds": 0.0})
    report.step, report.seconds = 160, 380.0
    assert seconds_left(report, age=0.0) == pytest.approx(190 * (230 + 40) / (100 + 10))


def test_a_run_is_read_again_when_it_has_made_a_step(tmp_path: Path, run_folder: RunFolder) -> None:
    """Also where none of its steps has a line yet."""
    folder = run_folder("out")
    watched = Watched(folder)
    watched.look(tmp_path)
    before = watched.reads
    watched.look(tmp_path)
    assert watched.reads == before
    (folder / "steps.bin").write_bytes(b"sft steps, 1\n\0\0\0" + bytes(16))
    watched.look(tmp_path)
    after = watched.reads
    with (folder / "steps.bin").open("ab") as file:
        file.write(bytes(16 * 40))
    watched.look(tmp_path)
    assert before < after < watched.reads
    assert watched.report is not None
    assert watched.report.step == 41


def test_reading_takes_a_twentieth_of_the_time(
    run_folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on the same machine needs it more than the board does."""
    folder, now = run_folder(), [1000.0]
    read_run = sft.read_run

    def slow(place: Path) -> Any:
        now[0] += 3.0
        return read_run(place)

    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    monkeypatch.setattr(sft, "read_run", slow)
    run, lock = Watched(folder), FolderLock(folder, quiet)
    run.look(tmp_path)
    reads = [run.reads]
    for step in (4, 5):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
        for later in (50.0, 10.0):
            now[0] += later
            run.look(tmp_path)
            reads.append(run.reads)
    assert [run.report.step, len(set(reads))] == [5, 3]
    assert reads[0] == reads[1] != reads[2] == reads[3] != reads[4]
    now[0] += 1e6
    run.look(tmp_path)  # nothing has changed
    assert run.reads == reads[-1]
    run.look(tmp_path)
    (folder / "run.json").write_text((folder / "run.json").read_text().replace("running", "finished"))
    lock.release()
    run.look(tmp_path)  # the run needs nothing any more, and what came of it is shown
    assert run.status == "finished"


def test_of_a_log_the_end_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOG_BYTES", 40)
    monkeypatch.setattr(watch, "LOG_LINES", 3)
    assert log_of(tmp_path) == []
    (tmp_path / "sft.log").write_text("".join(f"line {number}\n" for number in range(100)))
    assert log_of(tmp_path) == ["line 97", "line 98", "line 99"]
    (tmp_path / "sft.log").write_text("short\nlog\n")
    assert log_of(tmp_path) == ["short", "log"]


def test_the_memory_of_a_process_that_is_not_here_is_not_known() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert memory_of(None) is None
    assert memory_of(SimpleNamespace(pid=os.getpid(), is_here=False)) is None
    assert memory_of(SimpleNamespace(pid=child.pid, is_here=True)) is None


# --- what it asks of runs -----------------------------------------------------------------------------------


def test_buttons_leave_files_that_the_run_obeys(board: Any, run_folder: RunFolder) -> None:
    folder = run_folder()
    lock = FolderLock(folder, quiet)
    (folder / "SAVE").write_text("an old one")
    os.utime(folder / "SAVE", (0, 0))  # of before the run: it has asked nothing of it
    assert board.ask("/api/run?run=out").json["asked"] == []
    for kind in ("stop", "evaluate"):
        assert board.ask(f"/api/ask?run=out&what={kind}", "POST").json == {"asked": kind}
    assert (folder / "STOP").read_bytes() == (folder / "EVALUATE").read_bytes() == b""
    assert board.ask("/api/run?run=out").json["asked"] == ["stop", "evaluate"]
    assert board.ask("/api/ask?run=out&what=save", "POST").status == 200
    assert (folder / "SAVE").read_text() == "an old one"  # touched, which asks anew
    assert board.ask("/api/run?run=out").json["asked"] == ["stop", "save", "evaluate"]
    (folder / "STOP").unlink()
    (folder / "STOP").mkdir()
    refused = board.ask("/api/ask?run=out&what=stop", "POST")
    assert (refused.status, "is no plain file" in refused.json["error"]) == (409, True)
    refused = board.ask("/api/ask?run=out&what=remove", "POST")
    assert (refused.status, refused.json["error"]) == (
        409,
        "There is nothing to ask of a run but stop, save, evaluate.",
    )
    lock.release()
    refused = board.ask("/api/ask?run=out&what=evaluate", "POST")
    assert (refused.status, "so nobody would obey." in refused.json["error"]) == (409, True)


@pytest.mark.slow
@pytest.mark.usefixtures("seen_at_once")
def test_a_run_that_trains_saves_evaluates_and_stops(train: Train, board: Any, tmp_path: Path) -> None:
    class Slow(sft.Plugin):
        name = "slow"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            time.sleep(0.05)

    def work() -> None:
        train("out", (Slow,), max_steps=2000, logging_steps=1, save_strategy="no", evaluation_strategy="no")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        one = board.until("/api/run?run=out", lambda run: run.get("report", {}).get("step", 0) > 1)
        assert one["status"] == "running"
        assert one["left"] > 10
        assert any("dev data before training" in line for line in one["log"])
        for kind in ("save", "evaluate", "stop"):
            assert board.ask(f"/api/ask?run=out&what={kind}", "POST").status == 200
    finally:
        if (tmp_path / "out").is_dir():
            (tmp_path / "out" / "STOP").touch()
        thread.join(100)
    one = board.until("/api/run?run=out", lambda run: run["status"] == "finished")
    report = one["report"]
    assert report["result"]["stopped_early"]["reason"] == f"the file {tmp_path / 'out' / 'STOP'} asks for it"
    assert len(report["checkpoints"]) == 1
    assert any("as the file EVALUATE in" in line for line in one["log"])
    assert not [name for name in ("STOP", "SAVE", "EVALUATE") if (tmp_path / "out" / name).exists()]


# --- the command --------------------------------------------------------------------------------------------


def test_what_cannot_be_served_is_refused_in_a_sentence(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    for arguments, sentence in (
        ([str(tmp_path / "none")], "is no folder; give the one that your runs are written to."),
        ([str(tmp_path), "--port", str(port)], f"cannot listen at 127.0.0.1, port {port} (Address already in use);"),
        ([str(tmp_path), "--host", "203.0.113.7"], "cannot listen at 203.0.113.7, port 8377 ("),
    ):
        found = CliRunner().invoke(command, arguments)
        assert isinstance(found.exception, sft.UsageError)
        assert sentence in str(found.exception)
    taken.close()


@pytest.mark.slow
def test_it_prints_its_address_and_ends_with_a_signal(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "sft", "board", str(tmp_path), "--port", "0"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == f"the board of the runs in {tmp_path}; Ctrl-C ends it, and no run\n"
    address, token = process.stdout.readline().strip().split("/#")
    assert address.startswith("http://127.0.0.1:")
    assert len(token) == 64
    request = urllib.request.Request(f"{address}/api/runs", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:  # it listens already, and answers when it is ready
        assert json.load(answer)["folder"] == str(tmp_path)
    with urllib.request.urlopen(address, timeout=60) as answer:
        assert "server" not in answer.headers
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, "")

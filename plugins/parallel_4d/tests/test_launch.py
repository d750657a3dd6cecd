"""``sft run --nproc N`` through paddle's launcher, with small programs in place of sft: real processes, no model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sft
from sft_parallel_4d.deaths import Deaths
from sft_parallel_4d.launch import LostError, _held, _lost, _own_folder, launch, start

PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
import sft
from sft_parallel_4d import last_words
from sft_parallel_4d.watch import Watch

deed, folder = sys.argv[1], Path(sys.argv[2])
rank, world = int(os.environ["PADDLE_TRAINER_ID"]), int(os.environ["PADDLE_TRAINERS_NUM"])
(folder / f"pid{rank}").write_text(str(os.getpid()))
names = "CUDA_VISIBLE_DEVICES", "FLAGS_selected_gpus", "PADDLE_DISTRI_BACKEND"
(folder / f"devices{rank}").write_text(str([os.environ.get(name) for name in names]))
print("hello from", rank, flush=True)
print("quietly", rank, file=sys.stderr, flush=True)
watch = Watch(rank, world, 1 if deed == "stopped" else 60, last_words.report)
try:
    if rank == 1 and deed == "early":
        raise LookupError("before the ranks meet")
    watch.start()
    if deed == "end":
        child = subprocess.Popen(["sleep", "100"], start_new_session=True)
        (folder / f"pid{world + rank}").write_text(str(child.pid))
        while not (folder / "heard").exists():
            time.sleep(0.01)
        print("the end", flush=True)
        watch.stop()
        sys.exit()
    if deed == f"usage{rank}":
        time.sleep(0.8)
        raise sft.UsageError("lora_rank is 0; give a number above 0.")
    if rank == 1:
        time.sleep(0 if deed == "stopped" else 0.8)
        if deed == "bug":
            None.nothing
        if deed == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
    watch.enter("step 1")
    if deed in ("wait", "stopped"):
        time.sleep(100)
    time.sleep(1.0)
    raise RuntimeError("connection closed by peer")
except Exception as error:
    last_words.failed(error, rank, watch)
    if isinstance(error, sft.UsageError):
        print("sft:", error, file=sys.stderr)
        sys.exit(2)
    raise
"""
BY_HAND = """
import sys
from sft_parallel_4d.launch import start
print("exit code", start(["program", "wait", sys.argv[1]], 2, print))
"""

Program = Callable[[str], int]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """Starts two ranks of the program above, one of which is to fail."""
    prepare(tmp_path, monkeypatch)
    yield lambda deed: start(["program", deed, str(tmp_path)], 2, print)
    nothing_is_left(tmp_path)


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "program.py").write_text(PROGRAM)
    (folder / "temporary").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, sys.path)]))
    monkeypatch.setenv("TMPDIR", str(folder / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)


def nothing_is_left(folder: Path) -> None:
    pids = [int(path.read_text()) for path in folder.glob("pid*")]
    deadline = time.monotonic() + 5  # who has been killed is gone a moment later, on a busy machine
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    assert list((folder / "temporary").iterdir()) == []


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("visible", ["", pytest.param("0", marks=pytest.mark.slow)], ids=["none", "device cpu"])
def test_rank_0_is_heard_live_and_alone_and_no_rank_sees_a_gpu(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    """Where the user hides them all, and where the run is on CPUs while a machine has one GPU for two ranks."""
    prepare(tmp_path, monkeypatch)
    monkeypatch.setenv("PADDLE_MASTER", "192.0.2.1:1")  # of another job
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    said: list[str] = []

    def hear(line: str) -> None:
        said.append(line)
        (tmp_path / "heard").touch()  # without it the ranks do not end

    assert start(["program", "end", str(tmp_path)], 2, hear, on_cpu=visible != "") == 0
    nothing_is_left(tmp_path)
    for rank in range(2):
        assert (tmp_path / f"devices{rank}").read_text() == "['', None, 'gloo']"
    assert said == ["hello from 0", "the end"]
    assert capfd.readouterr() == ("", "quietly 0\n")


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_refusal_in_one_rank_ends_all_and_is_told_once(
    program: Program, capfd: pytest.CaptureFixture[str], rank: int
) -> None:
    with pytest.raises(sft.UsageError) as caught:
        program(f"usage{rank}")
    assert str(caught.value) == f"rank {rank}: lora_rank is 0; give a number above 0."
    assert not isinstance(caught.value, LostError)
    assert caught.value.exit_code == 2
    assert capfd.readouterr().err == "quietly 0\n"


@pytest.mark.slow
def test_a_bug_in_one_rank_keeps_its_traceback(program: Program, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(sft.SftError) as caught:
        program("bug")
    text = "AttributeError: 'NoneType' object has no attribute 'nothing'"
    assert (str(caught.value), caught.value.exit_code) == (f"rank 1: {text}", 1)
    errors = capfd.readouterr().err
    assert re.fullmatch(rf"quietly 0\nTraceback .*\n(  .*\n)+{text}\n", errors), errors


@pytest.mark.slow
def test_an_error_before_the_ranks_meet(program: Program) -> None:
    with pytest.raises(sft.SftError, match=r"^rank 1: LookupError: before the ranks meet$"):
        program("early")


def test_a_rank_is_killed(program: Program) -> None:
    killed = r"^rank 1 (ended without a word, last seen after |was killed by signal 9)"
    with pytest.raises(LostError, match=killed) as caught:
        program("killed")
    assert caught.value.ranks == (1,)


@pytest.mark.parametrize(("own_error", "lost"), [(False, (3,)), (True, ())])
def test_who_was_killed_is_known_from_the_others_where_nobody_looked_in_time(
    tmp_path: Path, own_error: bool, lost: tuple[int, ...]
) -> None:
    """The launcher has seen rank 0 end first, which heard of it. An error of a rank's own comes first."""
    (tmp_path / "launcher.log").write_text("Container rank 0 status failed cmd x code 1 log y")
    record = {"text": "whatever people are told", "sure": True, "relayed": True, "gone": [3]}
    own = {"text": "rank 1: LookupError: no", "sure": True, "relayed": False, "gone": []}
    assert _lost(tmp_path, [record, own] if own_error else [record], Deaths(tmp_path)) == lost


def test_a_rank_stands_still(program: Program) -> None:
    """A stopped process does not hear that it should end."""
    with pytest.raises(sft.SftError) as caught:
        program("stopped")
    named = r"rank 1 is missing: the others have waited 1 s in 'step 1'; rank 1 has been silent for \d s, last seen .*"
    assert re.fullmatch(named, str(caught.value)), caught.value


@pytest.fixture
def by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """A process that has started two ranks, both of which wait."""
    prepare(tmp_path, monkeypatch)
    process = subprocess.Popen(
        [sys.executable, "-c", BY_HAND, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # a shell's background job has none
    )
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP))]
)
def test_interrupting_ends_all(by_hand: subprocess.Popen[str], tmp_path: Path, number: int) -> None:
    began = time.monotonic()
    os.killpg(by_hand.pid, number)  # as a terminal does
    output, _ = by_hand.communicate(timeout=20)
    assert by_hand.returncode == 128 + number, output
    assert time.monotonic() - began < 8
    assert "hello from 0" in output
    nothing_is_left(tmp_path)


def test_ranks_end_with_the_process_that_started_them(by_hand: subprocess.Popen[str], tmp_path: Path) -> None:
    pids = [int(path.read_text()) for path in tmp_path.glob("pid*")]
    assert len(pids) == 2
    by_hand.kill()
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def test_what_a_killed_launch_left_goes_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: not what somebody holds, what is new, or a link."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("sft-launch-left", "sft-launch-held", "sft-launch-new", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text("{}")
        if name != "sft-launch-new":
            os.utime(tmp_path / name, (1, 1))
    (tmp_path / "sft-launch-link").symlink_to(tmp_path / "other", target_is_directory=True)
    with _held(tmp_path / "sft-launch-held"), _own_folder() as folder:
        assert {path.name for path in tmp_path.iterdir()} == {
            *("sft-launch-held", "sft-launch-new", "sft-launch-link", "other", folder.name)
        }
        with pytest.raises(OSError), _held(folder):
            pytest.fail("it is held by its launch")
    assert (tmp_path / "other" / "settings.json").exists()
    assert not folder.exists()


@pytest.mark.slow
def test_sft_itself_is_what_the_ranks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks refuse the settings, which reach them, before any rank has met another."""
    prepare(tmp_path, monkeypatch)
    values = {
        "model_name_or_path": "m",
        "dataset_name_or_path": str(tmp_path / "nowhere"),
        "output_dir": "o",
        "nproc": 2,
    }
    with pytest.raises(sft.UsageError, match=r"^rank [01]: Model m does not exist"):
        launch({**values, "nproc": 2}, 2, print)
    nothing_is_left(tmp_path)


def test_a_rank_does_not_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    with pytest.raises(sft.UsageError, match="already one of several processes"):
        launch({}, 2, print)


def test_the_launcher_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepare(tmp_path, monkeypatch)
    monkeypatch.setenv("PADDLE_SORT_IP", "perhaps")
    with pytest.raises(sft.SftError, match=r"Paddle's launcher ended with exit code 1[^$]*Invalid truth value"):
        launch({}, 2, print)
    nothing_is_left(tmp_path)


@pytest.mark.parametrize(("device", "on_cpu"), [("cpu", True), ("gpu", False), (None, False)])
def test_a_run_on_cpus_starts_its_ranks_on_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str | None, on_cpu: bool
) -> None:
    monkeypatch.setattr("sft_parallel_4d.launch.start", lambda *given: int(given[4]))
    assert launch({"device": device, "nproc": 2}, 2, print) == on_cpu

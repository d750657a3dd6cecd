"""Two runs in one folder: the second is refused, whoever holds the lock and however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy_plugins import toy

import sft
from sft import folder_lock
from sft.files import read_report
from sft.folder_lock import FolderLock, Holder, check_unused, holder_of, is_used

Train = Callable[..., sft.Summary]

HOLD = """
import sys, time
from pathlib import Path
from sft.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), print)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silence that a test can wait for."""
    monkeypatch.setattr(folder_lock, "BEAT", 0.1)
    monkeypatch.setattr(folder_lock, "SILENCE", 1.0)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """A disk without locks."""

    def flock(handle: int, kind: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)


def quiet(text: str) -> None:
    raise AssertionError(text)


def of_another_machine(folder: Path, age: float = 0.0) -> Path:
    """The file of a run on another machine, whose lock this one does not know."""
    path = folder / folder_lock.NAME
    path.write_text(json.dumps({"host": "node7", "pid": 4321, "since": "2026-01-02T03:04:05", "machine": "another"}))
    os.utime(path, (time.time() - age,) * 2)
    return path


@contextmanager
def beating(path: Path) -> Iterator[None]:
    """Its owner lives."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_one_process_holds_a_folder(tmp_path: Path) -> None:
    check_unused(tmp_path, quiet)
    lock = FolderLock(tmp_path, quiet)
    assert is_used(tmp_path)
    holder = holder_of(tmp_path)
    assert holder is not None
    assert (holder.pid, holder.is_here) == (os.getpid(), True)
    message = rf"Another run is writing to .* \(process {os.getpid()} on \S+, since 2\d\d\d-\S+\); wait until it"
    for attempt in (lambda: FolderLock(tmp_path, quiet), lambda: check_unused(tmp_path, quiet)):
        with pytest.raises(sft.UsageError, match=message):
            attempt()
    lock.check()
    lock.release()
    lock.release()
    assert not list(tmp_path.iterdir())
    FolderLock(tmp_path, quiet).release()


def test_a_lock_dies_with_its_owner(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(sft.UsageError, match=f"process {process.pid} on"):
        FolderLock(tmp_path, quiet)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    assert (tmp_path / folder_lock.NAME).exists()
    assert holder_of(tmp_path) is None
    check_unused(tmp_path, quiet)
    FolderLock(tmp_path, quiet).release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_not_followed(tmp_path: Path, there: bool) -> None:
    """Whoever made the folder may have pointed it at a file of the user's."""
    if there:
        (tmp_path / "other").write_text("kept")
    (tmp_path / folder_lock.NAME).symlink_to(tmp_path / "other")
    with pytest.raises(sft.UsageError, match=r"run\.lock cannot be opened \(Too many .*links\); choose another folder"):
        FolderLock(tmp_path, quiet)
    assert [path.read_text() for path in tmp_path.glob("other")] == ["kept"] * there


def test_a_folder_that_has_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone/run\.lock"):
        FolderLock(tmp_path / "gone", quiet)


def test_a_file_that_its_owner_had_not_filled_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / folder_lock.NAME).write_text('{"host": "no')
    FolderLock(tmp_path, quiet).release()


@pytest.mark.usefixtures("quick")
def test_a_run_on_another_machine_is_seen(tmp_path: Path) -> None:
    path, said = of_another_machine(tmp_path), []
    with beating(path):
        assert holder_of(tmp_path) == Holder(4321, "node7", "2026-01-02T03:04:05", is_here=False)
        for attempt in (lambda: FolderLock(tmp_path, said.append), lambda: check_unused(tmp_path, said.append)):
            with pytest.raises(sft.UsageError, match=r"\(process 4321 on node7, since 2026-01-02T03:04:05\)"):
                attempt()
    assert said[0].startswith("note: waiting up to 1 s to see whether process 4321 on node7, since 2026-01-02T03:04:05")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("age", "seconds"), [(5.0, 0.2), (0.4, 0.6), (0.0, 1.0)])
def test_a_machine_that_is_silent_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, seconds: float
) -> None:
    """Its last sign of life may be ``age`` seconds old, by the disk: what is missing of the silence is waited for, and
    two beats in any case."""
    said: list[str] = []
    path = of_another_machine(tmp_path, 5.0)
    assert holder_of(tmp_path) is None
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, strftime=time.strftime)
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(folder_lock, "time", clock)
    monkeypatch.setattr(folder_lock, "_clock_of", lambda path: path.stat().st_mtime + age)
    FolderLock(tmp_path, said.append).release()
    assert clock.now == pytest.approx(seconds, abs=0.02)
    assert len(said) == 1
    assert not path.exists()


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("hours", [5, -5])
def test_a_clock_that_jumps_takes_no_folder_from_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """The owner has given its last sign of life before the clock was set, and gives the next one soon after."""
    lock, own = FolderLock(tmp_path, quiet), Path.touch
    monkeypatch.setattr(folder_lock, "SILENCE", 60.0)

    def touch(path: Path, *how: Any) -> None:
        own(path, *how)
        os.utime(path, (time.time() + 3600 * hours,) * 2)  # the disk's clock is what a new file of it says

    monkeypatch.setattr(Path, "touch", touch)
    said: list[str] = []
    with pytest.raises(sft.UsageError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path, said.append)
    assert said[0].startswith("note: waiting up to ")
    assert lock.is_held
    lock.release()


@pytest.mark.usefixtures("no_locks")
def test_a_disk_without_locks(tmp_path: Path) -> None:
    """The owner's time is all there is, on one machine too."""
    lock = FolderLock(tmp_path, quiet)
    assert holder_of(tmp_path) is not None
    with pytest.raises(sft.UsageError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path, lambda text: None)
    lock.release()
    assert holder_of(tmp_path) is None
    FolderLock(tmp_path, quiet).release()


def test_a_folder_that_was_taken_over_is_left_alone(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, quiet)
    path = of_another_machine(tmp_path)
    assert not lock.is_held
    with pytest.raises(sft.SftError, match=r"Another run, process 4321 on node7, since .*, has taken .* over while"):
        lock.check()
    lock.release()
    assert path.exists()


# --- whole runs ---------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_the_first_unharmed(train: Train, tmp_path: Path) -> None:
    """Also with overwrite_output_dir. What a running run has written can be measured from elsewhere."""
    refused: list[str] = []
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "do_eval": False}
    train("whole", **settings)

    def second(self: Any) -> None:
        for more in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "auto"}):
            with pytest.raises(sft.UsageError, match=rf"Another run is writing to \S+out \(process {os.getpid()} on"):
                train("out", **settings, **more)
            refused.append(str(more))

    def measure(self: Any) -> None:
        checkpoint = tmp_path / "out" / "checkpoint-1"
        train("measured", do_train=False, resume_from_checkpoint=str(checkpoint), overwrite_output_dir=True)

    train("out", (toy("second", sft_run_started=second, sft_checkpoint_saved=measure),), **settings)
    assert len(refused) == 2
    assert read_report(tmp_path / "out")["status"] == "finished"
    assert read_report(tmp_path / "measured")["status"] == "finished"
    for name in ("out", "whole"):
        found = {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        assert found == {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.safetensors")}
        assert not (tmp_path / name / folder_lock.NAME).exists()


def test_a_run_that_came_between_is_not_overwritten(train: Train, tmp_path: Path) -> None:
    """It began after this one had looked at the folder, and ended before this one wrote to it."""

    def between(self: Any) -> None:
        train("out", max_steps=1, do_eval=False)

    with pytest.raises(sft.UsageError, match=r"Another run has written to \S+out since this one began; look at"):
        train("out", (toy("between", sft_adapt_model=between),), max_steps=2, do_eval=False)
    assert read_report(tmp_path / "out")["result"]["steps"] == 1


def test_a_run_that_was_taken_over_writes_nothing_more(train: Train, tmp_path: Path) -> None:
    """It had been asleep, and another machine went on in its folder."""
    out = tmp_path / "out"
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "do_eval": False}

    def taken(self: Any) -> None:
        of_another_machine(out)
        (out / "run.json").write_text('{"status": "running", "of": "the other"}')

    with pytest.raises(sft.SftError, match="Another run, process 4321 on node7"):
        train("out", (toy("taken", sft_checkpoint_saved=taken),), **settings)
    assert read_report(out) == {"status": "running", "of": "the other"}
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not list(out.glob("*.safetensors"))

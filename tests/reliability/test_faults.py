"""Faults of the machine: each ends in one sentence and a documented exit code, and earlier work stays as it was."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft
from reliability.faulty import contents, environment, is_sentence, losses, run, small, typed
from reliability.figures import WHOLE, record
from reliability.full_disk import full_disk
from sft.files import read_report
from sft.testing import needs

pytestmark = pytest.mark.sweep  # as far as its tests are slow

LORA = {"plugin": ["lora"], "lora_dropout": 0.2}
KINDS: dict[str, dict[str, Any]] = {"all weights": {}, "LoRA": LORA}
CODES = {"disk full": errno.ENOSPC, "quota": errno.EDQUOT}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return small(tmp_path)


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

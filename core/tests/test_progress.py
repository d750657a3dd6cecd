"""What a person sees while a run goes on."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from sft.voice import Printer


def typed_in_a_terminal(*arguments: str) -> str:
    """What ``sft ...`` writes when its output is a terminal."""
    master, slave = pty.openpty()
    line = [sys.executable, "-c", "from sft.commands.cli import main; main()", *arguments]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    seen = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # Linux says so when the other side has gone
            break
        if not part:
            break
        seen += part
    os.close(master)
    assert process.wait(timeout=60) == 0
    return seen.decode("utf-8", errors="replace")


@pytest.mark.parametrize("plain", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_terminal_gets_a_bar(models: Path, dataset: Path, tmp_path: Path, plain: bool) -> None:
    """And with disable_tqdm plain lines, as a file or a pipe does."""
    values = {"model_name_or_path": models / "llama-tied-gqa", "dataset_name_or_path": dataset, "max_steps": 2}
    common = ["run", "--logging_steps", "1", "--do_eval", "false"]
    common += [part for name, value in values.items() for part in (f"--{name}", str(value))]
    seen = typed_in_a_terminal(*common, "--output_dir", str(tmp_path / "out"), *(["--disable_tqdm"] if plain else []))
    assert "2/2" in seen
    assert ("step 2/2  epoch" in seen) == plain
    assert ("\u2501" in seen) != plain


def test_a_reader_that_goes_away_does_not_end_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As behind `| head`: it is said once, on standard error."""
    reads, writes = os.pipe()
    with open(writes, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        printer = Printer("stdout")
        printer("heard")
        assert os.read(reads, 100) == b"heard\n"
        os.close(reads)
        for text in ("not heard", "nor this"):
            printer(text)
    assert capsys.readouterr().err == "note: nobody reads the output any more; the work goes on without it\n"

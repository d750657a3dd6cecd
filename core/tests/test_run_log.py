"""``sft.log``: everything that a run has said, in its folder, and never at the cost of the run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_plugins import toy

import sft
from sft.progress import Progress
from sft.run_log import NAME, RunLog

Train = Callable[..., sft.Summary]

STAMP = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d ")


def texts(folder: Path) -> list[str]:
    """What the log says, without the times, which each line has."""
    lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
    assert all(STAMP.match(line) or line.startswith("    ") for line in lines)
    return [STAMP.sub("", line) for line in lines]


def test_all_that_a_run_says_is_there_from_its_first_line_on(train: Train, tmp_path: Path) -> None:
    """Also what it had said before there was a folder; a run that goes on adds to it."""
    said: list[str] = []
    train("out", say=said.append, max_steps=2, save_strategy="steps", save_steps=1)
    assert any("chat template" in line for line in said)
    written = [line for line in "\n".join(said).splitlines() if line.strip()]
    found = texts(tmp_path / "out")
    assert [line.strip() for line in found[:-1] if line.strip()] == [line.strip() for line in written]
    assert re.fullmatch(r"the run has finished: 2 steps in \d+\.\d s", found[-1])


@pytest.mark.slow
def test_a_run_that_fails_says_of_what_and_one_that_goes_on_adds_to_it(train: Train, tmp_path: Path) -> None:
    def fail(self: Any, run: sft.Run) -> None:
        if run.step == 2:
            raise sft.UsageError("the second step\nis one too many")

    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(sft.SftError):
        train("out", (toy("fails", sft_step_ended=fail),), **settings)
    first = texts(tmp_path / "out")
    failed, report = first[-2:]
    assert failed.startswith("the run has failed: ")
    assert "the second step is one too many" in failed
    assert report.startswith("report: ")
    train("out", resume_from_checkpoint="auto", **settings)
    assert texts(tmp_path / "out")[: len(first)] == first
    assert any(line.startswith("resuming from ") for line in texts(tmp_path / "out")[len(first) :])
    train("out", overwrite_output_dir=True, max_steps=1)
    assert not any("has failed" in line for line in texts(tmp_path / "out"))


def test_a_line_for_the_log_alone_and_one_that_looks_like_two(tmp_path: Path) -> None:
    said: list[str] = []
    progress = Progress(said.append)
    log = RunLog(progress)
    progress.say("before")
    log.begin(tmp_path)
    progress.note("shown as a bar")
    forged = "2026-01-01T00:00:00+00:00 forged \x1b[2J token=hf_abcdefghijklmnopqrstuvwx"
    progress.say(f"one\n{forged}")
    progress.note(f"one\n{forged}")
    log.end()
    progress.say("of another run")
    assert said[0] == "before"
    assert "shown as a bar" not in said
    assert texts(tmp_path) == [
        "before",
        "shown as a bar",
        "one\\n2026-01-01T00:00:00+00:00 forged \\x1b[2J token=***",
        "one",
        "    2026-01-01T00:00:00+00:00 forged \\x1b[2J token=***",
    ]


def test_where_it_cannot_be_written_the_run_goes_on(tmp_path: Path) -> None:
    """A link is not followed: the file that it leads to is somebody's."""
    (tmp_path / "kept").write_text("mine")
    (tmp_path / NAME).symlink_to(tmp_path / "kept")
    said: list[str] = []
    progress = Progress(said.append)
    log = RunLog(progress)
    log.begin(tmp_path)
    progress.say("a line")
    progress.say("another")
    assert (tmp_path / "kept").read_text() == "mine"
    assert [line for line in said if "cannot be written" in line] == [
        f"note: {tmp_path / NAME} cannot be written (Too many levels of symbolic links), so it ends here"
    ]
    assert said[-1] == "another"

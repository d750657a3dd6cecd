"""Runs that are replayed, and what is found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sft.replay.opened import OpenedRun
from sft.replay.replay import replay
from sft.replay.value import Replay
from sft.training.steps_file import read_steps


def again(folder: Path, *steps: int, said: list[str] | None = None, **moved: str) -> Replay:
    """``steps`` of the run in ``folder``, computed again; its lines go to ``said``."""
    return replay(OpenedRun.of(folder, moved), steps, [].append if said is None else said.append)


def differing(folder: Path, steps: Iterable[int] | None = None) -> tuple[list[int], int]:
    """Of all steps of a run (or of ``steps``) those that are not the same to the last bit; and how many there are."""
    figures = read_steps(folder)
    assert figures is not None
    asked = list(steps or range(1, len(figures) + 1))
    found = again(folder, *asked)
    assert [one.step for one in found.steps] == asked
    for one in found.steps:
        assert one.recorded == (figures.loss[one.step - 1], figures.grad_norm[one.step - 1])
    return [one.step for one in found.steps if not one.is_same], len(asked)


def state_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All files of a folder: when each was changed, which it is, and what is in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in files}


def edited(folder: Path, **changes: Any) -> None:
    """Change what ``run.json`` says; None removes a key."""
    record = {**json.loads((folder / "run.json").read_text()), **changes}
    (folder / "run.json").write_text(json.dumps({name: value for name, value in record.items() if value is not None}))

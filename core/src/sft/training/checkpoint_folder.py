"""The checkpoints in a run's folder: which there are, which one a run goes on from, and what it says of that moment."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from sft.errors import UsageError

FORMAT = 3
"""The format in which checkpoints are written. Format 2, which holds what trains twice, can still be read."""
_KEYS = (
    *("date", "step", "epoch", "seed", "data", "loss_scale", "journal", "before", "evaluation", "best", "settings"),
    *("shaping", "plugins"),
)
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest step first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step after which ``checkpoint-N`` was written."""
    return int(folder.name.rpartition("-")[2])


def is_checkpoint(folder: Path) -> bool:
    """Whether a run has written ``folder``, whatever its name is now."""
    return (folder / "trainer" / "state.json").is_file()


def asks_to_resume(request: bool | str | None) -> bool:
    """Whether ``--resume_from_checkpoint`` asks for anything."""
    return bool(request) and str(request).lower() != "false"


def find_checkpoint(request: bool | str | None, output_dir: Path) -> Path | None:
    """What ``--resume_from_checkpoint`` asks for; None is a fresh start. Raises :class:`UsageError`."""
    if not asks_to_resume(request):
        return None
    if str(request).lower() in ("auto", "true"):
        written = checkpoints(output_dir)
        return written[-1] if written else None
    path = Path(str(request)).expanduser()
    if not is_checkpoint(path):
        raise UsageError(
            f"{path} is not a checkpoint of sft (no trainer/state.json); give a checkpoint-N folder or auto."
        )
    return path


class Checkpoint(NamedTuple):
    """A checkpoint that a run goes on from, or measures."""

    folder: Path
    state: dict[str, Any]
    """What its ``state.json`` says."""


def read_checkpoint(request: bool | str | None, output_dir: Path) -> Checkpoint | None:
    """What ``--resume_from_checkpoint`` asks for, read; None is a fresh start. Raises :class:`UsageError`."""
    folder = find_checkpoint(request, output_dir)
    return Checkpoint(folder, read_state(folder)) if folder is not None else None


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint."""
    path = folder / "trainer" / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); resume from another checkpoint.") from error
    if not isinstance(state, dict) or "format" not in state:
        raise UsageError(f"{path} is not the state of a run; resume from another checkpoint.")
    if state["format"] not in (2, FORMAT):
        raise UsageError(f"{folder} was written by another version of sft (format {state['format']}).")
    if not set(_KEYS) <= set(state):
        raise UsageError(f"{path} is not complete; resume from another checkpoint.")
    return state

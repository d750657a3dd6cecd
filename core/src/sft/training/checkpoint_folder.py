"""The checkpoints in a run's folder: which there are, which one a run goes on from, and what it says of that moment."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from sft.errors import UsageError
from sft.files import read_report
from sft.plugins.calls import a_or_an
from sft.progress import Progress
from sft.training.manifest import NAME as MANIFEST
from sft.training.manifest import damage, link_among, read_names

FORMAT = 4
"""The format in which checkpoints are written. Formats 2, which holds what trains twice, and 3 can still be read; they
have no manifest."""
_UNSEALED = (2, 3)
_NUMBER = (int, float)
_SHAPE: dict[str, Any] = {
    **{"date": (str,), "step": (int,), "epoch": _NUMBER, "seed": (int,)},
    "data": {"fingerprint": (str,), "rows_per_step": (int,), "place": (dict,)},
    "loss_scale": {"value": _NUMBER, "good_steps": (int,)},
    "journal": {
        **dict.fromkeys(("window", "total"), (dict,)),
        **dict.fromkeys(("lines", "skipped_steps"), (int,)),
        **dict.fromkeys(("first_loss", "last_loss"), (*_NUMBER, type(None))),
    },
    **dict.fromkeys(("before", "evaluation", "best", "settings", "shaping", "plugins"), (dict,)),
}
"""What ``state.json`` holds, and as what."""
_MAY_LACK = {
    **dict.fromkeys(("in_adapter", "arithmetic", "plugin_files"), (dict,)),
    "steps": {"count": (int,), "digest": (str,)},
    "earlier": (list,),
    "stopped_early": {"step": (int,), "reason": (str,)},
}
"""What earlier versions did not write, or not every checkpoint has."""
CLEARS = "clears"
"""What run.json says while a run removes what an older one has left in its folder."""
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


def is_auto(request: bool | str | None) -> bool:
    """Whether it leaves to the run which checkpoint that is."""
    return str(request).lower() in ("auto", "true")


def find_checkpoint(request: bool | str | None, output_dir: Path) -> Path | None:
    """The folder that ``--resume_from_checkpoint`` asks for, by its name alone; None is a fresh start. Raises
    :class:`UsageError`."""
    if not asks_to_resume(request):
        return None
    if is_auto(request):
        written = [] if read_report(output_dir).get(CLEARS) else checkpoints(output_dir)
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


class DamagedError(UsageError):
    """A checkpoint is not what was written; another one may be."""


def read_checkpoint(request: bool | str | None, output_dir: Path, progress: Progress) -> Checkpoint | None:
    """What ``--resume_from_checkpoint`` asks for, checked and read; None is a fresh start. With ``auto`` that is the
    newest one that is whole; a newer one is named. Raises :class:`UsageError`."""
    found = find_checkpoint(request, output_dir)
    if found is None:
        return None
    if not is_auto(request):
        return whole_checkpoint(found, progress)
    first = ""
    for folder in reversed(checkpoints(output_dir)):
        try:
            checkpoint = whole_checkpoint(folder, progress)
        except DamagedError as error:
            cause = str(error).partition("; ")[0]
            first = first or cause
            progress.say(f"note: {cause}; {folder.name} is passed over")
        else:
            return checkpoint
    raise UsageError(
        f"None of the checkpoints in {output_dir} is whole ({first}); replace the run with --overwrite_output_dir, or "
        "choose another folder."
    )


def whole_checkpoint(folder: Path, progress: Progress) -> Checkpoint:
    """The checkpoint in ``folder``, once every byte of it has been compared with its manifest; earlier versions of sft
    wrote none, which is said. Raises :class:`DamagedError`, and another :class:`UsageError` where it may be whole and
    cannot be read."""
    named = _NAME.fullmatch(folder.name or folder.resolve().name)
    sealed = (folder / MANIFEST).exists()
    state = None if sealed else read_state(folder)
    if state is not None and state["format"] in _UNSEALED:
        linked = link_among(folder, read_names(folder))
        if linked is not None:
            raise _damaged(folder, linked)
        progress.say(
            f"note: {folder.name} was written by an earlier version of sft, without a list of its files, so damage to "
            "them would go unnoticed"
        )
    else:
        try:
            wrong = damage(folder, progress)
        except OSError as error:
            raise _unreadable(folder, error) from error
        if wrong is not None:
            raise _damaged(folder, wrong)
        state = read_state(folder)
    if named and state["step"] != int(named[1]):
        raise _damaged(folder, f"its state is that of step {state['step']}")
    return Checkpoint(folder, state)


def looks_whole(folder: Path) -> bool:
    """Whether nothing of a checkpoint is missing or cut off, as far as can be told without reading it all."""
    try:
        state = read_state(folder)
        return state["format"] in _UNSEALED or damage(folder) is None
    except (UsageError, OSError):
        return False


def _damaged(folder: Path, how: str) -> DamagedError:
    return DamagedError(f"{folder} is damaged: {how}; resume from another checkpoint.")


def _unreadable(folder: Path, error: OSError) -> UsageError:
    """It may be whole, and newer than the others: no run goes back behind it because of permissions, or of a disk that
    fails for a moment."""
    return UsageError(
        f"{error.filename or folder} cannot be read ({error.strerror or error}), so nobody can tell whether "
        f"{folder.name} is whole; check the disk and the permissions, or name another checkpoint to resume from."
    )


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint."""
    path = folder / "trainer" / "state.json"
    cure = "resume from another checkpoint."
    linked = link_among(folder, ["trainer/state.json"])
    if linked is not None:
        raise _damaged(folder, linked)
    if path.exists() and not path.is_file():  # to read a named pipe would wait for ever
        raise _damaged(folder, "trainer/state.json is no file")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read ({error}); {cure}") from error
    except OSError as error:
        raise _unreadable(folder, error) from error
    if not isinstance(state, dict) or "format" not in state:
        raise DamagedError(f"{path} is not the state of a run; {cure}")
    if state["format"] not in (*_UNSEALED, FORMAT):  # by a later one it may be whole, so it is not passed over
        raise UsageError(f"{folder} was written by another version of sft (format {state['format']}).")
    wrong = _difference(state, _SHAPE | {key: kinds for key, kinds in _MAY_LACK.items() if key in state})
    if wrong is None:
        try:
            datetime.fromisoformat(state["date"])
        except ValueError:
            wrong = f"holds {state['date']!r} as date"
    if wrong is not None:
        raise DamagedError(f"{path} {wrong}; {cure}")
    return state


def saved_step(folder: Path) -> int | None:
    """The step after which the checkpoint in ``folder`` was written, whatever its name is now; None where nobody can
    tell."""
    try:
        return int(read_state(folder)["step"])
    except UsageError:
        return None


def _difference(value: dict[str, Any], shape: dict[str, Any], within: str = "") -> str | None:
    """What a state lacks, or has as another type; a clause."""
    for key, kinds in shape.items():
        if key not in value:
            return f"is not complete: {within}{key} is missing"
        found, nested = value[key], isinstance(kinds, dict)
        if type(found) not in ((dict,) if nested else kinds):
            return f"holds {a_or_an(type(found).__name__)} as {within}{key}"
        wrong = _difference(found, kinds, f"{within}{key}.") if nested else None
        if wrong is not None:
            return wrong
    return None

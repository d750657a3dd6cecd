"""What a run is asked from outside: files named STOP, SAVE and EVALUATE in its folder, which it obeys and removes."""

from __future__ import annotations

import os
import stat
from datetime import datetime
from pathlib import Path

import sft

KINDS = ("stop", "save", "evaluate")


def ask(folder: Path, kind: str) -> None:
    """Ask it of the run in ``folder``. A file of that name that is there is touched, and keeps what it says. Raises
    :class:`sft.UsageError` where nobody would obey."""
    if sft.holder_of(folder) is None:
        raise sft.UsageError(f"No process writes to {folder} now, so nobody would obey.")
    path = folder / kind.upper()
    try:
        # Empty, and so there at once: the run never finds half a reason.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    except FileExistsError:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise sft.UsageError(f"{path} is there and is no plain file, which no run obeys; remove it.") from None
        os.utime(path, follow_symlinks=False)


def asked(folder: Path, started: str | None) -> list[str]:
    """What the run that has ``started`` then is asked and has not done yet."""
    try:
        since = datetime.fromisoformat(started).timestamp() if started else 0.0
    except ValueError:
        since = 0.0
    found = []
    for kind in KINDS:
        try:
            there = (folder / kind.upper()).lstat()
        except OSError:
            continue
        if stat.S_ISREG(there.st_mode) and there.st_mtime >= since:  # an older one is obeyed by nobody
            found.append(kind)
    return found

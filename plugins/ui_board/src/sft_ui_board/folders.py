"""Which folders below RUNS_DIR hold runs. No path leaves it: links are not followed, and a run whose files are links
that lead out, or no plain files, is named and not read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

DEPTH = 4
"""Folders below RUNS_DIR that are looked into, one in the other."""
MOST = 500
"""Runs that are found."""
_MOST_FOLDERS = 20_000


def runs_in(root: Path) -> dict[str, Path]:
    """The folders that hold a run, by their path in ``root``; the newest run.json first. ``root`` itself may be one."""
    found = {}
    for folder in islice(_folders(root), _MOST_FOLDERS):
        try:
            written = (folder / "run.json").lstat()
        except OSError:
            continue
        if stat.S_ISREG(written.st_mode):
            found[str(folder.relative_to(root))] = (written.st_mtime_ns, folder)
    newest = sorted(found.items(), key=lambda one: one[1][0], reverse=True)[:MOST]
    return {name: folder for name, (_, folder) in newest}


def _folders(root: Path) -> Iterator[Path]:
    """``root`` and those in it, level by level; those in a run are its own."""
    level = [root]
    for _ in range(DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            yield folder
            if not (folder / "run.json").exists():
                below += _within(folder)
        level = below


def _within(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [one.name for one in entries if one.is_dir(follow_symlinks=False) and not one.name.startswith(".")]
    except OSError:  # it is not ours to read, or has gone
        return []
    return [folder / name for name in sorted(names)]


def strange_file(folder: Path, root: Path) -> str | None:
    """The name of a file of a run that must not be read: a link that leads out of ``root``, or a pipe or device that
    would hold the board up. None if there is none."""
    inside = os.path.realpath(root)
    with os.scandir(folder) as entries:
        for one in entries:
            leads = os.path.realpath(one.path)
            if os.path.commonpath([inside, leads]) != inside or not _is_plain(leads):
                return one.name
    return None


def _is_plain(path: str) -> bool:
    """Whether reading it comes to an end; what is not there is not read at all."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return True
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)

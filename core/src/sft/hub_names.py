"""Names of models on the hub: ``owner/name``, and ``owner/name@revision`` for one state of it."""

from __future__ import annotations

import re
from pathlib import Path

_PART = r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._/+-]{0,254}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_name(name_or_path: str) -> bool:
    """Whether a model is named that is not here, so that reading anything of it may take a download."""
    name, at, revision = name_or_path.partition("@")
    is_one = _NAME.fullmatch(name) is not None and (not at or is_revision(revision))
    return is_one and not _is_here(name_or_path)


def is_revision(text: str) -> bool:
    """Whether ``text`` can be a branch, a tag or a commit."""
    return _REVISION.fullmatch(text) is not None


def split(name_or_path: str) -> tuple[str, str | None]:
    """``owner/name@revision`` → the name and the revision; whatever else, with None."""
    if not is_hub_name(name_or_path) or "@" not in name_or_path:
        return name_or_path, None
    name, _, revision = name_or_path.partition("@")
    return name, revision


def in_cache(folder: Path) -> tuple[Path, str] | None:
    """Where a model of the hub lies in the hub's cache: the folder of all its states, to whose files those of this one
    are links, and the commit. None of any other folder."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent, folder.name
    return None


def commit_of(folder: Path) -> str | None:
    """``owner/name@commit`` of a folder in the hub's cache; None of any other."""
    found = in_cache(folder)
    if found is None or not _COMMIT.fullmatch(found[1]):
        return None
    return f"{found[0].name.removeprefix('models--').replace('--', '/', 1)}@{found[1]}"


def _is_here(name_or_path: str) -> bool:
    try:
        return Path(name_or_path).exists()
    except (OSError, ValueError):
        return False

"""The manifest of a checkpoint: which files it consists of and what is in each, so that damage is noticed.

``trainer/manifest.json`` is written when all other files are there, and the folder gets its name afterwards. It has the
size and SHA-256 of each file. A checkpoint is whole if its files are those, bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import Any

from sft.model_files import PICKLED
from sft.progress import Progress

NAME = "trainer/manifest.json"
FORMAT = 1
_READ = (".safetensors", ".json", *PICKLED)
"""What readers of a model, and a run, look for in a folder. Of another kind anything may lie beside it."""
_CHUNK = 1 << 20
_THREADS = 4


def write_manifest(folder: Path) -> None:
    """Close the checkpoint that is being filled in ``folder``; what comes later does not belong to it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    digests = _digests(paths)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    (folder / NAME).write_text(_text({"format": FORMAT, "files": files}), encoding="utf-8")


def damage(folder: Path, progress: Progress | None = None) -> str | None:
    """How the checkpoint in ``folder`` differs from what was written, as a clause; None if it is whole.

    Without a ``progress`` it is looked at, and its files are not read: what is missing, cut off or a link is noticed.
    Raises :class:`OSError` where nobody can tell, because a file that is there cannot be read.
    """
    try:
        files = _listed(folder)
        wrong = link_among(folder, files) or _of_sizes(folder, files) or _beside(folder, files)
        return wrong or (_of_content(folder, files, progress) if progress is not None else None)
    except _DamageError as error:
        return str(error)
    except FileNotFoundError as error:
        return f"{error.filename or folder} has gone"


def link_among(folder: Path, names: Iterable[str]) -> str | None:
    """A clause on the first of the files ``names`` in a checkpoint's ``folder`` that is a link, or lies in one: what it
    leads to is somebody else's, and may be anything by the time that it is read. None if all are its own."""
    for name in names:
        for one in (name, *map(str, PurePosixPath(name).parents[:-1])):
            if (folder / one).is_symlink():
                return f"{one} is a link, and none of its files"
    return None


def read_names(folder: Path) -> list[str]:
    """The files in ``folder`` that readers of a model, or a run, look for, whether they belong there or not."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.suffix in _READ]


class _DamageError(Exception):
    """The manifest itself is not what was written."""


def _listed(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """The files of the manifest of ``folder``."""
    linked = link_among(folder, [NAME])
    if linked is not None:
        raise _DamageError(linked)
    if not (folder / NAME).is_file():
        raise _DamageError(f"{NAME} is missing")
    try:
        text = (folder / NAME).read_bytes().decode("utf-8")
        value = json.loads(text)
        files = value["files"]
        # Only as it was written: a flipped bit may change a blank, and leave what is read the same.
        is_sound = _text(value) == text and value["format"] == FORMAT and all(map(_is_entry, files.items()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise _DamageError(f"{NAME} is damaged")
    return dict(files)


def _is_entry(item: tuple[str, Any]) -> bool:
    """Whether it is a file inside the folder, with a size and a digest."""
    name, about = item
    parts = PurePosixPath(name).parts
    is_inside = bool(parts) and name == "/".join(parts) and not {"..", "/"} & set(parts) and "\0" not in name
    return is_inside and type(about["bytes"]) is int and isinstance(about["sha256"], str)


def _of_sizes(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    for name, about in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != about["bytes"]:
            return f"{name} has {size:,} bytes instead of {about['bytes']:,}"
    return None


def _beside(folder: Path, files: Mapping[str, Any]) -> str | None:
    """A file from elsewhere would be read with the others, or instead of one."""
    for name in read_names(folder):
        if name not in files and name != NAME and (folder / name).is_file():
            return f"{name} is none of its files"
    return None


def _of_content(folder: Path, files: Mapping[str, Mapping[str, Any]], progress: Progress) -> str | None:
    names = sorted(files, key=lambda name: files[name]["bytes"])
    total = sum(about["bytes"] for about in files.values())
    with progress.task(f"checking {folder.name}", "MiB", total, of_units=False) as task:
        seen = [0]

        def told(done: int) -> None:
            task.advance((done >> 20) - (seen[0] >> 20), done)
            seen[0] = done

        digests = _digests([folder / name for name in names], told)
    for name, digest in zip(names, digests, strict=True):
        if digest != files[name]["sha256"]:
            return f"{name} is not what was written"
    return None


def _digests(paths: Sequence[Path], told: Callable[[int], None] = lambda done: None) -> list[str]:
    """The SHA-256 of each file; ``told`` hears in this thread how many bytes have been read."""
    done, ended = [0] * len(paths), threading.Event()

    def digest_of(number: int) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
        with paths[number].open("rb", buffering=0) as file:
            while (count := file.readinto(buffer)) and not ended.is_set():
                digest.update(buffer[:count])
                done[number] += count
        return digest.hexdigest()

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        try:
            pending = [pool.submit(digest_of, number) for number in range(len(paths))]
            while wait(pending, timeout=0.2).not_done:
                told(sum(done))
            return [one.result() for one in pending]
        finally:
            ended.set()  # Ctrl-C does not wait for the rest


def _text(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

"""Which files of a data set's folder hold a split."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sft.dataset_names import DEV, SUFFIXES
from sft.errors import UsageError
from sft.foreign_text import shown
from sft.small_files import is_there

NAMES = {"train": ("train",), "dev": DEV}
"""What the files of a split are called; the first name that has any counts."""
_NOT_READ = ("validation", "valid", "val", "eval", "test")


def find_files(dataset: Path, split: str) -> list[Path]:
    """Files of a ``split`` (train, dev, or another name): ``DIR/train.json`` (or .jsonl, .csv, .parquet), else the
    files of ``DIR/train/`` in name order, all of one kind, else the shards ``DIR/train-00000-of-00002.parquet`` and so
    on. The dev split may be called validation, as on the hub.

    A dataset that is one file is its own training split and has no other. A missing dev split is an empty list; any
    other that is missing is an error.
    """
    if not is_there(dataset):
        raise UsageError(f"Data {dataset} does not exist; give dataset_name_or_path an existing folder or file.")
    if dataset.is_dir() and not os.access(dataset, os.R_OK | os.X_OK):
        raise UsageError(f"{dataset} cannot be read (Permission denied); check its permissions.")
    if dataset.is_file():
        if split not in NAMES:
            raise UsageError(f"{dataset} is one file and has no split {split}; leave split out.")
        return [dataset] if split == "train" else []
    files = next((found for name in NAMES.get(split, (split,)) if (found := _files_of(dataset, name))), [])
    if split == "train" and not files:
        raise UsageError(
            f"{dataset} has no training data; it needs train.json, train.jsonl or train/*.json with one "
            "JSON object on each line, or train.csv, train.parquet and the like."
        )
    if split not in NAMES and not files:
        raise UsageError(f"{dataset} has no split {split}; it needs {split}.json, {split}/*.json or the like.")
    return files


def unread(dataset: Path, files: list[Path]) -> list[str]:
    """What lies in ``dataset`` beside the ``files`` in use and is called like data to measure on."""
    if not dataset.is_dir():
        return []
    found = []
    for name in _NOT_READ:
        places = [*(dataset / f"{name}{suffix}" for suffix in SUFFIXES), *_files(dataset, f"{name}-*-of-*")]
        places += _files(dataset / name, "*")
        found += [str(path.relative_to(dataset)) for path in places if path.is_file() and path not in files]
    return found


def _files_of(dataset: Path, name: str) -> list[Path]:
    """The data files that are called ``name``."""
    single = [dataset / f"{name}{suffix}" for suffix in SUFFIXES if (dataset / f"{name}{suffix}").is_file()]
    if len(single) > 1:
        raise UsageError(f"{single[0]} and {single[1].name} both exist; keep one of them.")
    folder = _files(dataset / name, "*")
    shards = _files(dataset, f"{name}-*-of-*")
    places = [(single, str(single[0]) if single else ""), (folder, f"{dataset / name}/"), (shards, f"{name}-*-of-*")]
    held = [(files, place) for files, place in places if files]
    if len(held) > 1:
        raise UsageError(f"{held[0][1]} and {held[1][1]} both hold {name} data; keep one of them.")
    files = held[0][0] if held else []
    other = next((path for path in files if _kind(path) != _kind(files[0])), None)
    if other is not None:
        raise UsageError(f"{files[0]} and {other.name} are files of different kinds; keep one kind for {name} data.")
    return files


def _files(folder: Path, pattern: str) -> list[Path]:
    """Data files in name order, without hidden ones."""
    found = folder.glob(pattern) if folder.is_dir() else ()
    return sorted(path for path in found if path.suffix in SUFFIXES and not path.name.startswith("."))


def _kind(path: Path) -> str:
    return ".json" if path.suffix == ".jsonl" else path.suffix


def note_unread(dataset: Path, files: list[Path], say: Callable[[str], None]) -> None:
    """Say which files of a data folder look like data to measure on and are not read."""
    names = unread(dataset, files)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        listed = ", ".join(map(shown, names[:3]))
        say(
            f"note: {listed}{more} in {dataset} {'are' if len(names) > 1 else 'is'} not read; dev data "
            "is what is called dev or validation, and sft evaluate measures any file that it is given"
        )

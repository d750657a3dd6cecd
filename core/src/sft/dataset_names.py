"""What ``dataset_name_or_path`` names: one data set, or several, each with its weight, limit, format and splits."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.errors import UsageError
from sft.foreign_text import listed, quoted, shown
from sft.precision import LARGEST, SMALLEST
from sft.small_files import check_path, why

_NUMBER = re.compile(r"[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")
_SPLIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
"""What files of data end with."""
DEV = ("dev", "validation")
"""What the dev split of a data set may be called; the first that is there counts."""
_NAME = "dataset_name_or_path"
_MOST_COMMAS = 16
"""In one path of several; a path that stands alone, or in a settings file, may have any number."""


@dataclasses.dataclass(frozen=True)
class NamedSet:
    """A data set as settings name it."""

    path: str
    """A file, a folder, or what a plugin opens (``hf://owner/name``)."""
    name: str
    """What reports call it."""
    weight: float | None = None
    """Its share of the records that are drawn, beside the weights of the others; None: all its records are read."""
    limit: int | None = None
    """How many of its first records there are; None: all."""
    format: str | None = None
    """The format of its records; None: it is recognised."""
    train: str | None = "train"
    """The split that is learned; None: it is only measured."""
    dev: str | None = "dev"
    """The split that is measured; None: none of it is."""


def named_sets(value: Any) -> tuple[NamedSet, ...]:
    """The data sets that ``value`` names: a path, ``a.json:0.7,b/:0.3``, or a list of paths and of objects with the
    keys of :class:`NamedSet`, where ``split`` stands for ``train`` and ``dev``. None names none.

    What is there under the whole text is one path, whatever is in it, and likewise each part. Raises
    :class:`UsageError` with what is wrong.
    """
    if value is None:
        return ()
    entries = _of_text(value) if isinstance(value, str) else _of_list(value)
    if not entries:
        raise UsageError(f"{_NAME}: the list is empty; name a data set.")
    names: list[str] = []
    found = []
    for number, entry in enumerate(entries, start=1):
        one = _named(entry, f"{_NAME}, data set {number}" if len(entries) > 1 else _NAME, names)
        names.append(one.name)
        found.append(one)
    _check_weights(found)
    return tuple(found)


def schemes(value: Any) -> list[str]:
    """The schemes of the places that ``value`` names: ``hf`` of ``hf://owner/name``. What is no value is no error."""
    try:
        sets = named_sets(value)
    except UsageError:
        return []  # said when the settings are read
    return list(dict.fromkeys(scheme for one in sets if (scheme := scheme_of(one.path)) is not None))


def scheme_of(path: str) -> str | None:
    """``hf`` of ``hf://owner/name``, None of a path."""
    match = _SCHEME.match(path)
    return match[1] if match else None


# --- reading ------------------------------------------------------------------------------------------------


def _of_text(text: str) -> list[Mapping[str, Any]]:
    if _is_here(text):
        return [{"path": text}]
    if text.lstrip().startswith("["):
        try:
            return _of_list(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{_NAME}: {quoted(text)} begins like a JSON list and is none ({why(error)}).") from error
    pieces, entries = text.split(","), []
    while pieces:
        # The longest name that is there, so that a path may hold commas; otherwise a comma ends it.
        most = min(len(pieces), _MOST_COMMAS + 1)
        ends = (end for end in range(most, 0, -1) if end == 1 or _is_here(_weighted(pieces[:end])["path"]))
        end = next(ends)
        entries.append(_weighted(pieces[:end]))
        del pieces[:end]
    return entries


def _weighted(pieces: list[str]) -> Mapping[str, Any]:
    """``path:0.7`` → path and weight; a path that is there, or has no number behind its last colon, is all path."""
    text = ",".join(pieces).strip()
    path, colon, weight = text.rpartition(":")
    if colon and path and _NUMBER.fullmatch(weight) and not _is_here(text):
        return {"path": path, "weight": float(weight)}
    return {"path": text}


def _of_list(value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"{_NAME}: expected a path or a list of data sets, got {quoted(value)}.")
    entries: list[Mapping[str, Any]] = []
    for number, one in enumerate(value, start=1):
        if isinstance(one, str):
            entries.append(_weighted([one]))
        elif isinstance(one, Mapping):
            entries.append(one)
        else:
            raise UsageError(
                f"{_NAME}: data set {number} must be a path, or an object with path and weight, not {quoted(one)}."
            )
    return entries


def _named(entry: Mapping[str, Any], where: str, taken: list[str]) -> NamedSet:
    known = {"path", "name", "weight", "limit", "format", "split"}
    given = {str(key): _plain(value) for key, value in entry.items() if value is not None}
    if set(given) - known:
        raise UsageError(f"{where} has {listed(sorted(set(given) - known))}; known are {', '.join(sorted(known))}.")
    for key in ("path", "name", "format"):
        if key in given and not (isinstance(given[key], str) and given[key].strip()):
            raise UsageError(f"{where}: {key} must be a text that is not empty, not {quoted(given[key])}.")
    if "path" not in given:
        raise UsageError(f"{where} has no path; say where the data is.")
    weight, limit = given.get("weight"), given.get("limit")
    if weight is not None and not (_is_number(weight) and weight > 0):
        raise UsageError(f"{where}: weight must be a number above 0, not {quoted(weight)}; leave a set out to drop it.")
    if weight is not None and not SMALLEST <= weight <= LARGEST:
        raise UsageError(f"{where}: weight must be from {SMALLEST:.2g} to {LARGEST:.2g}, not {quoted(weight)}.")
    if limit is not None and not (isinstance(limit, int) and not isinstance(limit, bool) and limit > 0):
        raise UsageError(f"{where}: limit must be a whole number of records from 1, not {quoted(limit)}.")
    if limit is not None and limit > sys.maxsize:
        raise UsageError(f"{where}: limit goes up to {sys.maxsize:,}, not {quoted(limit)}; leave it out to read all.")
    check_path(_NAME, given["path"])
    if "name" in given and given["name"] in taken:
        raise UsageError(f"{where}: two data sets are called {shown(given['name'])}; give one of them another name.")
    name = given.get("name") or _own_name(given["path"], taken)
    splits = _splits(given.get("split"), where)
    return NamedSet(
        given["path"], name, float(weight) if weight is not None else None, limit, given.get("format"), *splits
    )


def _splits(value: Any, where: str) -> tuple[str | None, str | None]:
    """Which split is learned, and which measured. A text is one of them: dev (or validation) is measured."""
    if value is None:
        return "train", "dev"
    if isinstance(value, str) and _SPLIT.fullmatch(value):
        return (None, value) if value in DEV else (value, None)
    if isinstance(value, Mapping) and value and set(value) <= {"train", "dev"}:
        names = [value.get("train"), value.get("dev")]
        if any(names) and all(name is None or (isinstance(name, str) and _SPLIT.fullmatch(name)) for name in names):
            return names[0], names[1]
    raise UsageError(
        f'{where}: split must be the name of a split, or an object such as {{"train": "train", "dev": "test"}}, not '
        f"{quoted(value)}."
    )


def _check_weights(sets: list[NamedSet]) -> None:
    trained = [one for one in sets if one.train is not None]
    weighted = [one for one in sets if one.weight is not None]
    idle = next((one for one in weighted if one.train is None or len(trained) == 1), None)
    if idle is not None:
        why = "is only measured" if idle.train is None else "is the only data set to train on"
        raise UsageError(f"{_NAME}: the weight of {shown(idle.path)} does nothing, for it {why}; leave it out.")
    if weighted and len(weighted) < len(trained):
        bare = next(one for one in trained if one.weight is None)
        raise UsageError(
            f"{_NAME}: {shown(bare.path)} has no weight, and {shown(weighted[0].path)} has one; give all data sets a "
            "weight, or none."
        )


def _own_name(path: str, taken: list[str]) -> str:
    """The last part of a path, without a suffix; with a number where another set has that name."""
    last = Path(path).name if scheme_of(path) is None else Path(path.partition("://")[2] or path).name.partition("@")[0]
    last = next((last.removesuffix(suffix) for suffix in SUFFIXES if last.endswith(suffix)), last) or "data"
    names = (last if number == 1 else f"{last}-{number}" for number in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_here(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False

"""From ``dataset_name_or_path`` to records: which files, which lines, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.data.tables import read_csv, read_parquet
from sft.errors import UsageError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Record:
    """One object of a data file and where it stands."""

    value: dict[str, Any]
    path: Path
    line: int
    """From 1; in a parquet file, the row."""

    @property
    def place(self) -> str:
        return f"{self.path}, {'row' if self.path.suffix == '.parquet' else 'line'} {self.line}"


def find_files(dataset: Path, split: str) -> list[Path]:
    """Files of ``split`` ("train" or "dev"): ``DIR/train.json`` (or .jsonl, .csv, .parquet), else the files of
    ``DIR/train/`` in name order, all of one kind, else the shards ``DIR/train-00000-of-00002.parquet`` and so on.

    A dataset that is one file is its own training split and has no dev split. A missing dev split is an empty
    list; a missing training split is an error.
    """
    if not dataset.exists():
        raise UsageError(f"Data {dataset} does not exist; give dataset_name_or_path an existing folder or file.")
    if dataset.is_file():
        return [dataset] if split == "train" else []
    single = [dataset / f"{split}{suffix}" for suffix in SUFFIXES if (dataset / f"{split}{suffix}").is_file()]
    if len(single) > 1:
        raise UsageError(f"{single[0]} and {single[1].name} both exist; keep one of them.")
    folder = _files(dataset / split, "*")
    shards = _files(dataset, f"{split}-*-of-*")
    places = [(single, str(single[0]) if single else ""), (folder, f"{dataset / split}/"), (shards, f"{split}-*-of-*")]
    held = [(files, name) for files, name in places if files]
    if len(held) > 1:
        raise UsageError(f"{held[0][1]} and {held[1][1]} both hold {split} data; keep one of them.")
    files = held[0][0] if held else []
    other = next((path for path in files if _kind(path) != _kind(files[0])), None)
    if other is not None:
        raise UsageError(f"{files[0]} and {other.name} are files of different kinds; keep one kind for {split} data.")
    if split == "train" and not files:
        raise UsageError(
            f"{dataset} has no training data; it needs train.json, train.jsonl or train/*.json with one "
            "JSON object on each line, or train.csv, train.parquet and the like."
        )
    return files


def _files(folder: Path, pattern: str) -> list[Path]:
    """Data files in name order, without hidden ones."""
    found = folder.glob(pattern) if folder.is_dir() else ()
    return sorted(path for path in found if path.suffix in SUFFIXES and not path.name.startswith("."))


def _kind(path: Path) -> str:
    return ".json" if path.suffix == ".jsonl" else path.suffix


def read(files: list[Path]) -> Iterator[Record]:
    """The records of ``files``, in order: rows of a table, or JSON (:func:`_read_json`) in a file of any other name."""
    needs = {".csv": "a row of names and one of texts", ".parquet": "one row"}
    for path in files:
        count = 0
        for value, line in _read_file(path):
            count += 1
            yield Record(value, path, line)
        if not count:
            raise UsageError(
                f"{path} is empty; it needs at least {needs.get(path.suffix, 'one JSON object on a line')}."
            )


def _read_file(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    readers = {".csv": read_csv, ".parquet": read_parquet}
    try:
        yield from readers.get(path.suffix, _read_json)(path)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}, line {_not_utf8(path)} is not UTF-8 text ({error.reason}); convert it.") from error
    except OSError as error:
        cause = error.strerror or " ".join(str(error).split())
        raise UsageError(f"{path} cannot be read ({cause}); check the path and its permissions.") from error


def _read_json(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """One JSON object a line, or a whole file that is one JSON array. Blank lines pass."""
    with path.open(encoding="utf-8-sig") as stream:
        first = stream.read(1)
        while first.isspace():
            first = stream.read(1)
        stream.seek(0)
        if first == "[":
            yield from _read_array(path, stream.read())
            return
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.rstrip("\r\n"))
            except (ValueError, RecursionError) as error:
                if not isinstance(error, json.JSONDecodeError):
                    raise UsageError(f"{path}, line {number} cannot be read as JSON ({error}); correct it.") from error
                raise UsageError(
                    f"{path}, line {number} is not JSON ({error.msg} at column {error.colno}); "
                    "each line must hold one JSON object."
                ) from error
            yield _object(value, path, number), number


def _read_array(path: Path, text: str) -> Iterator[tuple[dict[str, Any], int]]:
    decoder = json.JSONDecoder()
    position, line, seen = text.index("[") + 1, 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line += text.count("\n", seen, position)
        seen = position
        if position < len(text) and text[position] == "]":
            rest = text[position + 1 :].lstrip()
            if rest:
                line = text.count("\n", 0, len(text) - len(rest)) + 1
                raise UsageError(f"{path}, line {line} is not JSON (text after the end of the array); remove it.")
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{path}, line {error.lineno} is not JSON ({error.msg}); correct the array there."
            ) from error
        yield _object(value, path, line), line


def _not_utf8(path: Path) -> int:
    """The line that holds the first byte that is not UTF-8 (a decoder's own count begins anew in each buffer)."""
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        content = content[: error.start]
    return content.count(b"\n") + 1


def _object(value: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f'{path}, line {line} holds {type(value).__name__}, not a JSON object like {{"src": …}}.')
    return value

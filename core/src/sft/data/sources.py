"""From files to records: which lines, and what is wrong with them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from sft.data.bad_records import BadRecord, BadRecordError, Place, check_text, decoding
from sft.data.tables import read_csv, read_parquet
from sft.errors import UsageError


@dataclass(frozen=True)
class Record:
    """One object of a data file and where it stands."""

    value: dict[str, Any]
    path: Path
    line: int
    """From 1; in a parquet file, the row."""
    number: int | None = None
    """In an array, which of its records it is, from 1: all may stand on one line."""
    done: int = 0
    """Bytes of all files that have been read when it has."""

    @property
    def place(self) -> Place:
        return Place(self.path, self.line, self.number)


Found = tuple[dict[str, Any] | BadRecord, int, int | None, float]
"""A record, its line, its number in an array, and how much of the file (0 to 1) has been read by then."""


@dataclass
class Passing:
    """Records that a reader goes over: lines that hold them are not even taken for JSON. ``told`` hears of them, some
    thousands at a time."""

    left: int = 0
    told: Callable[[int], None] = lambda count: None
    count: int = 0

    def one(self) -> bool:
        """Whether the next record is passed over; then it has been."""
        if not self.left:
            return False
        self.left -= 1
        self.count += 1
        if self.count % _TOLD == 0 or not self.left:
            self.told((self.count - 1) % _TOLD + 1)
        return True


_TOLD = 4096


@overload
def read(files: list[Path], passing: Passing | None = None) -> Iterator[Record]: ...
@overload
def read(files: list[Path], passing: Passing | None = None, *, skips: bool) -> Iterator[Record | BadRecord]: ...
def read(files: list[Path], passing: Passing | None = None, *, skips: bool = False) -> Iterator[Record | BadRecord]:
    """The records of ``files``, in order: rows of a table, or JSON (:func:`_read_json`) in a file of any other name.
    Those that are ``passing`` come first, and do not come out.

    A record that cannot be read is an error; where ``skips``, it comes out as a :class:`BadRecord`, as long as it is
    known where the next one begins."""
    needs = {".csv": "a row of names and one of texts", ".parquet": "one row"}
    passing, before = passing or Passing(), 0
    for path in files:
        count, size = -passing.count, size_of([path])
        for value, line, number, share in _read_file(path, passing, skips):
            count += 1
            yield (
                value if isinstance(value, BadRecord) else Record(value, path, line, number, before + int(share * size))
            )
        before += size
        if not count + passing.count:
            raise UsageError(
                f"{path} is empty; it needs at least {needs.get(path.suffix, 'one JSON object on a line')}."
            )


def size_of(files: list[Path]) -> int:
    """Bytes of all files; one that is not there counts nothing, and :func:`read` says so."""
    return sum(path.stat().st_size for path in files if path.is_file())


def _read_file(path: Path, passing: Passing, skips: bool) -> Iterator[Found]:
    tables = {".csv": read_csv, ".parquet": read_parquet}
    try:
        if path.suffix in tables:
            for value, line, share in tables[path.suffix](path, skips):
                if not passing.one():
                    yield value, line, None, share
        else:
            yield from _read_json(path, passing, skips)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}, line {_not_utf8(path)} is not UTF-8 text ({error.reason}); convert it.") from error
    except OSError as error:
        cause = error.strerror or " ".join(str(error).split())
        raise UsageError(f"{path} cannot be read ({cause}); check the path and its permissions.") from error


def _read_json(path: Path, passing: Passing, skips: bool) -> Iterator[Found]:
    """One JSON object a line, or a whole file that is one JSON array. Blank lines pass."""
    errors = decoding(skips)
    with path.open("rb") as file, io.TextIOWrapper(file, encoding="utf-8-sig", errors=errors) as stream:
        first = stream.read(1)
        while first.isspace():
            first = stream.read(1)
        stream.seek(0)
        if first == "[":
            for found in _read_array(path, stream.read(), skips):
                if not passing.one():
                    yield found
            return
        size = size_of([path]) or 1
        for number, line in enumerate(stream, start=1):
            if not line.strip() or passing.one():
                continue
            try:
                value: dict[str, Any] | BadRecord = _of_line(line, Place(path, number), skips)
            except BadRecordError as error:
                if not skips:
                    raise
                value = error.record
            yield value, number, None, file.tell() / size


def _of_line(line: str, place: Place, skips: bool) -> dict[str, Any]:
    if skips:
        check_text(line, place)
    try:
        value = DECODER.decode(line.rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        if not isinstance(error, json.JSONDecodeError):
            raise BadRecordError(place, f" cannot be read as JSON ({error}); correct it.") from error
        reason = error.msg.removesuffix(" at")
        raise BadRecordError(
            place, f" is not JSON ({reason} at column {error.colno}); each line must hold one JSON object."
        ) from error
    return _object(value, place)


def _read_array(path: Path, text: str, skips: bool) -> Iterator[Found]:
    position, line, seen, number = text.index("[") + 1, 1, 0, 0
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
        number += 1
        place = Place(path, line, number)
        try:
            try:
                value, position = DECODER.raw_decode(text, position)
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"{Place(path, error.lineno, number)} is not JSON ({error.msg}); correct the array there."
                ) from error
            except (ValueError, RecursionError) as error:
                position = _end(text, position)
                raise BadRecordError(place, f" cannot be read as JSON ({error}); correct it.") from error
            value = _object(value, place)
        except BadRecordError as error:
            if not skips or position < 0:
                raise
            value = error.record
        yield value, line, number, position / len(text)


def _end(text: str, position: int) -> int:
    """Where the value ends that begins at ``position`` and is JSON, though not as a record may be; -1 if unknown."""
    try:
        return json.JSONDecoder(parse_int=str).raw_decode(text, position)[1]
    except RecursionError:
        return -1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets the last of several equal names win in silence."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{json.dumps(twice, ensure_ascii=False)} stands twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _not_utf8(path: Path) -> int:
    """The line that holds the first byte that is not UTF-8 (a decoder's own count begins anew in each buffer)."""
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        content = content[: error.start]
    return content.count(b"\n") + 1


def _object(value: Any, place: Place) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecordError(place, f' holds {type(value).__name__}, not a JSON object like {{"src": …}}.')
    return value

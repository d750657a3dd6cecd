"""Records from tables: CSV through Python's own reader, parquet through pyarrow, a batch of rows at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.data.bad_records import BadRecord, BadRecordError, Place, check_text, decoding
from sft.errors import UsageError

_ROWS = 256
"""Rows of a parquet file that are in memory as Python objects at a time."""


Row = tuple[dict[str, Any] | BadRecord, int, float]
"""A record, its line (in parquet, its number from 1), and how much of the file (0 to 1) has been read by then."""


def read_csv(path: Path, skips: bool = False) -> Iterator[Row]:
    """Each row by the names of the first one, all values text, and the line on which it begins. Blank lines pass.

    A quote in the wrong place is never skipped: nobody knows how many rows it has taken along."""
    csv.field_size_limit(2**31 - 1)  # the library's own is 131,072 characters a cell
    end = 0
    try:
        with (
            path.open("rb") as file,
            io.TextIOWrapper(file, encoding="utf-8-sig", errors=decoding(skips), newline="") as stream,
        ):
            reader, size = csv.reader(stream, strict=True), path.stat().st_size or 1
            names: list[str] = []
            for cells in reader:
                line, end = end + 1, reader.line_num
                if not cells or (len(cells) == 1 and len(names) != 1 and not cells[0].strip()):
                    continue
                if not names:
                    names = _header(cells, path, line)
                    continue
                try:
                    row: dict[str, Any] | BadRecord = _row(names, cells, Place(path, line), skips)
                except BadRecordError as error:
                    if not skips:
                        raise
                    row = error.record
                yield row, line, file.tell() / size
    except csv.Error as error:
        raise UsageError(f"{path}, line {end + 1} is not CSV ({error}); correct it.") from error


def _row(names: list[str], cells: list[str], place: Place, skips: bool) -> dict[str, Any]:
    if skips:
        for cell in cells:
            check_text(cell, place)
    if len(cells) != len(names):
        counts = f"{len(cells)} cells and the header {len(names)}"
        raise BadRecordError(place, f" has {counts}; put texts with commas or line ends in double quotes.")
    return dict(zip(names, cells, strict=True))


def _header(names: list[str], path: Path, line: int | None = None) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            where = path if line is None else f"{path}, line {line}"
            raise UsageError(f"{where} names the column {name!r} twice; the header must name each once.")
    return names


def _without_absent(value: Any) -> Any:
    """A nested value without the names that are null in it."""
    if isinstance(value, dict):
        return {name: _without_absent(inner) for name, inner in value.items() if inner is not None}
    return [_without_absent(inner) for inner in value] if isinstance(value, list) else value


def read_parquet(path: Path, skips: bool = False) -> Iterator[Row]:
    """Each row as Python values (nested columns as lists and dictionaries) and its number from 1.

    All objects of a nested column have all its names; those that are null in one are taken for absent there, for the
    arguments of a call would have the names of all other calls, too.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            _header(file.schema_arrow.names, path)
            for batch in file.iter_batches(batch_size=_ROWS):
                for value in _python_values(batch):
                    number += 1
                    if isinstance(value, UnicodeDecodeError):
                        fault = BadRecordError(Place(path, number), f" is not UTF-8 text ({value.reason}); convert it.")
                        if not skips:
                            raise fault
                        value = fault.record
                    elif isinstance(value, dict):
                        value = {name: _without_absent(one) for name, one in value.items()}
                    yield value, number, number / file.metadata.num_rows
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.strerror:  # the system's; pyarrow's own has only a message
            raise
        cause = " ".join(str(error).split())
        raise UsageError(f"{path}, row {number + 1} cannot be read as parquet ({cause}); write it anew.") from error


def _python_values(batch: Any) -> Iterator[Any]:
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:  # somewhere in it: one by one, so that the row can be named
        for index in range(batch.num_rows):
            try:
                yield from batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield error
    else:
        yield from values

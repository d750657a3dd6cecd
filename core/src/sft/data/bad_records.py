"""Records that cannot be read: where they stand and why, and how many of them a run may have (``on_bad_record``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sft.errors import UsageError
from sft.foreign_text import shown

LOOKED_AT = 4096
"""The share of bad records is looked at each time that so many records have been read, and at the end."""
_LONGEST = 500


class Place(NamedTuple):
    """Where a record stands."""

    path: Path
    line: int
    """From 1; in a parquet file, the row."""
    number: int | None = None
    """In an array, which of its records it is, from 1: all may stand on one line."""

    def __str__(self) -> str:
        unit = "row" if self.path.suffix == ".parquet" else "line"
        return f"{self.path}, {unit} {self.line}{'' if self.number is None else f' (record {self.number})'}"


class BadRecord(NamedTuple):
    """A record that is skipped."""

    place: Place
    reason: str


class BadRecordError(UsageError):
    """A record cannot be read; the rest of its file can. The message is its place and the ``text`` after that."""

    def __init__(self, place: Place, text: str) -> None:
        super().__init__(f"{place}{text}")
        self.place, self.text = place, text

    def __reduce__(self) -> tuple[type, tuple[Place, str]]:
        return type(self), (self.place, self.text)  # it comes from the processes that encode

    @property
    def record(self) -> BadRecord:
        """What is left to know of the record where it is skipped."""
        return BadRecord(self.place, shown(self.text.removeprefix(":").strip(), _LONGEST))


def decoding(skips: bool) -> str:
    """How bytes are taken that are not UTF-8: as an error of the whole file, or where records are skipped as
    characters that :func:`check_text` finds."""
    return "surrogateescape" if skips else "strict"


def check_text(text: str, place: Place) -> None:
    """Refuse a record that has bytes which are not UTF-8, read as :func:`decoding` says."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRecordError(place, " is not UTF-8 text; convert it.") from None


class Limit(NamedTuple):
    """How large a share of a split's records may be bad."""

    share: float
    split: str

    def check(self, bad: Sequence[BadRecord], skipped: int, records: int) -> None:
        """Refuse data of which more is bad: ``skipped`` of the ``records`` read so far, ``bad`` among them."""
        if bad and skipped > self.share * records:
            raise UsageError(
                f"{skipped:,} of {records:,} records of the {self.split} data cannot be read, and on_bad_record_limit "
                f"{self.share:g} allows {int(self.share * records):,}; one is {bad[0].place}: {bad[0].reason} Correct "
                "the data, or raise the limit."
            )

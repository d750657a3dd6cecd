"""Figures that are added up record by record, in memory that hardly grows with the data: lengths, and what is equal."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np

from sft.data.bad_records import Place
from sft.data_report.value import Bar, Duplicates, Lengths, Pair

MOST_BARS = 16
SHOWN_PAIRS = 3
_FILE = 40
"""Bits of a place that are a line; the others are a file."""
_NICE = (1, 2, 5)


class LengthTally:
    """How many records have each length, exactly."""

    def __init__(self) -> None:
        self._records = np.zeros(1, np.int64)

    def add(self, lengths: np.ndarray) -> None:
        """``lengths`` int64 [n], in tokens; what has none is not counted."""
        counts = np.bincount(lengths[lengths > 0])
        if len(counts) > len(self._records):
            self._records = np.pad(self._records, (0, len(counts) - len(self._records)))
        self._records[: len(counts)] += counts

    def above(self, length: int) -> int:
        """Records that are longer."""
        return int(self._records[length + 1 :].sum())

    def lengths(self) -> Lengths | None:
        total = int(self._records.sum())
        if not total:
            return None
        up_to = np.cumsum(self._records)
        median, high, higher, longest = (
            int(np.searchsorted(up_to, -(-total * share // 100))) for share in (50, 90, 99, 100)
        )
        mean = float(self._records @ np.arange(len(self._records))) / total
        return Lengths(mean, median, high, higher, longest, self._bars(higher, longest))

    def _bars(self, most: int, longest: int) -> list[Bar]:
        """Bars of equal, round width up to ``most``, and one of what is beyond them."""
        width = next(
            width for width in (n * 10**k for k in range(12) for n in _NICE) if most <= width * (MOST_BARS - 1)
        )
        ends = list(range(width, width * -(-most // width) + 1, width))
        bars = [Bar(end - width + 1, end, int(self._records[end - width + 1 : end + 1].sum())) for end in ends]
        if longest > ends[-1]:
            bars.append(Bar(ends[-1] + 1, longest, self.above(ends[-1])))
        while bars and not bars[0].records:
            del bars[0]
        return bars


class Places:
    """The file and line of records, in eight bytes each."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._arrays: set[int] = set()
        self._places = array("Q")

    def add(self, place: Place) -> None:
        file = self._files.setdefault(place.path, len(self._files))
        if place.number is not None:
            self._arrays.add(file)
        self._places.append(file << _FILE | (place.line if place.number is None else place.number))

    def __getitem__(self, index: int) -> str:
        place = self._places[index]
        file, number = place >> _FILE, place & ((1 << _FILE) - 1)
        path = list(self._files)[file]
        return f"{path}, record {number}" if file in self._arrays else str(Place(path, number))


class ContentTally:
    """Which records are equal, by the 64 bits of :func:`sft.data_report.look.hash_of`: sixteen bytes a record."""

    def __init__(self) -> None:
        self.places = Places()
        self._hashes = array("Q")

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, content: int, place: Place) -> None:
        self._hashes.append(content)
        self.places.add(place)

    @property
    def hashes(self) -> np.ndarray:
        """uint64 [records], in their order."""
        return np.frombuffer(self._hashes, np.uint64) if len(self) else np.zeros(0, np.uint64)

    def different(self) -> int:
        """Records without those that are equal to an earlier one."""
        return len(np.unique(self.hashes))

    def duplicates(self) -> Duplicates:
        """Those that are equal to an earlier one."""
        hashes = self.hashes
        order = np.argsort(hashes, kind="stable")
        again = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        first = np.sort(order[again + 1])[:SHOWN_PAIRS].tolist()
        return Duplicates(len(again), [self._pair(n, self) for n in first])

    def shared_with(self, train: ContentTally) -> Duplicates:
        """Those that are in ``train`` too."""
        shared = np.flatnonzero(np.isin(self.hashes, train.hashes))
        return Duplicates(len(shared), [self._pair(n, train) for n in shared[:SHOWN_PAIRS].tolist()])

    def _pair(self, number: int, among: ContentTally) -> Pair:
        """A record, and the first one ``among`` others that is equal to it."""
        earlier = int(np.flatnonzero(among.hashes == self.hashes[number])[0])
        return Pair(self.places[number], among.places[earlier], 1.0)

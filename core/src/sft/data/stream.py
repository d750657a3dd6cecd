"""Data that is never read whole: windows of records, encoded as they are needed (``lazy``)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sft.conversations import Turn
from sft.data.bad_records import BadRecord
from sft.data.contents import Contents
from sft.data.encoded import NO_TARGET, Counts, DataWindow, Encoded, joined
from sft.data.feeds import Feed, Taken
from sft.errors import UsageError

FORM = "2:"
"""What the fingerprints of today begin with. Those of names and sizes have no mark; checkpoints still hold them."""
WINDOW = 4096
"""Records in a window: they are shuffled, and packed, among each other, and in memory together."""


class Stream:
    """Endless windows of at most ``size`` records, in the order in which a feed gives them; a window ends where a pass
    does.

    ``feed`` makes a :class:`sft.data.feeds.Feed` that begins at a place, None for the beginning; ``encode`` makes token
    ids of some records of a set. ``names`` are those of the sets, and ``shape`` is what decides, beside the files,
    which records there are; empty for all those of one set.
    """

    def __init__(
        self,
        files: list[Path],
        feed: Callable[[dict[str, Any] | None], Feed],
        encode: Callable[[Iterable[list[Turn] | BadRecord]], Encoded],
        size: int = WINDOW,
        *,
        names: Sequence[str] = ("",),
        shape: str = "",
        check: Callable[[int, Sequence[BadRecord], int, int], None] = lambda one, bad, skipped, records: None,
    ) -> None:
        """``check`` refuses a set, by its number, of which too much is bad: of so many records so many are skipped."""
        self.files = files
        self._counts = [Counts() for _ in names]
        self._feed, self._encode, self._size = feed, encode, size
        self._names, self._shape = list(names), shape
        self._room: tuple[Path, int] | None = None
        self._check = check
        self._told: Callable[[Sequence[BadRecord]], None] = lambda bad: None

    @cached_property
    def _contents(self) -> Contents:
        return Contents(self.files)

    @cached_property
    def _first(self) -> list[Encoded]:
        """The first window, by set."""
        _ = self._contents  # before anything is read
        found = self._encoded(self._feed(None).take(self._size))
        for number, one in enumerate(found):
            self._check(number, one.bad, one.counts.records_skipped, one.counts.records)
        return found

    @cached_property
    def _first_joined(self) -> Encoded:
        return _joined(self._first)

    def _encoded(self, taken: Taken) -> list[Encoded]:
        return [self._encode(one) for one in taken.by_set]

    @property
    def lengths(self) -> np.ndarray:
        return self._first_joined.lengths

    def check_fits(self, model: Path, positions: int) -> None:
        """See :class:`sft.data.batches.Data`: the first window is checked now, each later one when it is encoded."""
        self._room = (model, positions)
        self._first_joined.check_fits(model, positions)

    def list_bad(self, to: Callable[[Sequence[BadRecord]], None]) -> None:
        """See :class:`sft.data.batches.Data`: ``to`` hears of each window's when the window comes."""
        self._told = to

    def windows(self, place: dict[str, Any] | None = None) -> Iterator[DataWindow]:
        """See :class:`sft.data.batches.Data`. Raises :class:`UsageError` if a whole pass has no target, or a file is no
        longer what it was."""
        number, passed = (place[key] if place else 0 for key in ("window", "passes"))
        self._counts = self._counts_at(place) if place else [Counts() for _ in self._names]
        feed, kept = self._feed(place), place is not None and not _begins_pass(place)
        while True:
            at = {"window": number, "passes": passed, **feed.place(), **self._counts_written()}
            taken = feed.take(self._size)
            if len(taken):
                parts = self._first if number == 0 else self._encoded(taken)
                data = self._first_joined if number == 0 else _joined(parts)
                self._contents.check_same()
                if self._room is not None:
                    data.check_fits(*self._room)
                for one, part in enumerate(parts):
                    self._counts[one] = counts = self._counts[one] + part.counts
                    self._check(one, part.bad, counts.records_skipped, counts.records)
                self._told(data.bad)
                if len(data):
                    kept = True
                    yield DataWindow(number, data, passed, passed + taken.ends_pass, at)
                number += 1
            if taken.ends_pass:
                passed += 1
                if not kept:
                    raise UsageError(NO_TARGET.format("train"))

    def _counts_at(self, place: dict[str, Any]) -> list[Counts]:
        if len(self._names) == 1:
            return [Counts.of(place["counts"])]
        return [Counts.of(place["counts_of_sets"].get(name, {})) for name in self._names]

    def _counts_written(self) -> dict[str, Any]:
        sets = self._counts_of_sets()
        return {"counts": self._total(), **({"counts_of_sets": sets} if sets else {})}

    def _total(self) -> dict[str, int]:
        """The counts of the records that have been read; those of a later pass count again."""
        return asdict(sum(self._counts, Counts()))

    def _counts_of_sets(self) -> dict[str, dict[str, int]]:
        """The same of each set, where there are several."""
        if len(self._names) == 1:
            return {}
        return {name: asdict(counts) for name, counts in zip(self._names, self._counts, strict=True)}

    def fingerprint(self) -> str:
        """``2:`` and 16 hexadecimal digits of the tokens of the first window, the names of the files and what is in
        them (:mod:`sft.data.contents`), as it was before the first record was read; and of the shape, where there is
        one."""
        digest = hashlib.sha256(self._first_joined.fingerprint().encode())
        digest.update(self._contents.digest.encode())
        digest.update(self._shape.encode())
        return FORM + digest.hexdigest()[:16]

    def has_fingerprint(self, expected: str) -> bool:
        """Whether ``expected`` is its fingerprint, in today's form or in the older one, of names and sizes of files."""
        if expected.startswith(FORM) or self._shape:
            return expected == self.fingerprint()
        digest = hashlib.sha256(self._first_joined.fingerprint().encode())
        for path in self.files:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
        return expected == digest.hexdigest()[:16]

    def report(self) -> dict[str, Any]:
        sets = self._counts_of_sets()
        return {**self._total(), **({"sets": sets} if sets else {})}


def _joined(parts: list[Encoded]) -> Encoded:
    return parts[0] if len(parts) == 1 else joined(parts)


def _begins_pass(place: dict[str, Any]) -> bool:
    return not place.get("offset", 0) and not place.get("set", 0) and not place.get("draws", 0)

"""Data that is never read whole: windows of records, encoded as they are needed (``lazy``)."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sft.data.bad_records import BadRecord
from sft.data.contents import Contents
from sft.data.encoded import NO_TARGET, Counts, DataWindow, Encoded
from sft.errors import UsageError
from sft.seams import Turn

FORM = "2:"
"""What the fingerprints of today begin with. Those of names and sizes have no mark; checkpoints still hold them."""
WINDOW = 4096
"""Records in a window: they are shuffled, and packed, among each other, and in memory together."""


class Stream:
    """Endless windows of at most ``size`` records, in the data's order; a window ends where a pass does.

    ``conversations`` begins a pass over all records but the first ones, as many as it is given; ``encode`` makes token
    ids of some. A window is found again by counting the records before it in its pass, which are passed over.
    """

    def __init__(
        self,
        files: list[Path],
        conversations: Callable[[int], Iterator[list[Turn] | BadRecord]],
        encode: Callable[[Iterable[list[Turn] | BadRecord]], Encoded],
        size: int = WINDOW,
        *,
        check: Callable[[Sequence[BadRecord], int, int], None] = lambda bad, skipped, records: None,
    ) -> None:
        self.files = files
        self.counts = Counts()
        self._conversations, self._encode, self._size = conversations, encode, size
        self._room: tuple[Path, int] | None = None
        self._check = check
        self._told: Callable[[Sequence[BadRecord]], None] = lambda bad: None

    @cached_property
    def _contents(self) -> Contents:
        return Contents(self.files)

    @cached_property
    def _first(self) -> Encoded:
        _ = self._contents  # before anything is read
        found = self._encode(itertools.islice(self._conversations(0), self._size))
        self._check(found.bad, found.counts.records_skipped, found.counts.records)
        return found

    @property
    def lengths(self) -> np.ndarray:
        return self._first.lengths

    def check_fits(self, model: Path, positions: int) -> None:
        """See :class:`sft.data.batches.Data`: the first window is checked now, each later one when it is encoded."""
        self._room = (model, positions)
        self._first.check_fits(model, positions)

    def list_bad(self, to: Callable[[Sequence[BadRecord]], None]) -> None:
        """See :class:`sft.data.batches.Data`: ``to`` hears of each window's when the window comes."""
        self._told = to

    def windows(self, place: dict[str, Any] | None = None) -> Iterator[DataWindow]:
        """See :class:`sft.data.batches.Data`. Raises :class:`UsageError` if a whole pass has no target, or a file is no
        longer what it was."""
        number, passed, offset = (place[key] if place else 0 for key in ("window", "passes", "offset"))
        self.counts = Counts.of(place["counts"]) if place else Counts()
        kept = offset > 0
        while True:
            records = self._conversations(offset)
            following = next(records, None)
            while following is not None:
                found = list(itertools.islice(itertools.chain([following], records), self._size))
                following = next(records, None)
                data = self._first if number == 0 else self._encode(found)
                self._contents.check_same()
                if self._room is not None:
                    data.check_fits(*self._room)
                place = {"window": number, "passes": passed, "offset": offset, "counts": asdict(self.counts)}
                self.counts = self.counts + data.counts
                self._check(data.bad, self.counts.records_skipped, self.counts.records)
                self._told(data.bad)
                if len(data):
                    kept = True
                    yield DataWindow(number, data, passed, passed + (following is None), place)
                number, offset = number + 1, offset + len(found)
            if not kept:
                raise UsageError(NO_TARGET.format("train"))
            passed, offset = passed + 1, 0

    def fingerprint(self) -> str:
        """``2:`` and 16 hexadecimal digits of the tokens of the first window, the names of the files and what is in
        them (:mod:`sft.data.contents`), as it was before the first record was read."""
        digest = hashlib.sha256(self._first.fingerprint().encode())
        digest.update(self._contents.digest.encode())
        return FORM + digest.hexdigest()[:16]

    def has_fingerprint(self, expected: str) -> bool:
        """Whether ``expected`` is its fingerprint, in today's form or in the older one, of names and sizes of files."""
        if expected.startswith(FORM):
            return expected == self.fingerprint()
        digest = hashlib.sha256(self._first.fingerprint().encode())
        for path in self.files:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
        return expected == digest.hexdigest()[:16]

    def report(self) -> dict[str, int]:
        """Of the records that have been read; those of a later pass count again."""
        return asdict(self.counts)

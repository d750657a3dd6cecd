"""Several data sets that were read whole: as the training data of one run, and as what it measures set by set."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sft.data.bad_records import BadRecord
from sft.data.encoded import DataWindow, Encoded, joined
from sft.data.mixing import Mix, pass_order
from sft.errors import UsageError

_MOST_TIMES = 1000
"""Passes that are longer than so many times all records are refused: weights that differ so much are a mistake."""


class Several:
    """The records of all ``sets``; without a ``mix`` each of them comes once in a pass, as those of one set do."""

    def __init__(self, sets: Mapping[str, Encoded], mix: Mix | None) -> None:
        self._data = joined(list(sets.values()))
        self._reports = {name: one.report() for name, one in sets.items()}
        self._sizes, self._mix = [len(one) for one in sets.values()], mix
        if mix is not None and mix.until_all:
            _check_length(mix, self._sizes, list(sets))

    @property
    def lengths(self) -> np.ndarray:
        return self._data.lengths

    def check_fits(self, model: Path, positions: int) -> None:
        self._data.check_fits(model, positions)

    def list_bad(self, to: Callable[[Sequence[BadRecord]], None]) -> None:
        self._data.list_bad(to)

    def windows(self, place: dict[str, Any] | None = None) -> Iterator[DataWindow]:
        """See :class:`sft.data.batches.Data`: each pass is a window."""
        if self._mix is None:
            yield from self._data.windows(place)
            return
        before = list(place["drawn"]) if place else [0] * len(self._sizes)
        for number in itertools.count(place["window"] if place else 0):
            order, after = pass_order(self._mix, self._sizes, before)
            yield DataWindow(number, self._data, number, number + 1, {"window": number, "drawn": before}, order)
            before = after

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """That of the records; where they are mixed, it changes with the sets and their weights too."""
        found = self._data.fingerprint()
        if self._mix is None:
            return found
        return hashlib.sha256(f"{found} {self._sizes} {self._mix}".encode()).hexdigest()[:16]

    def has_fingerprint(self, expected: str) -> bool:
        return expected == self.fingerprint()

    def report(self) -> dict[str, Any]:
        return {**self._data.report(), "sets": self._reports}


def _check_length(mix: Mix, sizes: Sequence[int], names: Sequence[str]) -> None:
    total = sum(mix.weights)
    expected = [size * total / weight for size, weight in zip(sizes, mix.weights, strict=True)]
    longest = max(expected)
    if longest > _MOST_TIMES * sum(sizes):
        raise UsageError(
            f"mix_until all_exhausted: it takes some {longest:,.0f} records until the {max(sizes):,} of data set "
            f"{names[expected.index(longest)]} have all come, at its weight; raise the weight, or give it a limit."
        )


class Measured:
    """The dev data of a run, by the names of its data sets."""

    def __init__(self, sets: Mapping[str, Encoded]) -> None:
        self.sets = dict(sets)

    def __len__(self) -> int:
        """Records that are measured, each once, however many rows it has become."""
        return sum(len(one) - len(one.further) for one in self.sets.values())

    @property
    def tokens(self) -> int:
        """Tokens that are read when all of it is measured."""
        return sum(int(one.lengths.sum()) for one in self.sets.values())

    def list_bad(self, to: Callable[[Sequence[BadRecord]], None]) -> None:
        for one in self.sets.values():
            one.list_bad(to)

    def fingerprint(self) -> str:
        """Of one set, that of its records."""
        found = [one.fingerprint() for one in self.sets.values()]
        return found[0] if len(found) == 1 else hashlib.sha256(" ".join(found).encode()).hexdigest()[:16]

    def report(self) -> dict[str, Any]:
        reports = {name: one.report() for name, one in self.sets.items()}
        if len(reports) == 1:
            return next(iter(reports.values()))
        total = {key: sum(one[key] for one in reports.values()) for key in next(iter(reports.values()))}
        return {**total, "sets": reports}

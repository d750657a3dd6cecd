"""Collators that put several records into a row, and say how full the rows are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

import sft
from sft_data_packing.packers import best_fit_decreasing, next_fit

if TYPE_CHECKING:
    from sft import Batch, Example


class NextFitCollator:
    """Consecutive records of the (shuffled) order share a row of ``capacity`` tokens for as long as they fit.

    ``say`` receives a line about the first rows that are made for training.
    """

    packs = True

    def __init__(self, capacity: int, pad_id: int, say: Callable[[str], None] | None = None) -> None:
        self.capacity, self.pad_id, self._say = capacity, pad_id, say

    def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        rows = self.pack(lengths, rng)
        if rng is not None and self._say is not None:
            room = self.room(lengths)
            fill = 100 * lengths.sum() / (len(rows) * room)
            self._say(f"{len(lengths):,} records in {len(rows):,} rows of {room} tokens, {fill:.1f} % full")
            self._say = None
        return rows

    def room(self, lengths: np.ndarray) -> int:
        """Tokens of a row. A record of several conversations stays in one row, also where together they are longer than
        ``capacity``; rows are then as long as the longest."""
        return max(self.capacity, int(lengths.max(initial=0)))

    def pack(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
        packs = next_fit(lengths[order].tolist(), self.room(lengths))
        return [tuple(int(order[position]) for position in pack) for pack in packs]

    def batch(self, rows: Sequence[Sequence[Example]]) -> Batch:
        return sft.assemble(rows, self.pad_id)


class BestFitCollator(NextFitCollator):
    """Best-fit-decreasing within groups of consecutive records; the packs are then shuffled.

    Groups keep the order of the data, so that a pack holds records that stand near each other, and only one group is
    ever sorted.
    """

    def __init__(self, capacity: int, pad_id: int, group: int, say: Callable[[str], None] | None = None) -> None:
        super().__init__(capacity, pad_id, say)
        self.group = group

    def pack(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        packs = []
        for start in range(0, len(lengths), self.group):
            part = lengths[start : start + self.group].tolist()
            packs += [tuple(start + n for n in pack) for pack in best_fit_decreasing(part, self.room(lengths))]
        return packs if rng is None else [packs[index] for index in rng.permutation(len(packs))]

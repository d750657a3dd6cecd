"""Collators that put several records into a row, and the line that says how full the rows are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

import sft
from sft_data_packing.packers import best_fit_decreasing, next_fit

if TYPE_CHECKING:
    from sft import Batch, Example, Run


class NextFitCollator:
    """Consecutive records of the (shuffled) order share a row of ``capacity`` tokens for as long as they fit."""

    packs = True

    def __init__(self, capacity: int, pad_id: int) -> None:
        self.capacity, self.pad_id = capacity, pad_id

    def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
        packs = next_fit(lengths[order].tolist(), self.capacity)
        return [tuple(int(order[position]) for position in pack) for pack in packs]

    def batch(self, rows: Sequence[Sequence[Example]]) -> Batch:
        return sft.assemble(rows, self.pad_id)


class BestFitCollator(NextFitCollator):
    """Best-fit-decreasing within groups of consecutive records; the packs are then shuffled.

    Groups keep the order of the data, so that a pack holds records that stand near each other, and only one group is
    ever sorted.
    """

    def __init__(self, capacity: int, pad_id: int, group: int) -> None:
        super().__init__(capacity, pad_id)
        self.group = group

    def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        packs = []
        for start in range(0, len(lengths), self.group):
            part = lengths[start : start + self.group].tolist()
            packs += [tuple(start + n for n in pack) for pack in best_fit_decreasing(part, self.capacity)]
        return packs if rng is None else [packs[index] for index in rng.permutation(len(packs))]


def report(run: Run, name: str, collator: NextFitCollator) -> None:
    """One line: how many rows the training records make in the first epoch, and how full they are."""
    lengths = run.train_data.lengths
    rows = collator.rows(lengths, np.random.default_rng([run.settings.training.seed, 0]))
    fill = 100 * lengths.sum() / max(1, len(rows) * collator.capacity)
    records = f"{len(lengths):,} records in {len(rows):,} rows"
    run.say(f"{name}: {records} of {collator.capacity} tokens, {fill:.1f} % full")

"""The rows of a pass, made by the run's collator of the lengths alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np

from sft.data.batches import PaddedCollator
from sft.data.encoded import IGNORED
from sft.data.mixing import Mix, pass_order
from sft.data_report.value import RowCount
from sft.seams import DataCollator, Example

LARGEST_WINDOW = 1 << 17
"""Records that are packed among each other here; of more data, so many at a time, for memory is to stay constant."""
_TRIED = 4
"""Batches that the collator makes, to see whether it pads to the longest row as most do."""


class RowTally:
    """Counts the rows of the pass that a run begins with, as it shuffles, mixes and packs them with its ``seed``.

    ``window``: so many records that are read make a window (``lazy``); None: all records are one. ``mix``: how the
    records of several sets follow each other; it is for one window.
    """

    def __init__(
        self,
        collator: DataCollator,
        who: str,
        seed: int,
        batch: int,
        accumulated: int,
        window: int | None,
        mix: Mix | None = None,
    ) -> None:
        self._collator, self._who, self._seed = collator, who, seed
        self._batch, self._step = batch, batch * accumulated
        self._window, self._mix = window, mix
        self._waiting: list[np.ndarray] = []
        self._sizes = [0]
        """Of a mix, how many rows each set has so far."""
        self._number, self._held = 0, 0
        self._rows = self._records = self._tokens = self._padding = self._steps = 0
        self._was_divided = window is not None

    def add(self, lengths: np.ndarray, numbers: np.ndarray) -> None:
        """Records that put ``lengths`` (int64 [n]) tokens into rows; ``numbers`` (int64 [n], ascending) are theirs
        among all that have been read."""
        self._sizes[-1] += len(lengths)
        if self._window is None:
            if self._mix is None and self._held + len(lengths) > LARGEST_WINDOW:
                self._flush()
                self._number, self._was_divided = self._number + 1, True
            self._keep(lengths)
            return
        for window in np.unique(numbers // self._window).tolist():
            if window != self._number:
                self._flush()
                self._number = window
            self._keep(lengths[numbers // self._window == window])

    def end_set(self) -> None:
        """What is added from now on is of the next set."""
        self._sizes.append(0)

    def count(self) -> RowCount:
        """All rows; nothing can be added any more."""
        if self._mix is not None:
            self._mixed()
        self._flush()
        window = (self._window or LARGEST_WINDOW) if self._was_divided else None
        return RowCount(
            self._who,
            self._collator.packs,
            self._rows,
            self._records,
            self._tokens,
            self._padding,
            self._batch,
            self._steps,
            window,
        )

    def _keep(self, lengths: np.ndarray) -> None:
        self._waiting.append(lengths)
        self._held += len(lengths)

    def _mixed(self) -> None:
        """Put what waits in the order of a pass over sets that are mixed."""
        assert self._mix is not None
        sizes = self._sizes[:-1]
        order, _ = pass_order(self._mix, sizes, [0] * len(sizes))
        lengths = np.concatenate(self._waiting)[order]
        self._waiting, self._held = [], 0
        self._was_divided = len(lengths) > LARGEST_WINDOW
        for start in range(0, len(lengths), LARGEST_WINDOW):
            self._flush()
            self._number = start // LARGEST_WINDOW
            self._keep(lengths[start : start + LARGEST_WINDOW])

    def _flush(self) -> None:
        if not self._held:
            return
        lengths = np.concatenate(self._waiting)
        self._waiting, self._held = [], 0
        rows = self._collator.rows(lengths, np.random.default_rng([self._seed, self._number]))
        self._rows += len(rows)
        self._records += len(lengths)
        self._tokens += int(lengths.sum())
        self._padding += self._padding_of(lengths, rows)
        self._steps += math.ceil(len(rows) / self._step)

    def _padding_of(self, lengths: np.ndarray, rows: Sequence[Sequence[int]]) -> int:
        """Tokens of padding in batches of these rows. A step begins a batch, and holds whole ones but for its last."""
        starts = np.arange(0, len(rows), self._batch)
        records = np.fromiter(chain.from_iterable(rows), np.int64, len(lengths))
        edges = np.cumsum([0, *map(len, rows)])
        tokens = np.add.reduceat(lengths[records], edges[:-1])
        sizes = np.diff([*starts, len(rows)])
        padding = np.maximum.reduceat(tokens, starts) * sizes - np.add.reduceat(tokens, starts)
        if isinstance(self._collator, PaddedCollator):
            return int(padding.sum())
        tried = [*range(min(_TRIED, len(starts))), len(starts) - 1]
        if all(self._made(lengths, rows[starts[n] : starts[n] + self._batch]) == padding[n] for n in tried):
            return int(padding.sum())
        return sum(self._made(lengths, rows[start : start + self._batch]) for start in starts)

    def _made(self, lengths: np.ndarray, rows: Sequence[Sequence[int]]) -> int:
        """The padding of a batch that the collator makes of these rows."""
        examples = [[_nothing(int(lengths[number])) for number in row] for row in rows]
        return self._collator.batch(examples).padding_tokens


def _nothing(tokens: int) -> Example:
    """A record of which the length alone counts."""
    return Example(np.zeros(tokens, np.int64), np.full(tokens, IGNORED))

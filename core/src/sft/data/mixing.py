"""The order in which the records of several data sets follow each other where the sets have weights.

Draw n of a run, counted from 0 over all passes, names the set that the next record comes from; it depends on the seed
and n alone. Each set is read on where the draw before it stopped, and begins anew when it has been used up, so that no
record comes a third time before all of its set have come twice. A pass ends when as many records of the first set, or
of every set, have come in it as the set has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

BLOCK = 4096
"""Draws that are made together."""
_DRAWS, _ORDER = 48, 49
"""Apart from each other, and from the seeds of shuffling, which have a single number behind the run's."""


@dataclass(frozen=True)
class Mix:
    """``weights`` of sets, and whether a pass goes on ``until_all`` have been used up, not the first alone."""

    weights: tuple[float, ...]
    seed: int
    until_all: bool

    @classmethod
    def of(cls, weights: Sequence[float | None], seed: int, until: str) -> Mix | None:
        """The mix of sets with these weights, all or none of which are None; ``until`` is ``mix_until``."""
        known = tuple(weight for weight in weights if weight is not None)
        return cls(known, seed, until == "all_exhausted") if known else None

    def draws(self, block: int) -> np.ndarray:
        """int64 [BLOCK]: the sets of the draws from ``block * BLOCK`` on."""
        shares = np.cumsum(np.array(self.weights) / sum(self.weights))
        uniform = np.random.default_rng([self.seed, _DRAWS, block]).random(BLOCK)
        return np.minimum(np.searchsorted(shares, uniform, side="right"), len(shares) - 1)

    def is_over(self, drawn: Sequence[int], sizes: Sequence[int | None]) -> bool:
        """Whether a pass ends in which so many records of each set have been drawn; a size that is not known yet is
        larger."""
        done = [size is not None and count >= size for count, size in zip(drawn, sizes, strict=True)]
        return all(done) if self.until_all else any(done)

    def __str__(self) -> str:
        return f"{self.weights} {self.until_all}"


def pass_order(mix: Mix, sizes: Sequence[int], before: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """One pass over sets of ``sizes``, all above 0, after as many records ``before`` of each: the order, int64 [n], of
    records that are numbered through all sets, and how many of each have come after it.

    A set is read in an order of its own, another one each time; it depends on the seed alone.
    """
    size, starts, begin = np.array(sizes), np.cumsum([0, *sizes]), sum(before)
    counts, parts, number = np.zeros(len(sizes), np.int64), [], begin
    while not mix.is_over(counts.tolist(), sizes):
        sets = mix.draws(number // BLOCK)[number % BLOCK :]
        reached = counts + np.cumsum(sets[:, None] == np.arange(len(sizes)), axis=0)
        over = (reached >= size).all(1) if mix.until_all else (reached >= size).any(1)
        taken = int(over.argmax()) + 1 if over.any() else len(sets)
        parts.append(sets[:taken])
        counts, number = reached[taken - 1], number + taken
    sets = np.concatenate(parts)
    order = np.empty(len(sets), np.int64)
    for one, (first, count) in enumerate(zip(before, counts.tolist(), strict=True)):
        order[sets == one] = starts[one] + _own_order(mix.seed, one, sizes[one], first, count)
    return order, (np.array(before) + counts).tolist()


def _own_order(seed: int, one: int, size: int, first: int, count: int) -> np.ndarray:
    """The records of a set from its ``first`` one on: each time through, a permutation."""
    rounds = range(first // size, -(-(first + count) // size) if count else first // size)
    shuffled = [np.random.default_rng([seed, _ORDER, one, number]).permutation(size) for number in rounds]
    flat = np.concatenate([np.zeros(0, np.int64), *shuffled])
    return flat[first % size : first % size + count]


@dataclass(frozen=True)
class Reached:
    """How far a mixed stream is in one of its sets."""

    read: int = 0
    """Records of its files that have been read since it began anew."""
    come: int = 0
    """Those of them that belong to the split."""
    drawn: int = 0
    """Records that have come in this pass."""
    size: int | None = None
    """Records that it has, once that is known."""

    def anew(self) -> Reached:
        """It has been used up."""
        return replace(self, read=0, come=0, size=self.come)

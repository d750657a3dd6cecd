"""Where a stream (``lazy``) gets its next records from: data sets one after the other, or mixed by their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np

from sft.conversations import Turn
from sft.data.bad_records import BadRecord
from sft.data.mixing import BLOCK, Mix, Reached
from sft.data.sets import DataSet, Numbered
from sft.errors import UsageError

After = Callable[[DataSet, int], Iterator[Numbered]]
"""All records of a set but those among so many first ones (:meth:`sft.data.sets.Reader.after`)."""


class Taken:
    """Records that a feed gave, by set: a window holds those of the first set, then those of the second, and so on."""

    def __init__(self, sets: int) -> None:
        self.by_set: list[list[list[Turn] | BadRecord]] = [[] for _ in range(sets)]
        self.ends_pass = False

    def __len__(self) -> int:
        return sum(map(len, self.by_set))


class Feed(Protocol):
    """Endless records, pass after pass."""

    def place(self) -> dict[str, Any]:
        """Where it is, for another feed that goes on from there; JSON."""
        ...

    def take(self, size: int) -> Taken:
        """The next records, ``size`` of them, or fewer where a pass ends; of a pass without any, none."""
        ...


class InTurn:
    """The sets one after the other. A place is how many records of the files of a set have been read, and which set."""

    def __init__(self, sets: Sequence[DataSet], after: After, place: dict[str, Any] | None) -> None:
        self._sets, self._after = sets, after
        self._set: int = place.get("set", 0) if place else 0
        self._read: int = place["offset"] if place else 0
        self._records: Iterator[tuple[int, Numbered]] = iter(())
        self._next: tuple[int, Numbered] | None = None
        self._begun = False

    def place(self) -> dict[str, Any]:
        return {"offset": self._read, **({"set": self._set} if len(self._sets) > 1 else {})}

    def take(self, size: int) -> Taken:
        if not self._begun:
            self._records, self._begun = self._from(self._set, self._read), True
            self._next = next(self._records, None)
        taken = Taken(len(self._sets))
        while self._next is not None and len(taken) < size:
            self._set, (self._read, conversation) = self._next
            taken.by_set[self._set].append(conversation)
            self._next = next(self._records, None)
        if self._next is None:
            taken.ends_pass, self._begun = True, False
            self._set, self._read = 0, 0
        return taken

    def _from(self, first: int, read: int) -> Iterator[tuple[int, Numbered]]:
        for number, one in enumerate(self._sets[first:], start=first):
            for numbered in self._after(one, read if number == first else 0):
                yield number, numbered


class Mixed:
    """The next record is one of the set that the draw names. A place is how far each set is."""

    def __init__(self, sets: Sequence[DataSet], after: After, mix: Mix, place: dict[str, Any] | None) -> None:
        self._sets, self._after, self._mix = sets, after, mix
        self._draws = place["draws"] if place else 0
        self._at = [Reached(**one) for one in place["sets"]] if place else [Reached() for _ in sets]
        self._open: list[Iterator[Numbered] | None] = [None] * len(sets)
        self._next: list[Numbered | None] = [None] * len(sets)

    def place(self) -> dict[str, Any]:
        return {"draws": self._draws, "sets": [asdict(one) for one in self._at]}

    def take(self, size: int) -> Taken:
        taken = Taken(len(self._sets))
        block, draws = -1, np.zeros(0, np.int64)
        while len(taken) < size and not taken.ends_pass:
            if self._draws // BLOCK != block:
                block = self._draws // BLOCK
                draws = self._mix.draws(block)
            one = int(draws[self._draws % BLOCK])
            taken.by_set[one].append(self._from(one))
            self._draws += 1
            taken.ends_pass = self._mix.is_over([at.drawn for at in self._at], [at.size for at in self._at])
        if taken.ends_pass:
            self._at = [replace(at, drawn=0) for at in self._at]
        return taken

    def _from(self, one: int) -> list[Turn] | BadRecord:
        """The next record of a set, which begins anew once it has been used up."""
        at, records = self._at[one], self._open[one]
        if records is None:
            records = self._open[one] = self._after(self._sets[one], at.read)
            self._next[one] = next(records, None)
        found = self._next[one]
        if found is None:
            raise UsageError(f"Data set {self._sets[one].name} has no record to train on; take it out, or look at it.")
        read, conversation = found
        at = replace(at, read=read, come=at.come + 1, drawn=at.drawn + 1)
        self._next[one] = next(records, None)
        if self._next[one] is None:
            at, self._open[one] = at.anew(), None
        self._at[one] = at
        return conversation

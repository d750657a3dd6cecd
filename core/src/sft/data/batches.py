"""From examples to batches, and from a seed to the order in which a run reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np

from sft.data.bad_records import BadRecord
from sft.data.encoded import IGNORED, DataWindow, Encoded
from sft.seams import Batch, DataCollator, Example
from sft.settings.arguments import TrainingArguments


class PaddedCollator:
    """One record a row, padded on the right to the longest row of its batch."""

    packs = False

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
        return [(int(index),) for index in order]

    def batch(self, rows: Sequence[Sequence[Example]]) -> Batch:
        return assemble(rows, self.pad_id)


class Rows(Sequence[list[Example]]):
    """The examples of rows, laid end to end in arrays. Item by item it is the lists of examples that it stands for;
    what makes a batch calls nothing of Python for each of them.

    Attributes:
        ids: int64 [T], the tokens of all examples.
        labels: int64 [T], already shifted, -100 = no target.
        lengths: int64 [examples], tokens of each.
        counts: int64 [rows], examples in each.
        weights: float32 [T], above 0 where there is a label and 0 elsewhere; None where every target counts 1.
    """

    def __init__(
        self,
        ids: np.ndarray,
        labels: np.ndarray,
        lengths: np.ndarray,
        counts: np.ndarray,
        weights: np.ndarray | None = None,
    ) -> None:
        self.ids, self.labels, self.lengths, self.counts, self.weights = ids, labels, lengths, counts, weights
        self.edges = _edges(counts)
        """int64 [rows + 1]: row i has the examples from ``edges[i]`` to ``edges[i + 1]``."""
        self.offsets = _edges(lengths)
        """int64 [examples + 1]: example i has the tokens from ``offsets[i]`` to ``offsets[i + 1]``."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[Example]]) -> Rows:
        """Rows of examples that are objects of their own."""
        if isinstance(rows, cls):
            return rows
        examples = list(chain.from_iterable(rows))
        nothing = np.zeros(0, np.int64)
        labels, weights = np.concatenate([nothing, *(example.labels for example in examples)]), None
        if any(example.weights is not None for example in examples):
            weights = np.concatenate([_weights(example) for example in examples])
            weights[labels == IGNORED] = 0
            labels = np.where(weights > 0, labels, IGNORED)
        return cls(
            np.concatenate([nothing, *(example.input_ids for example in examples)]),
            labels,
            np.fromiter((len(example.input_ids) for example in examples), np.int64),
            np.fromiter(map(len, rows), np.int64),
            weights,
        )

    @classmethod
    def taken(cls, data: Encoded, rows: Sequence[Sequence[int]]) -> Rows:
        """The records of ``data`` that have the numbers in ``rows``."""
        numbers, counts = np.fromiter(chain.from_iterable(rows), np.int64), np.fromiter(map(len, rows), np.int64)
        if len(data.beside):  # from records to their documents
            each = data.edges[numbers + 1] - data.edges[numbers]
            row = np.repeat(np.arange(len(counts)), counts)
            numbers = _within(each) + np.repeat(data.edges[numbers], each)
            counts = np.bincount(row, each, len(counts)).astype(np.int64)
        starts = data.offsets[numbers]
        lengths = data.offsets[numbers + 1] - starts - 1
        places = _within(lengths) + np.repeat(starts, lengths)
        following = data.ids[places + 1]
        return cls(
            data.ids[places].astype(np.int64),
            np.where(data.trained[places + 1], following, IGNORED).astype(np.int64),
            lengths,
            counts,
            None if data.weights is None else data.weights[places + 1],
        )

    def __len__(self) -> int:
        return len(self.counts)

    @overload
    def __getitem__(self, row: int) -> list[Example]: ...
    @overload
    def __getitem__(self, row: slice) -> list[list[Example]]: ...
    def __getitem__(self, row: int | slice) -> list[Example] | list[list[Example]]:
        if isinstance(row, slice):
            return [self[number] for number in range(len(self))[row]]
        row = range(len(self))[row]
        ends = self.offsets[self.edges[row] : self.edges[row + 1] + 1].tolist()
        places = [slice(*edges) for edges in pairwise(ends)]
        weights = self.weights
        return [
            Example(self.ids[place], self.labels[place], None if weights is None else weights[place])
            for place in places
        ]


def assemble(rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
    """Put the examples of each row one after the other and pad rows on the right with ``pad_id`` to the
    longest of them.

    Positions begin at 0 in each example. ``startend_row_indices`` keeps examples apart (FlashMask, arXiv 2410.01359,
    causal form), and each padding token is a document of its own, so that no row of the attention matrix is empty.
    """
    flat = Rows.of(rows)
    lengths, begins = flat.lengths, flat.offsets[flat.edges]
    tokens = np.diff(begins)
    width = int(tokens.max(initial=0))
    # Where a row holds a token, [rows, width]; taken row by row these places are the tokens of ``flat``, in order.
    held = np.arange(width) < tokens[:, None]
    input_ids = np.full(held.shape, pad_id, np.int64)
    labels = np.full(held.shape, IGNORED, np.int64)
    position_ids = np.zeros(held.shape, np.int64)
    ends = np.tile(np.arange(1, width + 1, dtype=np.int32), (len(flat), 1))
    input_ids[held], labels[held], position_ids[held] = flat.ids, flat.labels, _within(lengths)
    weights = None
    if flat.weights is not None:
        weights = np.zeros(held.shape, np.float32)
        weights[held] = flat.weights
    ends[held] = np.repeat(flat.offsets[1:] - np.repeat(begins[:-1], flat.counts), lengths)
    each, edges = lengths.tolist(), flat.edges.tolist()
    found = tuple(tuple(each[start:stop]) for start, stop in pairwise(edges))
    return Batch(input_ids, labels, position_ids, ends[:, None, :, None], found, weights)


def _weights(example: Example) -> np.ndarray:
    """float32 [n], what each label of ``example`` weighs."""
    given = example.weights
    return np.ones(len(example.labels), np.float32) if given is None else np.asarray(given, np.float32)


def _edges(lengths: np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each of ``n`` parts that follow each other begins, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _within(lengths: np.ndarray) -> np.ndarray:
    """int64: 0, 1, 2 and so on in each of parts of ``lengths`` that follow each other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def make_batches(data: Encoded, collator: DataCollator, rows: Sequence[Sequence[int]], batch_size: int) -> list[Batch]:
    """Rows of record numbers → batches of at most ``batch_size`` rows, in order."""
    starts = range(0, len(rows), batch_size)
    return [make_batch(data, collator, rows[start : start + batch_size]) for start in starts]


def make_batch(data: Encoded, collator: DataCollator, rows: Sequence[Sequence[int]]) -> Batch:
    """Rows of record numbers → one batch."""
    return collator.batch(Rows.taken(data, rows))


class Data(Protocol):
    """What a run trains on: read whole (:class:`Encoded`; several sets: :class:`sft.data.several.Several`), or streamed
    (:class:`sft.data.stream.Stream`)."""

    @property
    def lengths(self) -> np.ndarray:
        """int64, tokens of each record; of a stream, those of its first window."""
        ...

    def check_fits(self, model: Path, positions: int) -> None:
        """Refuse records of more tokens than the model in folder ``model`` has positions, with :class:`UsageError`: now
        those that have been read, and the others when they are."""
        ...

    def windows(self, place: dict[str, Any] | None = None) -> Iterator[DataWindow]:
        """Endless windows from the beginning, or from the one that has ``place``."""
        ...

    def list_bad(self, to: Callable[[Sequence[BadRecord]], None]) -> None:
        """Tell ``to`` of the records that are skipped: of those that are known, and of others when they are."""
        ...

    def fingerprint(self) -> str: ...

    def has_fingerprint(self, expected: str) -> bool:
        """Whether these are the records of a checkpoint that has ``expected`` as their fingerprint."""
        ...

    def report(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step, as record numbers of ``data``."""

    number: int
    epoch: float
    """Passes over the data that are done after it."""
    data: Encoded
    rows: list[tuple[int, ...]]
    place: dict[str, Any]
    """Where :meth:`Schedule.iterate` finds the next step again; JSON."""
    ends_pass: bool


@dataclass(frozen=True)
class Schedule:
    """Which rows belong to which optimizer step: a pure function of data, collator, seed and step number.

    The global batch of a step holds the same rows in the same order however many processes share it, and a
    run resumes in the middle of an epoch by asking for the next step.
    """

    data: Data
    collator: DataCollator
    seed: int
    rows_per_step: int
    epochs: float
    max_steps: int
    """-1: ``epochs`` decides."""

    @classmethod
    def of(cls, training: TrainingArguments, data: Data, collator: DataCollator, processes: int) -> Schedule:
        """The schedule that the settings ask for, where ``processes`` share the rows of each step."""
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
        return cls(data, collator, training.seed, rows, training.num_train_epochs, training.max_steps)

    @cached_property
    def first_rows(self) -> np.ndarray:
        """int64 [rows], the tokens in each row of the first pass over the data (of a stream: of its first window), in
        their order."""
        window = next(self.data.windows())
        rows = self._places(window)
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        places = np.fromiter(chain.from_iterable(rows), np.int64, int(counts.sum()))
        row = np.repeat(np.arange(len(rows)), counts)
        return np.bincount(row, window.lengths[places], len(rows)).astype(np.int64)

    @cached_property
    def total_steps(self) -> int:
        """``max_steps``, or the steps of ``epochs`` passes (a fraction of the last one rounded up)."""
        if self.max_steps > 0:
            return self.max_steps
        whole, part = int(self.epochs), self.epochs - int(self.epochs)
        later = islice(self.data.windows(), 1, None)
        counts = chain([len(self.first_rows)], (len(self._places(window)) for window in later))
        steps_of = (math.ceil(count / self.rows_per_step) for count in counts)
        steps = sum(islice(steps_of, whole))
        # Rounded first: 1.1 - 1 is a little more than 0.1, which would cost a step too many.
        return max(1, steps + (math.ceil(round(part * next(steps_of), 6)) if part else 0))

    def written(self) -> dict[str, Any]:
        """What ``run.json`` says of it."""
        return {"rows_per_step": self.rows_per_step, "fingerprint": self.data.fingerprint()}

    def iterate(self, start: int = 0, place: dict[str, Any] | None = None) -> Iterator[Step]:
        """Endless steps after step ``start``, which was taken at ``place`` (None: look for it from the beginning)."""
        number = place["first_step"] if place else 0
        for window in self.data.windows(place):
            rows, first = self._rows(window), number
            steps = math.ceil(len(rows) / self.rows_per_step)
            for index in range(steps):
                number += 1
                if number > start:
                    chosen = rows[index * self.rows_per_step : (index + 1) * self.rows_per_step]
                    passes = window.passes_after - window.passes
                    epoch = window.passes + passes * (index + 1) / steps
                    place = {**window.place, "first_step": first}
                    yield Step(number, epoch, window.data, chosen, place, passes > 0 and index + 1 == steps)

    def batches(
        self, start: int, place: dict[str, Any] | None, rank: int, world: int, size: int
    ) -> Iterator[tuple[Step, list[Batch]]]:
        """Each step of :meth:`iterate`, with the batches of at most ``size`` rows that process ``rank`` of ``world``
        has in it."""
        for step in self.iterate(start, place):
            yield step, make_batches(step.data, self.collator, step.rows[rank::world], size)

    def _rows(self, window: DataWindow) -> list[tuple[int, ...]]:
        rows = self._places(window)
        if window.order is None:
            return rows
        records = window.order.tolist()
        return [tuple(records[place] for place in row) for row in rows]

    def _places(self, window: DataWindow) -> list[tuple[int, ...]]:
        """Its rows, as places of records in the window."""
        return self.collator.rows(window.lengths, np.random.default_rng([self.seed, window.number]))

"""From examples to batches, and from a seed to the order in which a run reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sft.data.encoding import IGNORED, DataWindow, Encoded
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


def assemble(rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
    """Put the examples of each row one after the other and pad rows on the right to the longest of them.

    Positions begin at 0 in each example. ``startend_row_indices`` keeps examples apart (FlashMask, arXiv 2410.01359,
    causal form), and each padding token is a document of its own, so that no row of the attention matrix is empty.
    """
    width = max(sum(len(example.input_ids) for example in row) for row in rows)
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    position_ids = np.zeros(shape, np.int64)
    ends = np.tile(np.arange(1, width + 1, dtype=np.int32), (len(rows), 1))
    lengths = []
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            stop = start + len(example.input_ids)
            input_ids[number, start:stop] = example.input_ids
            labels[number, start:stop] = example.labels
            position_ids[number, start:stop] = np.arange(stop - start)
            ends[number, start:stop] = stop
            start = stop
        lengths.append(tuple(len(example.input_ids) for example in row))
    return Batch(input_ids, labels, position_ids, ends[:, None, :, None], tuple(lengths))


def make_batches(data: Encoded, collator: DataCollator, rows: Sequence[Sequence[int]], batch_size: int) -> list[Batch]:
    """Rows of record numbers → batches of at most ``batch_size`` rows, in order."""
    starts = range(0, len(rows), batch_size)
    return [make_batch(data, collator, rows[start : start + batch_size]) for start in starts]


def make_batch(data: Encoded, collator: DataCollator, rows: Sequence[Sequence[int]]) -> Batch:
    """Rows of record numbers → one batch."""
    return collator.batch([[data[index] for index in row] for row in rows])


class Data(Protocol):
    """What a run trains on: read whole (:class:`Encoded`), or streamed (:class:`sft.data.stream.Stream`)."""

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

    def fingerprint(self) -> str: ...

    def report(self) -> dict[str, int]: ...


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
    def total_steps(self) -> int:
        """``max_steps``, or the steps of ``epochs`` passes (a fraction of the last one rounded up)."""
        if self.max_steps > 0:
            return self.max_steps
        whole, part = int(self.epochs), self.epochs - int(self.epochs)
        windows = self.data.windows()
        steps = sum(self._steps_in(next(windows)) for _ in range(whole))
        # Rounded first: 1.1 - 1 is a little more than 0.1, which would cost a step too many.
        return max(1, steps + (math.ceil(round(part * self._steps_in(next(windows)), 6)) if part else 0))

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

    def _rows(self, window: DataWindow) -> list[tuple[int, ...]]:
        return self.collator.rows(window.data.lengths, np.random.default_rng([self.seed, window.number]))

    def _steps_in(self, window: DataWindow) -> int:
        return math.ceil(len(self._rows(window)) / self.rows_per_step)

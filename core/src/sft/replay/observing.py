"""Steps looked at while the run's own loop computes them: their rows, and the loss of each token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from sft.data.encoded import IGNORED
from sft.errors import SftError
from sft.replay.value import ReplayedRecord, ReplayedRow, Span
from sft.training.loss import target_losses

if TYPE_CHECKING:
    from sft.context import CoreRun
    from sft.data.batches import Step
    from sft.seams import Batch


@dataclass
class Seen:
    """A step, with each of its micro-batches and the losses float64 [B, S] of that one's labels."""

    at: Step
    batches: list[tuple[Batch, np.ndarray]] = field(default_factory=list)


class Watched:
    """The objective of a run; of the steps that are ``wanted`` it writes down what goes through it.

    Nothing is changed by that: the losses of tokens are computed from the hidden states that the step's own loss is
    made of, draw nothing, and have no gradients.
    """

    def __init__(self, run: CoreRun, wanted: Collection[int]) -> None:
        self._run, self._objective, self._wanted = run, run.objective, wanted
        self.seen: dict[int, Seen] = {}
        """By the number of the step."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def loss(self, model: Any, factor: float, hidden: Any, batch: Batch) -> tuple[Any, Sequence[float]]:
        """See :meth:`sft.training.objective.RunObjective.loss`."""
        at = self._run.at
        if at is not None and at.number in self._wanted:
            losses = target_losses(hidden, batch.labels, model.lm_head)
            self.seen.setdefault(at.number, Seen(at)).batches.append((batch, losses))
        found: tuple[Any, Sequence[float]] = self._objective.loss(model, factor, hidden, batch)
        return found


def laid_out(seen: Seen) -> Iterator[tuple[ReplayedRow, np.ndarray | None]]:
    """The rows of a step in their order, each with what its targets weigh, float32 [S]; None where all count 1."""
    for batch, losses in seen.batches:
        for row in range(len(batch.input_ids)):
            yield (
                ReplayedRow(
                    batch.input_ids[row],
                    batch.labels[row],
                    batch.position_ids[row],
                    batch.startend_row_indices[row, 0, :, 0],
                    tuple(batch.lengths[row]),
                    losses[row],
                ),
                None if batch.weights is None else batch.weights[row],
            )


Places = Callable[[dict[str, Any], Sequence[int]], list[str]]
"""See :attr:`sft.data.reading.RunData.places`."""


def places_of(steps: Sequence[Seen], places: Places) -> dict[int, dict[int, str]]:
    """File and line of each record in each of ``steps``: by step, and by the record's number in its data. Those of one
    window are looked up together, for their files are read again."""
    found: dict[int, dict[int, str]] = {}
    for _, group in groupby(steps, lambda one: one.at.place["window"]):
        together = list(group)
        numbers = sorted({number for one in together for row in one.at.rows for number in row})
        data, place = together[0].at.data, together[0].at.place
        try:
            named = dict(zip(numbers, places(place, data.numbers(numbers)), strict=True))
        except (SftError, OSError, KeyError):
            named = {number: f"record {number + 1:,} of data that has changed since" for number in numbers}
        found |= {one.at.number: named for one in together}
    return found


def records_of(seen: Seen, named: dict[int, str]) -> list[ReplayedRecord]:
    """The records of a step in the order of its rows; ``named`` are their places."""
    found = []
    for number, (row, weighing) in enumerate(laid_out(seen)):
        for place, span in _spans(seen.at, number, row, named):
            here = slice(span.start, span.end)
            is_target = row.labels[here] != IGNORED
            weight = is_target.astype(np.float64) if weighing is None else weighing[here].astype(np.float64)
            total = float(weight.sum())
            loss = float((row.losses[here] * weight).sum()) / total if total else None
            found.append(ReplayedRecord(place, span, span.end - span.start, int(is_target.sum()), total, loss))
    return found


def _spans(at: Step, number: int, row: ReplayedRow, named: dict[int, str]) -> Iterator[tuple[str, Span]]:
    """The records of a row, where each stands. A collator that does not lay them out one after the other, as they come,
    makes one of all."""
    records, data = at.rows[number], at.data
    documents = [range(*data.edges[record : record + 2].tolist()) for record in records]
    lengths = [[int(data.offsets[one + 1] - data.offsets[one]) - 1 for one in these] for these in documents]
    if tuple(length for these in lengths for length in these) != row.lengths:
        yield "; ".join(named[record] for record in records), Span(number, 0, row.tokens, len(row.lengths))
        return
    start = 0
    for record, these in zip(records, lengths, strict=True):
        yield named[record], Span(number, start, start + sum(these), len(these))
        start += sum(these)

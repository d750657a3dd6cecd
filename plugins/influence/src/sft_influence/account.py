"""What ``sft why`` found, as a value: from a run and some answers to the records that taught them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import sft
from sft import UsageError
from sft_influence.tracing import passes_of, shares, trace

Asked = tuple[Sequence[sft.Turn], "sft.Turn | None"]
"""What stands before an answer, and the answer; None: the model's own."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a run.

    Attributes:
        method: One of :data:`sft_influence.tracing.METHODS`.
        checkpoints: The steps of those to look at; None: of all that are kept.
        sample: How many records to look at, drawn by the run's seed; None: all.
        top: How many helpful, and how many harmful records to name.
    """

    method: str
    checkpoints: Sequence[int] | None = None
    sample: int | None = None
    top: int = 10


@dataclass(frozen=True)
class Record:
    """A training record: file and line, what it did to the answer, and what the model reads of it."""

    place: str
    score: float
    text: str


@dataclass(frozen=True)
class Explained:
    """An answer and the records that taught it.

    Attributes:
        is_own: Whether the answer is the model's own, drawn at the last checkpoint.
        tokens: Of the answer.
        losses: The mean loss (nats) of its tokens at each checkpoint.
        helpful: Records whose steps lowered the loss, the most helpful one first; their scores are above 0.
        harmful: Records whose steps raised it, the most harmful one first; their scores are below 0.
    """

    prompt: str
    answer: str
    is_own: bool
    tokens: int
    losses: list[float]
    helpful: list[Record]
    harmful: list[Record]


@dataclass(frozen=True)
class Account:
    """What ``sft why --json`` prints.

    Attributes:
        checkpoints: Their steps, in the order of the losses.
        records: How many were looked at, of ``of`` that the run has learned from.
        passes: How often a record went forward and backward.
        trained: Values of parameters that train.
    """

    run: str
    method: str
    checkpoints: list[int]
    records: int
    of: int
    passes: int
    trained: int
    answers: list[Explained]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def account(opened: sft.Reopened, asked: Iterable[Asked], wanted: Wanted) -> Account:
    """Trace the answers that are ``asked`` about through the run. Raises :class:`UsageError` for what is not there."""
    checkpoints = _checkpoints(opened, wanted)
    answers = [
        (turns, answer or sft.Turn("assistant", opened.answer(turns)), answer is None) for turns, answer in asked
    ]
    batches = [opened.answered(before, answer) for before, answer, _ in answers]
    weights = shares(opened.steps(), checkpoints, len(opened))
    learned = np.flatnonzero(weights.any(axis=0))
    records = learned
    if wanted.sample is not None and wanted.sample < len(learned):
        records = np.sort(opened.run.rng("why").choice(learned, wanted.sample, replace=False))
    trained = sum(math.prod(parameter.shape) for parameter in opened.trainable.values())
    passes = passes_of(weights, records.tolist())
    _say_cost(opened, len(batches), checkpoints, (len(records), len(learned)), passes, trained)
    found = trace(opened, batches, checkpoints, records.tolist(), weights, wanted.method)
    parts = _Parts(opened, records.tolist())
    explained = []
    for number, (before, answer, is_own) in enumerate(answers):
        helpful, harmful = parts.named(found.scores[number], wanted.top)
        prompt, tokens = before[-1].content if before else "", batches[number].target_tokens
        losses = found.losses[:, number].tolist()
        explained.append(Explained(prompt, answer.content, is_own, tokens, losses, helpful, harmful))
    looked = (len(records), len(learned), passes, trained)
    return Account(str(opened.folder), wanted.method, list(checkpoints), *looked, explained)


def _checkpoints(opened: sft.Reopened, wanted: Wanted) -> list[int]:
    kept = opened.checkpoints
    missing = sorted(set(wanted.checkpoints or ()) - set(kept))
    if missing:
        raise UsageError(
            f"{opened.folder} has no checkpoint of step {missing[0]}; it has those of {', '.join(map(str, kept))}."
        )
    return kept if wanted.checkpoints is None else sorted(set(wanted.checkpoints))


def _say_cost(
    opened: sft.Reopened,
    answers: int,
    checkpoints: Sequence[int],
    records: tuple[int, int],
    passes: int,
    trained: int,
) -> None:
    """What is about to be computed, before it is."""
    of = f" of {records[1]:,}" if records[0] < records[1] else ""
    size = 4 * trained * (answers + 1) / 2**20
    opened.run.say(
        f"tracing {answers:,} answer{'s' * (answers > 1)} to {records[0]:,}{of} records at the "
        f"{named_checkpoints(checkpoints)}: {passes:,} passes of one record forward and backward; the gradients of "
        f"{trained:,} trained values take {size:,.1f} MiB"
    )


def named_checkpoints(steps: Sequence[int]) -> str:
    """The checkpoints of these steps, in words."""
    more = "s" * (len(steps) > 1)
    return f"checkpoint{more} of step{more} {', '.join(map(str, steps))}"


class _Parts:
    """Records by what they were read as: the parts that ``truncation split`` makes of one count together."""

    def __init__(self, opened: sft.Reopened, records: Sequence[int]) -> None:
        self._opened, self._records = opened, list(records)
        read, self._whole = np.unique(opened.read_as(self._records), return_inverse=True)
        self._count = len(read)

    def named(self, scores: np.ndarray, top: int) -> tuple[list[Record], list[Record]]:
        """The ``top`` records with the highest scores above 0, and those with the lowest below 0, from ``scores``
        float64 [parts]."""
        sums = np.bincount(self._whole, scores, self._count)
        order = np.argsort(-sums, kind="stable")
        helpful = [one for one in order[:top] if sums[one] > 0]
        harmful = [one for one in order[::-1][:top] if sums[one] < 0]
        firsts = [self._records[int(np.flatnonzero(self._whole == one)[0])] for one in (*helpful, *harmful)]
        places = self._opened.places(firsts)
        found = [
            Record(place, float(sums[one]), self._text(one))
            for one, place in zip((*helpful, *harmful), places, strict=True)
        ]
        return found[: len(helpful)], found[len(helpful) :]

    def _text(self, one: int) -> str:
        return "\n".join(self._opened.text(self._records[part]) for part in np.flatnonzero(self._whole == one))

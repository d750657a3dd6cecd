"""Encoded records: their tokens in flat arrays, what became of each, and the windows in which a run reads them.

Labels are shifted here, once: position i of a row is trained to predict its token i + 1.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sft.data.bad_records import BadRecord
from sft.errors import UsageError
from sft.seams import Example

IGNORED = -100
NO_TARGET = (
    "No {} record keeps a target, not one token of an answer that has another before it; check the data and the chat "
    "template, or raise max_length."
)


@dataclass
class Counts:
    """What became of the records; part of every run's report, so that nothing is dropped in silence. What was cut or
    dropped is counted of the records that are kept."""

    records: int = 0
    """Records that were read, those that are skipped or dropped among them."""
    records_skipped: int = 0
    """Records that cannot be read (``on_bad_record``)."""
    records_dropped: int = 0
    """Records left without a target by ``src_length`` and ``max_length``."""
    records_too_long: int = 0
    """Records that are dropped because they are longer than ``max_length`` (``truncation drop``)."""
    turns_dropped: int = 0
    """Turns that conversations lost from their beginning."""
    turns_after_answers: int = 0
    """Turns after the last answer that is learned, which the model does not see."""
    prompts_truncated: int = 0
    """Records whose prompt lost tokens from its beginning."""
    targets_truncated: int = 0
    """Records whose answer lost tokens from its end."""
    answers_rewritten_by_template: int = 0
    """Answers that are not learned, because the template writes them otherwise once the conversation has gone on."""
    answers_altered_by_template: int = 0
    """Records whose last answer does not stand as it is in what is learned: the template leaves some of it out."""
    records_without_end: int = 0
    """Records whose template teaches the model no token on which to stop."""
    calls: int = 0
    """Tool calls in answers that are learned."""
    calls_rewritten_by_template: int = 0
    """Those in ``answers_rewritten_by_template``."""
    texts_removed_by_template: int = 0
    """Texts that the records have beside calls and the model does not see: the template writes the calls alone."""
    thoughts: int = 0
    """Thoughts that are learned with their answers, but for empty ones."""
    empty_thoughts: int = 0
    """Empty thoughts that are learned: the model learns not to think."""
    thoughts_left_out: int = 0
    """Thoughts in answers that are learned without them (``train_on_thoughts``)."""
    empty_thoughts_left_out: int = 0
    """The same of empty thoughts."""
    thoughts_removed_by_template: int = 0
    """Thoughts that the records have and the model does not see: the template takes them out of past answers."""
    thoughts_put_before_answer: int = 0
    """Thoughts that stand beside their answers in the records, and are written before them between ``<think>`` and
    ``</think>``, because the template takes them in no other way."""
    records_weighted: int = 0
    """Records with a target whose weight is not 1."""
    records_truncated: int = 0
    """Records that lost tokens at one end (``truncation left`` or ``right``)."""
    records_split: int = 0
    """Records that are divided into several rows (``truncation split``)."""
    pieces_dropped: int = 0
    """Parts of such records that hold no target."""
    tokens: int = 0
    target_tokens: int = 0

    def __str__(self) -> str:
        """The counts for a line of a run, without those that are zero."""
        return ", ".join([f"{self.tokens:,} tokens", f"{self.target_tokens:,} target tokens", *self.events()])

    def events(self) -> list[str]:
        """What became of the records, without what is zero."""
        said = {
            "records_skipped": "{} record{s} skipped (not readable)",
            "records_dropped": "{} record{s} dropped (no target left)",
            "records_too_long": "{} record{s} dropped (too long)",
            "turns_dropped": "{} turn{s} dropped",
            "turns_after_answers": "{} turn{s} after the last answer left out",
            "prompts_truncated": "{} prompt{s} cut",
            "targets_truncated": "{} answer{s} cut",
            "answers_rewritten_by_template": "{} answer{s} rewritten by template",
            "answers_altered_by_template": "{} answer{s} altered by template",
            "records_without_end": "{} record{s} without end",
            "calls": "{} call{s} learned",
            "calls_rewritten_by_template": "{} call{s} rewritten by template",
            "texts_removed_by_template": "{} text{s} beside calls removed by template",
            "thoughts": "{} thought{s} learned",
            "empty_thoughts": "{} empty thought{s} learned",
            "thoughts_left_out": "{} thought{s} not learned",
            "empty_thoughts_left_out": "{} empty thought{s} not learned",
            "thoughts_removed_by_template": "{} thought{s} removed by template",
            "thoughts_put_before_answer": "{} thought{s} written between <think> and </think>",
            "records_weighted": "{} record{s} weighted",
            "records_truncated": "{} record{s} cut",
            "records_split": "{} record{s} split",
            "pieces_dropped": "{} part{s} dropped (no target)",
        }
        found = [(getattr(self, name), text) for name, text in said.items()]
        return [text.format(f"{number:,}", s="s" * (number != 1)) for number, text in found if number]

    @classmethod
    def of(cls, values: dict[str, int]) -> Counts:
        """The counts of a checkpoint, those too that had another name when it was written."""
        renamed = {"dropped": "records_dropped", "answers_without_end": "records_without_end"}
        return cls(**{renamed.get(name, name): value for name, value in values.items()})

    @classmethod
    def of_one_record(cls, members: Sequence[Counts]) -> Counts:
        """The counts of several conversations that are one record."""
        total = sum(members, cls())
        for name in ("records_without_end", "records_truncated", "prompts_truncated", "targets_truncated"):
            setattr(total, name, max(getattr(one, name) for one in members))
        for name in ("answers_altered_by_template", "records_too_long"):
            setattr(total, name, max(getattr(one, name) for one in members))
        return total

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class Encoded:
    """A data set in flat arrays: document i is ``ids[offsets[i]:offsets[i + 1]]``, trained where ``trained``. A record
    is one document, but for those that have others ``beside`` them."""

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    counts: Counts = field(default_factory=Counts)
    dropped: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """The numbers of records that were read and are not here, in ascending order, from 0."""
    bad: list[BadRecord] = field(default_factory=list)
    """The records that were skipped, in their order; none of them is in the arrays."""
    further: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Which are no records of their own, but the next part of the record before (``truncation split``); ascending."""
    weights: np.ndarray | None = None
    """What each token weighs as a target, float32, 0 where it is none; None where all weigh 1."""
    beside: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Which documents are no records, but stay together with the document before (:attr:`Conversation.beside`);
    ascending."""

    def __len__(self) -> int:
        """How many records there are."""
        return len(self.offsets) - 1 - len(self.beside)

    @cached_property
    def edges(self) -> np.ndarray:
        """int64 [records + 1]: record i is the documents from ``edges[i]`` to ``edges[i + 1]``."""
        return np.delete(np.arange(len(self.offsets)), self.beside)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that each record puts into a row: of each of its documents one less than it has, because labels are
        shifted."""
        each = np.diff(self.offsets) - 1
        return np.add.reduceat(each, self.edges[:-1]) if len(self.beside) else each

    @property
    def longest_of_each(self) -> np.ndarray:
        """The same of the longest document of each record."""
        each = np.diff(self.offsets) - 1
        return np.maximum.reduceat(each, self.edges[:-1]) if len(self.beside) else each

    @property
    def longest(self) -> int:
        """The same of the longest document."""
        return int((np.diff(self.offsets) - 1).max(initial=0))

    def __getitem__(self, index: int) -> Example:
        """A document."""
        place = slice(self.offsets[index], self.offsets[index + 1])
        ids, trained = self.ids[place].astype(np.int64), self.trained[place]
        weights = None if self.weights is None else self.weights[place][1:]
        return Example(ids[:-1], np.where(trained[1:], ids[1:], IGNORED), weights)

    def numbers(self, kept: Iterable[int]) -> list[int]:
        """Which of the records that were read, from 0, those here are whose numbers are ``kept``."""
        before = self.dropped - np.arange(len(self.dropped))  # kept ones before each that is not
        wholes = [number - int(np.searchsorted(self.further, number, "right")) for number in kept]
        return [number + int(np.searchsorted(before, number, "right")) for number in wholes]

    def fingerprint(self) -> str:
        """Changes whenever a token, a target, its weight or the order of the records does."""
        return self._digest

    def has_fingerprint(self, expected: str) -> bool:
        return expected == self.fingerprint()

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for array in (self.ids, self.trained, self.offsets, self.weights, self.beside if len(self.beside) else None):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def check_fits(self, model: Path, positions: int) -> None:
        """Refuse a record that has more tokens than the model in folder ``model`` has positions."""
        check_fits(self.longest, model, positions)

    def report(self) -> dict[str, int]:
        return asdict(self.counts)

    def list_bad(self, to: Callable[[Sequence[BadRecord]], None]) -> None:
        """Tell ``to`` of the records that are skipped: of those that are known, and of others when they are."""
        to(self.bad)

    def windows(self, place: dict[str, Any] | None = None) -> Iterator[DataWindow]:
        """Each pass over the data is a window, from the first one or from that of ``place``."""
        for number in itertools.count(place["window"] if place else 0):
            yield DataWindow(number, self, number, number + 1, {"window": number})


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The records of all ``parts``, one part after the other."""
    records = itertools.accumulate((part.counts.records for part in parts), initial=0)
    rows = itertools.accumulate((len(part) for part in parts), initial=0)
    documents = itertools.accumulate((len(part.offsets) - 1 for part in parts), initial=0)
    nothing = np.zeros(0, np.int64)
    return Encoded(
        np.concatenate([np.zeros(0, np.int32), *(part.ids for part in parts)]),
        np.concatenate([np.zeros(0, bool), *(part.trained for part in parts)]),
        np.cumsum(np.concatenate([np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)])),
        sum((part.counts for part in parts), Counts()),
        np.concatenate([nothing, *(part.dropped + n for part, n in zip(parts, records, strict=False))]),
        [one for part in parts for one in part.bad],
        np.concatenate([nothing, *(part.further + n for part, n in zip(parts, rows, strict=False))]),
        _joined_weights(parts),
        np.concatenate([nothing, *(part.beside + n for part, n in zip(parts, documents, strict=False))]),
    )


def _joined_weights(parts: Sequence[Encoded]) -> np.ndarray | None:
    if all(part.weights is None for part in parts):
        return None
    return np.concatenate([part.trained.astype(np.float32) if part.weights is None else part.weights for part in parts])


def check_fits(length: int, model: Path, positions: int) -> None:
    """Refuse a record that is too long for the model in folder ``model``. ``length``: what it puts into a row, which is
    a token less than it has: the last one is only predicted."""
    if length > positions:
        raise UsageError(
            f"A record has {length + 1} tokens and {model} reads at most {positions + 1}, the last of which is only "
            "predicted (max_position_embeddings, or a smaller sliding_window, is one less); to cut longer records, "
            f"give --max_length {positions + 1}."
        )


@dataclass(frozen=True)
class DataWindow:
    """Records that are shuffled, and perhaps packed, among each other. ``passes`` over all data are done before it."""

    number: int
    data: Encoded
    passes: int
    passes_after: int
    place: dict[str, Any]
    """What finds it again; JSON."""
    order: np.ndarray | None = None
    """int64 [n], the records that are in it, one perhaps several times; None: each of ``data`` once."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n], tokens that each of its records puts into a row."""
        return self.data.lengths if self.order is None else self.data.lengths[self.order]

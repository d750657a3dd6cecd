"""From turns to token ids and labels: what the model reads, and on which tokens it is trained.

The chat template says how a conversation is written and which characters of it are learned (``templates.py``):
the text of training turns, with the token that ends the turn. Labels are shifted here, once: position i of a row
is trained to predict its token i + 1.
"""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sft.data.altered import holds_answer
from sft.data.bad_records import LOOKED_AT, BadRecord, BadRecordError
from sft.data.formats import Conversation
from sft.data.templates import Written
from sft.data.tokenizer import Tokenizer
from sft.errors import UsageError
from sft.seams import Example, Turn

IGNORED = -100
T = TypeVar("T")
Group = list["list[Turn] | BadRecord"]
"""Conversations that are encoded together; of a bad record nothing is left but what is wrong with it."""
NO_TARGET = (
    "No {} record keeps a target, not one token of an answer that has another before it; check the data and the chat "
    "template, or raise max_length."
)
_MANY_TURNS = 32
_LARGEST_GROUP = 2_000_000
"""Characters."""


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
    turns_dropped: int = 0
    """Turns that conversations lost from their beginning."""
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
    tokens: int = 0
    target_tokens: int = 0

    def __str__(self) -> str:
        """The counts for a line of a run, without those that are zero."""
        said = {
            "records_skipped": "{} records skipped (they cannot be read)",
            "records_dropped": "{} records dropped (no target left)",
            "turns_dropped": "{} turns dropped",
            "prompts_truncated": "{} prompts cut",
            "targets_truncated": "{} answers cut",
            "answers_rewritten_by_template": "{} answers rewritten by template",
            "answers_altered_by_template": "{} answers altered by template",
            "records_without_end": "{} records without end",
        }
        counts = [text.format(f"{getattr(self, name):,}") for name, text in said.items() if getattr(self, name)]
        return ", ".join([f"{self.tokens:,} tokens", f"{self.target_tokens:,} target tokens", *counts])

    @classmethod
    def of(cls, values: dict[str, int]) -> Counts:
        """The counts of a checkpoint, those too that had another name when it was written."""
        renamed = {"dropped": "records_dropped", "answers_without_end": "records_without_end"}
        return cls(**{renamed.get(name, name): value for name, value in values.items()})

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class Encoded:
    """A data set in three flat arrays: record i is ``ids[offsets[i]:offsets[i + 1]]``, trained where ``trained``."""

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    counts: Counts = field(default_factory=Counts)
    dropped: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """The numbers of records that were read and are not here, in ascending order, from 0."""
    bad: list[BadRecord] = field(default_factory=list)
    """The records that were skipped, in their order; none of them is in the arrays."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that each record puts into a row: one less than it has, because labels are shifted."""
        return np.diff(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        ids = self.ids[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)
        trained = self.trained[self.offsets[index] : self.offsets[index + 1]]
        return Example(ids[:-1], np.where(trained[1:], ids[1:], IGNORED))

    def numbers(self, kept: Iterable[int]) -> list[int]:
        """Which of the records that were read, from 0, those here are whose numbers are ``kept``."""
        before = self.dropped - np.arange(len(self.dropped))  # kept ones before each that is not
        return [number + int(np.searchsorted(before, number, "right")) for number in kept]

    def fingerprint(self) -> str:
        """Changes whenever a token, a target or the order of the records does."""
        return self._digest

    def has_fingerprint(self, expected: str) -> bool:
        return expected == self.fingerprint()

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for array in (self.ids, self.trained, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def check_fits(self, model: Path, positions: int) -> None:
        """Refuse a record that has more tokens than the model in folder ``model`` has positions."""
        _check_fits(int(self.lengths.max(initial=0)), model, positions)

    def report(self) -> dict[str, int]:
        return asdict(self.counts)

    def list_bad(self, to: Callable[[Sequence[BadRecord]], None]) -> None:
        """Tell ``to`` of the records that are skipped: of those that are known, and of others when they are."""
        to(self.bad)

    def windows(self, place: dict[str, Any] | None = None) -> Iterator[DataWindow]:
        """Each pass over the data is a window, from the first one or from that of ``place``."""
        for number in itertools.count(place["window"] if place else 0):
            yield DataWindow(number, self, number, number + 1, {"window": number})


def _check_fits(length: int, model: Path, positions: int) -> None:
    """``length``: what a record puts into a row, which is a token less than it has: the last one is only predicted."""
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


@dataclass(frozen=True)
class Encoding:
    """How conversations become tokens. A conversation that is too long loses its oldest turns first, then the
    beginning of its prompt (``src_length``), then the end of its answer (``max_length``); all are counted.

    Where ``src_length`` would let a prompt fill ``max_length`` alone, the prompt of a longer record leaves its answer
    room, up to half of ``max_length``. ``room``: a model's folder and its positions, where a record that is longer is
    to be refused at once. ``skips``: whether conversations that the template refuses are skipped.
    """

    tokenizer: Tokenizer
    src_length: int
    max_length: int
    room: tuple[Path, int] | None = None
    skips: bool = False

    def __call__(self, group: Group) -> Encoded:
        """Encode conversations, which the tokenizer gets together; records that were bad before are only listed."""
        encoder = _Encoder(self.tokenizer, self.src_length, self.max_length, self.skips)
        ids: list[np.ndarray] = []
        trained: list[np.ndarray] = []
        for tokens, targets in encoder.encode(group):
            if self.room is not None:
                _check_fits(len(tokens) - 1, *self.room)
            ids.append(tokens)
            trained.append(targets)
        return Encoded(
            np.concatenate([np.zeros(0, np.int32), *ids]),
            np.concatenate([np.zeros(0, bool), *trained]),
            np.cumsum([0, *map(len, ids)], dtype=np.int64),
            encoder.counts,
            np.array(sorted(encoder.dropped), np.int64),
            [record for _, record in sorted(encoder.bad)],
        )


def encode(
    conversations: Iterable[list[Turn] | BadRecord],
    tokenizer: Tokenizer,
    src_length: int,
    max_length: int,
    group: int = 256,
    room: tuple[Path, int] | None = None,
    by: Callable[[Encoding, Iterator[Group]], Iterator[Encoded]] = map,
    skips: bool = False,
    check: Callable[[Sequence[BadRecord], int, int], None] = lambda bad, skipped, records: None,
) -> Encoded:
    """Encode every conversation (:class:`Encoding`), up to ``group`` at a time; ``by`` does it with each group, in
    order. ``check`` (:meth:`sft.data.bad_records.Limit.check`) is asked now and then whether to go on."""
    groups = _groups(conversations, group)
    parts: list[Encoded] = []
    bad: list[BadRecord] = []
    looked, records = 0, 0
    for part in by(Encoding(tokenizer, src_length, max_length, room, skips), groups):
        parts.append(part)
        bad += part.bad
        records += part.counts.records
        if records - looked >= LOOKED_AT:
            check(bad, len(bad), records)
            looked = records
    check(bad, len(bad), records)
    before = itertools.accumulate((part.counts.records for part in parts), initial=0)
    return Encoded(
        np.concatenate([np.zeros(0, np.int32), *(part.ids for part in parts)]),
        np.concatenate([np.zeros(0, bool), *(part.trained for part in parts)]),
        np.cumsum(np.concatenate([np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)])),
        sum((part.counts for part in parts), Counts()),
        np.concatenate([np.zeros(0, np.int64), *(part.dropped + n for part, n in zip(parts, before, strict=False))]),
        bad,
    )


def _groups(conversations: Iterable[list[Turn] | BadRecord], most: int) -> Iterator[Group]:
    """Up to ``most`` conversations at a time, and fewer where they are long: the tokenizer takes 200 bytes a character
    while it has them."""
    group: Group = []
    size = 0
    for turns in conversations:
        group.append(turns)
        size += sum(len(turn.content) for turn in turns) if isinstance(turns, list) else 0
        if len(group) == most or size > _LARGEST_GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


# --- prompts ------------------------------------------------------------------------------------------------


def encode_prompt(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation that the model is to answer: exactly what training shows before a target."""
    template = tokenizer.template
    ids = [token for text in template.prompt(turns) for token in tokenizer.encode(text)]
    return tokenizer.with_bos(ids) if template.one_bos else ids


def fitting(turns: list[Turn], tokenizer: Tokenizer, longest: int) -> list[Turn]:
    """``turns`` without the oldest questions and answers that make their prompt longer than ``longest`` tokens.

    A system turn and the last question stay, even where these alone are longer.
    """
    return _Suffixes(turns).longest(longest, lambda kept: len(encode_prompt(kept, tokenizer)))


@dataclass(frozen=True)
class Question:
    """A record to be answered: its prompt's ids, the text of the last user turn, and the answer in the data."""

    ids: list[int]
    prompt: str
    reference: str

    @staticmethod
    def of(conversation: Conversation, tokenizer: Tokenizer, src_length: int) -> Question:
        """What stands before the last answer that is learned, of at most ``src_length`` tokens, as training cuts it:
        the oldest turns go first, then the beginning."""
        turns, reference = conversation.before_last_answer()
        ids = encode_prompt(fitting(turns, tokenizer, src_length), tokenizer)
        if len(ids) > src_length:
            del ids[_beginning(ids, len(ids) - src_length, tokenizer)]
        return Question(ids, turns[-1].content if turns else "", reference)


# --- training rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A conversation in tokens, before it is made to fit: ``ids`` int32 [n], ``trained`` bool [n]."""

    ids: np.ndarray
    trained: np.ndarray
    written: Written


class _Encoder:
    def __init__(self, tokenizer: Tokenizer, src_length: int, max_length: int, skips: bool = False) -> None:
        self.tokenizer = tokenizer
        self.src_length = src_length
        self.max_length = max_length
        self.skips = skips
        self.counts = Counts()
        self.dropped: list[int] = []
        self.bad: list[tuple[int, BadRecord]] = []
        """Those that are skipped, each after its number in the group."""

    def encode(self, conversations: Sequence[list[Turn] | BadRecord]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and targets of those that keep a target, in order."""
        written = [
            (number, turns, *found)
            for number, turns in enumerate(conversations)
            if (found := self._unless_bad(number, turns, self._written)) is not None
        ]
        rows = self._tokenize([text for *_, text in written])
        for (number, turns, kept, _), row in zip(written, rows, strict=True):
            fitted = self._unless_bad(number, kept, partial(self._fit, row=row))
            if fitted is None:
                continue
            result, counts = fitted
            counts.turns_dropped += len(turns) - len(kept)
            self.counts.records += 1
            if result.trained[1:].any():
                counts.tokens = len(result.ids) - 1
                counts.target_tokens = int(result.trained[1:].sum())
                self.counts = self.counts + counts
                yield result.ids, result.trained
            else:
                self.counts.records_dropped += 1
                self.dropped.append(number)

    def _unless_bad(self, number: int, turns: list[Turn] | BadRecord, do: Callable[[list[Turn]], T]) -> T | None:
        """What ``do`` makes of ``turns``; None for a record that is skipped, which is then counted and noted."""
        if isinstance(turns, list):
            try:
                return do(turns)
            except BadRecordError as error:
                if not self.skips:
                    raise
                turns = error.record
        self.bad.append((number, turns))
        self.dropped.append(number)
        self.counts += Counts(records=1, records_skipped=1)
        return None

    def _written(self, turns: list[Turn]) -> tuple[list[Turn], Written]:
        """A conversation without what there is no room for, and how it is written down."""
        kept = self._shorten(turns)
        return kept, _checked(self.tokenizer.template.training, kept)

    def _shorten(self, turns: list[Turn]) -> list[Turn]:
        """A long conversation without the oldest turns that ``max_length`` has no room for. :meth:`_fit` would come to
        the same, after writing the whole conversation down once for each of its turns."""
        if len(turns) <= _MANY_TURNS:
            return turns
        learned = max(index for index, turn in enumerate(turns) if turn.trains)
        return _Suffixes(turns, learned).longest(self.max_length, self._length)

    def _length(self, turns: list[Turn]) -> int:
        """Tokens of a conversation, before it is made to fit."""
        template = self.tokenizer.template
        ids = [token for text in _checked(template.texts, turns) for token in self.tokenizer.encode(text)]
        return len(self.tokenizer.with_bos(ids) if template.one_bos else ids)

    def _tokenize(self, texts: list[Written]) -> list[_Row]:
        template = self.tokenizer.template
        found = iter(self.tokenizer.encode_spans([piece.text for written in texts for piece in written.pieces]))
        rows = []
        for written in texts:
            ids: list[int] = []
            marks: list[np.ndarray] = []
            for piece in written.pieces:
                tokens, span = next(found)
                ids += tokens
                marks.append(_mark(len(tokens), span, piece.targets))
            fixed = self.tokenizer.with_bos(ids) if template.one_bos else ids
            added = len(fixed) - len(ids)
            trained = np.concatenate([np.zeros(max(0, added), bool), *marks])[max(0, -added) :]
            rows.append(_Row(np.array(fixed, np.int32), trained, written))
        return rows

    def _fit(self, turns: list[Turn], row: _Row) -> tuple[_Row, Counts]:
        """The row cut to what there is room for, and what it lost."""
        counts, longest = Counts(), self.src_length
        while len(row.ids) > self.max_length or _prompt_length(row.trained) > longest:
            shorter = _without_oldest(turns)
            if shorter is None or not any(turn.trains for turn in shorter):
                break
            counts.turns_dropped += len(turns) - len(shorter)
            turns = shorter
            [row] = self._tokenize([_checked(self.tokenizer.template.training, turns)])
        counts.answers_rewritten_by_template = row.written.rewritten
        counts.records_without_end = int(not row.written.ends)
        counts.answers_altered_by_template = int(not _checked(partial(holds_answer, written=row.written), turns))
        ids, trained = row.ids, row.trained
        prompt = _prompt_length(trained)
        if longest >= self.max_length and len(ids) > self.max_length:
            longest = max(self.max_length // 2, self.max_length - (len(ids) - prompt))
        if prompt > longest:
            counts.prompts_truncated = 1
            cut = _beginning(ids, prompt - longest, self.tokenizer)
            ids, trained = np.delete(ids, cut), np.delete(trained, cut)
        if len(ids) > self.max_length:
            counts.targets_truncated = 1
            ids, trained = ids[: self.max_length], trained[: self.max_length]
        return _Row(ids, trained, row.written), counts


def _checked(write: Callable[[list[Turn]], T], turns: list[Turn]) -> T:
    """What ``write`` makes of ``turns``; what it refuses is said with the place of the record."""
    try:
        return write(turns)
    except UsageError as error:
        place = getattr(turns, "place", None)
        if place is None:
            raise
        raise BadRecordError(place, f": {error}") from error


def _mark(tokens: int, span: Callable[[int], tuple[int, int]], targets: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Tokens with at least one character in a target, bool [n]; one that reaches over its beginning belongs to it.

    ``span`` gives the characters of a token: neither their beginnings nor their ends ever go back.
    """
    marked = np.zeros(tokens, bool)
    for start, end in targets:
        first = bisect_right(range(tokens), start, key=lambda token: span(token)[1])
        stop = bisect_left(range(tokens), end, first, key=lambda token: span(token)[0])
        marked[first:stop] = True
    return marked


def _prompt_length(trained: np.ndarray) -> int:
    """Tokens before the first target."""
    return int(trained.argmax()) if trained.any() else len(trained)


def _without_oldest(turns: list[Turn]) -> list[Turn] | None:
    """The conversation without its oldest question and answer (a system turn stays); None if one is left."""
    suffixes = _Suffixes(turns)
    return suffixes[1] if len(suffixes) > 1 else None


class _Suffixes:
    """A conversation, then without its oldest question and answer, and so on; a system turn stays, and the turn
    ``kept``. Each is made when it is asked for: all of them are as long as the square of the turns."""

    def __init__(self, turns: list[Turn], kept: int | None = None) -> None:
        self._turns = turns
        self._head = 1 if turns and turns[0].role == "system" else 0
        last = len(turns) - 1 if kept is None else kept
        self._starts = [index for index in range(self._head + 1, last + 1) if turns[index].role == "user"]

    def __len__(self) -> int:
        return 1 + len(self._starts)

    def __getitem__(self, number: int) -> list[Turn]:
        if number == 0:
            return self._turns
        start = self._starts[number - 1]
        return Conversation(self._turns[: self._head] + self._turns[start:], getattr(self._turns, "place", None))

    def longest(self, most: int, length: Callable[[list[Turn]], int]) -> list[Turn]:
        """The first that has at most ``most`` tokens, the last one if none has. Few are measured: the tokens of all
        would take the square of the turns too."""
        last = len(self) - 1
        return self[bisect_left(range(last + 1), True, 0, last, key=lambda number: length(self[number]) <= most)]


def _beginning(ids: Sequence[int] | np.ndarray, excess: int, tokenizer: Tokenizer) -> slice:
    """The first ``excess`` tokens of a prompt, which it loses where it is too long; a BOS before them stays."""
    first = int(tokenizer.bos_id is not None and ids[0] == tokenizer.bos_id)
    return slice(first, first + excess)

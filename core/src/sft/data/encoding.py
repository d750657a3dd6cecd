"""From turns to token ids: what the model reads, and on which tokens it is trained.

The chat template says how a conversation is written and which characters of it are learned (``templates.py``):
the text of training turns, with the token that ends the turn. What comes out is in ``encoded.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from sft.conversations import Conversation, Turn, up_to_last_target
from sft.data.altered import holds_answer
from sft.data.bad_records import LOOKED_AT, BadRecord, BadRecordError
from sft.data.encoded import Counts, Encoded, check_fits, joined
from sft.data.learned import Learned, Text
from sft.data.raw_text import is_raw, raw_written
from sft.data.shortening import Suffixes, beginning, without_oldest
from sft.data.texts import characters
from sft.data.tokenized import Tokenized, tokenized
from sft.data.tokenizer import Tokenizer
from sft.data.truncation import pieces
from sft.errors import UsageError

T = TypeVar("T")
Part = TypeVar("Part", bound=Encoded)
Group = list["list[Turn] | BadRecord"]
"""Conversations that are encoded together; of a bad record nothing is left but what is wrong with it."""
_MANY_TURNS = 32
_LARGEST_GROUP = 2_000_000
"""Characters."""


@dataclass(frozen=True)
class Encoding:
    """How conversations become tokens. A conversation that is too long loses its oldest turns first, then the
    beginning of its prompt (``src_length``), then the end of its answer (``max_length``); all are counted.

    Where ``src_length`` would let a prompt fill ``max_length`` alone, the prompt of a longer record leaves its answer
    room, up to half of ``max_length``. ``room``: a model's folder and its positions, where a record that is longer is
    to be refused at once. ``skips``: whether conversations that the template refuses are skipped. ``truncation``: what
    becomes of a record longer than ``max_length`` in place of all this (:mod:`sft.data.truncation`).
    """

    tokenizer: Tokenizer
    src_length: int
    max_length: int
    room: tuple[Path, int] | None = None
    skips: bool = False
    learned: Learned = Learned()
    truncation: str | None = None

    def __call__(self, group: Group) -> Encoded:
        """Encode conversations, which the tokenizer gets together; records that were bad before are only listed."""
        encoder = _Encoder(self)
        ids: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        for tokens, targets in encoder.encode(group):
            if self.room is not None:
                check_fits(len(tokens) - 1, *self.room)
            ids.append(tokens)
            weights.append(targets)
        weighs = np.concatenate([np.zeros(0, np.float32), *weights])
        trained = weighs > 0
        return Encoded(
            np.concatenate([np.zeros(0, np.int32), *ids]),
            trained,
            np.cumsum([0, *map(len, ids)], dtype=np.int64),
            encoder.counts,
            np.array(sorted(encoder.dropped), np.int64),
            [record for _, record in sorted(encoder.bad)],
            np.array(encoder.further, np.int64),
            None if (weighs == trained).all() else weighs,
            np.array(encoder.beside, np.int64),
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
    learned: Learned = Learned(),  # noqa: B008  (it never changes)
    check: Callable[[Sequence[BadRecord], int, int], None] = lambda bad, skipped, records: None,
    truncation: str | None = None,
) -> Encoded:
    """Encode every conversation (:class:`Encoding`), up to ``group`` at a time; ``by`` does it with each group, in
    order. ``check`` (:meth:`sft.data.bad_records.Limit.check`) is asked now and then whether to go on."""
    encoding = Encoding(tokenizer, src_length, max_length, room, skips, learned, truncation)
    return joined(list(looked_at(by(encoding, grouped(conversations, group)), check)))


def looked_at(parts: Iterable[Part], check: Callable[[Sequence[BadRecord], int, int], None]) -> Iterator[Part]:
    """``parts``, of which ``check`` (:meth:`sft.data.bad_records.Limit.check`) is told now and then, and at the end."""
    bad: list[BadRecord] = []
    looked, records = 0, 0
    for part in parts:
        bad += part.bad
        records += part.counts.records
        if records - looked >= LOOKED_AT:
            check(bad, len(bad), records)
            looked = records
        yield part
    check(bad, len(bad), records)


def grouped(conversations: Iterable[list[Turn] | BadRecord], most: int = 256) -> Iterator[Group]:
    """Up to ``most`` conversations at a time, and fewer where they are long: the tokenizer takes 200 bytes a character
    while it has them."""
    group: Group = []
    size = 0
    for turns in conversations:
        group.append(turns)
        size += characters(Conversation.seen(turns)) if isinstance(turns, list) else 0
        if len(group) == most or size > _LARGEST_GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def whole_length(turns: list[Turn], tokenizer: Tokenizer) -> int:
    """Tokens of a conversation as the template writes it, or of a document, before it is made to fit."""
    template = tokenizer.template
    texts = [turns[0].content + tokenizer.eos_token] if is_raw(turns) else checked(template.texts, turns)
    ids = [token for text in texts for token in tokenizer.encode(text)]
    return len(tokenizer.with_bos(ids) if template.one_bos or is_raw(turns) else ids)


# --- training rows ------------------------------------------------------------------------------------------


class _Encoder:
    def __init__(self, how: Encoding) -> None:
        self.tokenizer, self.learned = how.tokenizer, how.learned
        self.src_length, self.max_length, self.truncation = how.src_length, how.max_length, how.truncation
        self.skips = how.skips
        self.rows, self.documents = 0, 0
        """Rows that have been made, and the documents in them."""
        self.further: list[int] = []
        """Those rows that go on with the record of the row before."""
        self.beside: list[int] = []
        """Those documents that stand in the row of the one before."""
        self.counts = Counts()
        self.dropped: list[int] = []
        self.bad: list[tuple[int, BadRecord]] = []
        """Those that are skipped, each after its number in the group."""

    def encode(self, conversations: Sequence[list[Turn] | BadRecord]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids, and what each weighs as a target (0: it is none), of those that keep a target, in order."""
        written = []
        for number, turns in enumerate(conversations):
            if isinstance(turns, BadRecord):
                self._skip(number, turns)
            elif (found := self._unless_bad(number, partial(self._all_written, turns))) is not None:
                written.append((number, turns, found))
        rows = iter(tokenized([text for _, _, members in written for _, text in members], self.tokenizer))
        for number, turns, members in written:
            kept = [turns for turns, _ in members]
            each = [next(rows) for _ in members]
            fitted = self._unless_bad(number, partial(self._fitted_together, kept, each))
            if fitted is None:
                continue
            parts, counts = fitted
            own = Conversation.seen(turns).together
            counts.turns_dropped += sum(map(len, own)) - sum(map(len, kept))
            counts.turns_after_answers = sum(len(turns) - len(up_to_last_target(turns)) for turns in kept)
            self.counts.records += 1
            if not parts:
                self.counts.records_too_long += counts.records_too_long
                self.counts.records_dropped += 1 - counts.records_too_long
                self.dropped.append(number)
                continue
            counts.tokens = sum(len(part.ids) - 1 for part in parts)
            counts.target_tokens = sum(part.targets for part in parts)
            # Several members are as many parts; one may be any number of them.
            weights = [np.float32(one.weight) for one in (own if len(own) > 1 else own * len(parts))]
            weighed = [p.weights if w == 1 else p.weights * w for p, w in zip(parts, weights, strict=True)]
            ones = sum(np.count_nonzero(each[1:] == 1) for each in weighed)
            counts.records_weighted = int(ones < counts.target_tokens)
            self.counts = self.counts + counts
            if len(own) > 1:
                self.beside += range(self.documents + 1, self.documents + len(parts))
                self.rows += 1
            else:
                self.further += range(self.rows + 1, self.rows + len(parts))
                self.rows += len(parts)
            self.documents += len(parts)
            yield from ((part.ids, each) for part, each in zip(parts, weighed, strict=True))

    def _unless_bad(self, number: int, do: Callable[[], T]) -> T | None:
        """What ``do`` gives; None where it says that the record of this ``number`` is bad, which is then skipped."""
        try:
            return do()
        except BadRecordError as error:
            if not self.skips:
                raise
            self._skip(number, error.record)
        return None

    def _skip(self, number: int, record: BadRecord) -> None:
        self.bad.append((number, record))
        self.dropped.append(number)
        self.counts += Counts(records=1, records_skipped=1)

    def _all_written(self, turns: list[Turn]) -> list[tuple[list[Turn], Text]]:
        """Each conversation of a record, as :meth:`_written` has it."""
        together = Conversation.seen(turns).together
        if len(together) == 1:
            return [self._written(turns)]
        if self.truncation == "split":
            raise UsageError(
                "truncation split divides a record into rows, and some records here are several conversations, which "
                "stay in one; give another truncation, or leave it out."
            )
        every = [self.learned.turns(one) for one in together]
        return [(one, self._text(one)) for one in every]

    def _written(self, turns: list[Turn]) -> tuple[list[Turn], Text]:
        """A conversation without what there is no room for, and how it is written down."""
        if is_raw(turns):
            written = raw_written(turns, self.tokenizer.eos_token)
            return turns, Text(written, written.pieces, None)
        kept = self._shorten(self.learned.turns(turns))
        return kept, self._text(kept)

    def _text(self, turns: list[Turn]) -> Text:
        return checked(partial(self.learned.text, self.tokenizer.template), turns)

    def _shorten(self, turns: list[Turn]) -> list[Turn]:
        """A long conversation without the oldest turns that ``max_length`` has no room for. :meth:`_fit` would come to
        the same, after writing the whole conversation down once for each of its turns."""
        if len(turns) <= _MANY_TURNS or self.truncation is not None:
            return turns
        last = len(up_to_last_target(turns)) - 1
        return Suffixes(turns, last).longest(self.max_length, self._length)

    def _length(self, turns: list[Turn]) -> int:
        return whole_length(turns, self.tokenizer)

    def _fitted(self, turns: list[Turn], row: Tokenized) -> tuple[list[Tokenized], Counts]:
        """The rows that a record becomes, without those that have no target, and what it lost."""
        how = self.truncation or ("split" if row.text.written.is_raw else None)
        if how is None:
            return self._fit(turns, row)
        counts = self._with_template_counts(Counts(), turns, row)
        begins = int(self.tokenizer.bos_id is not None and row.ids[:1].tolist() == [self.tokenizer.bos_id])
        kept = pieces(len(row.ids), self.max_length, how, begins)
        found = [replace(row, ids=row.ids[tokens], weights=row.weights[tokens]) for tokens in kept]
        parts = [part for part in found if part.targets]
        counts.records_too_long = int(not found)
        counts.records_split = int(len(found) > 1)
        counts.pieces_dropped = len(found) - len(parts) if counts.records_split else 0
        counts.records_truncated = int(how in ("left", "right") and len(row.ids) > self.max_length)
        return parts, counts

    def _fitted_together(self, members: list[list[Turn]], rows: list[Tokenized]) -> tuple[list[Tokenized], Counts]:
        """:meth:`_fitted` of all ``members`` of a record: each becomes one row, or nothing is left of the record. They
        lose as much from their beginnings as the one that loses most, so that their answers still answer the same."""
        if len(members) == 1:
            return self._fitted(members[0], rows[0])
        if self.truncation is not None:
            found = [self._fitted(turns, row) for turns, row in zip(members, rows, strict=True)]
        else:
            members, rows, dropped = self._without_oldest(members, rows)
            longest = min(map(self._longest_prompt, rows))
            found = [self._cut(turns, row, longest) for turns, row in zip(members, rows, strict=True)]
            found[0][1].turns_dropped = dropped
        parts = [part for kept, _ in found for part in kept]
        return parts if len(parts) == len(members) else [], Counts.of_one_record([counts for _, counts in found])

    def _without_oldest(
        self, members: list[list[Turn]], rows: list[Tokenized]
    ) -> tuple[list[list[Turn]], list[Tokenized], int]:
        """Conversations without as many of their oldest turns as the longest has no room for, and how many turns that
        is."""
        dropped = 0
        while any(len(row.ids) > self.max_length or row.prompt > self.src_length for row in rows):
            shorter = [without_oldest(turns) for turns in members]
            kept = [turns for turns in shorter if turns is not None and any(turn.trains for turn in turns)]
            if len(kept) < len(members):
                break
            dropped += sum(map(len, members)) - sum(map(len, kept))
            members, rows = kept, tokenized([self._text(turns) for turns in kept], self.tokenizer)
        return members, rows, dropped

    def _with_template_counts(self, counts: Counts, turns: list[Turn], row: Tokenized) -> Counts:
        """``counts`` with what the chat template does to a record."""
        written = row.text.written
        if written.is_raw:
            return counts
        counts.answers_rewritten_by_template = written.rewritten
        counts.records_without_end = int(not written.ends)
        counts.answers_altered_by_template = int(not checked(partial(holds_answer, written=written), turns))
        return counts if row.text.counts is None else counts + row.text.counts

    def _fit(self, turns: list[Turn], row: Tokenized) -> tuple[list[Tokenized], Counts]:
        """The row cut to what there is room for, if it keeps a target, and what it lost."""
        [turns], [row], dropped = self._without_oldest([turns], [row])
        found, counts = self._cut(turns, row, self._longest_prompt(row))
        counts.turns_dropped += dropped
        return found, counts

    def _longest_prompt(self, row: Tokenized) -> int:
        """How many tokens a row's prompt may have: where it would fill ``max_length`` alone, it leaves room."""
        if self.src_length < self.max_length or len(row.ids) <= self.max_length:
            return self.src_length
        return max(self.max_length // 2, self.max_length - (len(row.ids) - row.prompt))

    def _cut(self, turns: list[Turn], row: Tokenized, longest: int) -> tuple[list[Tokenized], Counts]:
        """The row with no more than the ``longest`` end of its prompt, and of ``max_length``; it or none."""
        counts = self._with_template_counts(Counts(), turns, row)
        ids, weights, prompt = row.ids, row.weights, row.prompt
        if prompt > longest:
            counts.prompts_truncated = 1
            cut = beginning(ids, prompt - longest, self.tokenizer)
            ids, weights = np.delete(ids, cut), np.delete(weights, cut)
        if len(ids) > self.max_length:
            counts.targets_truncated = 1
            ids, weights = ids[: self.max_length], weights[: self.max_length]
        kept = replace(row, ids=ids, weights=weights)
        return [kept] if kept.targets else [], counts


def checked(write: Callable[[list[Turn]], T], turns: list[Turn]) -> T:
    """What ``write`` makes of ``turns``; what it refuses is said with the place of the record."""
    try:
        return write(turns)
    except UsageError as error:
        place = getattr(turns, "place", None)
        if place is None:
            raise
        raise BadRecordError(place, f": {error}") from error

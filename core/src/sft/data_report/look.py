"""Encoding as a run does it, and beside it what only a report wants to know of each record. A process that encodes does
both, so that a report takes no longer than a run takes to read its data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from sft.conversations import Conversation
from sft.data.bad_records import BadRecordError
from sft.data.encoded import Encoded
from sft.data.encoding import Encoding, Group, whole_length

_CUTS = (
    *("turns_dropped", "prompts_truncated", "targets_truncated", "records_dropped"),
    *("records_too_long", "records_truncated", "records_split"),
)
"""Counts that say whether any record of a group is longer than what is left of it."""


@dataclass
class Seen(Encoded):
    """Encoded records, and what they were. Readable ones are all that are not skipped, in their order."""

    rows_of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [rows]: the number, in the group, of the record that each row is of."""
    readable: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [readable]: their numbers in the group."""
    hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """uint64 [readable]: equal for records of the same turns and tools."""
    whole: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [readable]: tokens before anything is cut; of several conversations those of the longest."""
    found: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """bool [readable]: which hold the text that is looked for."""
    turns: Counter[str] = field(default_factory=Counter)
    """Turns by role."""


@dataclass(frozen=True)
class Look(Encoding):
    """An :class:`Encoding` that also looks. ``find`` is a text that records may hold, in any case of letters."""

    find: str | None = None

    def __call__(self, group: Group) -> Seen:
        encoded = super().__call__(group)
        bad = {record.place for record in encoded.bad}
        rows_of = np.array(encoded.numbers(range(len(encoded))), np.int64)
        numbers, hashes, found, turns = [], [], [], Counter[str]()
        wanted = None if self.find is None else self.find.casefold()
        for number, conversation in enumerate(group):
            if not isinstance(conversation, list):
                continue
            seen = Conversation.seen(conversation)
            if seen.place is not None and seen.place in bad:
                continue
            numbers.append(number)
            hashes.append(hash_of(seen))
            found.append(wanted is not None and wanted in text_of(seen).casefold())
            turns.update(turn.role for one in seen.together for turn in one)
        readable = np.array(numbers, np.int64)
        known = {item.name: getattr(encoded, item.name) for item in dataclasses.fields(encoded)}
        return Seen(
            **known,
            rows_of=rows_of,
            readable=readable,
            hashes=np.array(hashes, np.uint64),
            whole=self._whole(group, encoded, rows_of, readable),
            found=np.array(found, bool),
            turns=turns,
        )

    def _whole(self, group: Group, encoded: Encoded, rows_of: np.ndarray, readable: np.ndarray) -> np.ndarray:
        kept = np.zeros(len(group), np.int64)
        np.maximum.at(kept, rows_of, encoded.longest_of_each + 1)
        if any(getattr(encoded.counts, name) for name in _CUTS):
            for number in readable.tolist():
                kept[number] = max(kept[number], self._written(group[number]))
        return kept[readable]

    def _written(self, conversation: object) -> int:
        assert isinstance(conversation, list)
        try:
            every = Conversation.seen(conversation).together
            return max(whole_length(self.learned.turns(one), self.tokenizer) for one in every)
        except BadRecordError:
            return 0


def hash_of(conversation: Conversation) -> int:
    """64 bits that are equal for conversations of the same turns and tools, and the same beside them."""
    digest = hashlib.blake2b(digest_size=8)
    for part in chain.from_iterable(map(_parts, conversation.together)):
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return int.from_bytes(digest.digest(), "big")


def text_of(conversation: Conversation) -> str:
    """What stands in the turns, and in the tools, one below the other."""
    every = [turn for one in conversation.together for turn in one]
    texts = [text for turn in every for text in (turn.reasoning, turn.content, *_calls(turn)) if text]
    return "\n".join([*_tools(conversation), *texts])


def _parts(conversation: Conversation) -> Iterator[str]:
    for turn in conversation:
        yield turn.role
        yield turn.content
        if turn.reasoning is not None or turn.tool_calls:
            yield json.dumps([turn.reasoning, *_calls(turn)])
    yield from _tools(conversation)


def _calls(turn: object) -> list[str]:
    return [f"{call.name} {_json(call.arguments)}" for call in getattr(turn, "tool_calls", ())]


def _tools(conversation: Conversation) -> list[str]:
    return [_json(tool) for tool in conversation.tools]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)

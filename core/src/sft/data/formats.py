"""From records to the turns of conversations: which format a data set is in, and each format's reading.

A data set is in one format, recognised from the keys of its records and named to the user. Plugins may know more
formats (``sft_record_format``) and are asked first.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from sft.conversations import Conversation, Turn
from sft.data.bad_records import BadRecord, BadRecordError, Place
from sft.data.messages import messages, sharegpt
from sft.data.raw_text import TEXT_ROLE
from sft.data.sources import Record
from sft.data.texts import answer_of, characters, optional_of, refuse_media, system_of, text_of
from sft.data.weights import record_weight, weight_of_turns
from sft.errors import PluginError, UsageError
from sft.foreign_text import listed, shown
from sft.plugins.registry import Plugins

ASKING = ("user", "tool")
"""Roles of turns that an answer follows."""
LONGEST = 4_000_000
"""Characters of a record: a tokenizer takes some five seconds and a gigabyte for so many, War and Peace has fewer."""


class Formats:
    """Reads the records of one data set, all of which must be in the format of the first."""

    def __init__(self, plugins: Plugins, skips: bool = False, wanted: str | None = None) -> None:
        """``skips``: whether :meth:`turns_or_bad` skips records that cannot be read. ``wanted``: the format that all
        records are in, as :func:`check_format` knows it; None: that of the first."""
        self.name = ""
        """The format, once a record has been read."""
        self._place: Place | None = None
        self._plugins, self._skips = plugins, skips
        self._providers = plugins.implementing("sft_record_format")
        self._wanted = wanted

    def turns_or_bad(self, record: Record | BadRecord) -> Conversation | BadRecord:
        """The turns of a record, or what is wrong with it where such records are skipped."""
        if isinstance(record, BadRecord):
            return record
        try:
            return self.turns(record)
        except BadRecordError as error:
            if not self._skips:
                raise
            return error.record

    def turns(self, record: Record, needs_target: bool = True) -> Conversation:
        """The turns of ``record``; it may be a question without an answer where no target is needed.

        Raises :class:`BadRecordError` with file and line for a record that is in no known format, in another one than
        those before it, or wrong in its own.
        """
        try:
            name, turns, weight = self._read(record.value, needs_target)
            if weight == 0 and needs_target:
                raise ValueError("the record has the weight 0, so nothing can be learned from it; take it out.")
        except ValueError as error:
            raise BadRecordError(record.place, f": {error}") from error
        except PluginError as error:
            raise PluginError(f"{error} It was reading {record.place}.") from error.__cause__
        if self.name and name != self.name:
            raise BadRecordError(
                record.place,
                f": this record is {name}, and {self._place} is {self.name}; keep the records of one format in a data "
                "set.",
            )
        beside = [
            Conversation(one, record.place, getattr(one, "tools", ()), weight_of_turns(one))
            for one in getattr(turns, "beside", ())
        ]
        asks = not needs_target and bool(turns) and turns[-1].role in ASKING
        if not asks and not all(any(turn.trains for turn in one) for one in (turns, *beside)):
            raise BadRecordError(
                record.place, ": no turn of this record is a target, so nothing can be learned from it."
            )
        conversation = Conversation(turns, record.place, getattr(turns, "tools", ()), weight, beside)
        length = characters(conversation)
        if length > LONGEST:
            raise BadRecordError(
                record.place,
                f": the record has {length:,} characters, and at most {LONGEST:,} are read; divide it, or take it out.",
            )
        if not self.name:
            self.name, self._place = name, record.place
        return conversation

    def _read(self, value: dict[str, Any], needs_target: bool) -> tuple[str, list[Turn], float]:
        """The format of a record, its turns and its weight."""
        for plugin in self._providers if self._wanted in (None, *self._providers) else ():
            turns = self._plugins.ask(plugin, "sft_record_format", record=value)
            if turns is not None and self._wanted in (None, plugin):
                return f"the format of plugin {plugin}", turns, weight_of_turns(turns)
        refuse_media(value, "the record")
        if self._wanted is not None:
            return *self._read_as(self._wanted, value, needs_target), record_weight(value)
        if not needs_target and _is_prompt(value):
            return "a prompt", [Turn("user", text_of(value["prompt"], '"prompt"'))], 1.0
        name = recognise(value)
        return name, FORMATS[name][1](value, needs_target), record_weight(value)

    def _read_as(self, wanted: str, value: dict[str, Any], needs_target: bool) -> tuple[str, list[Turn]]:
        if wanted in self._providers:
            raise ValueError(f"the record is not in the format of plugin {wanted}, which is set for its data.")
        name = _SHORT_NAMES[wanted]
        keys = FORMATS[name][0]
        missing = [key for key in keys if key not in value]
        if len(missing) == len(keys):
            raise ValueError(
                f"the record is not {name}, the format that is set for its data (its keys: {listed(value)}); correct "
                "format, or leave it out."
            )
        return name, FORMATS[name][1](value, needs_target)


def turns_of(record: Mapping[str, Any]) -> Conversation:
    """The turns of a ``record`` that is in one of the core's formats, for a plugin that reads records which hold such
    ones: messages with tools, calls and thoughts, ShareGPT's, Alpaca's, src/tgt. ``ValueError`` for any other."""
    return Conversation.seen(FORMATS[recognise(dict(record))][1](record))


def check_format(name: str, plugins: Plugins) -> None:
    """Refuse a ``name`` that is no format of the core's, by its first word, and no plugin that reads records."""
    known = [*_SHORT_NAMES, *plugins.implementing("sft_record_format")]
    if name not in known:
        raise UsageError(f"dataset_name_or_path: {shown(name)} is no format; known are {', '.join(known)}.")


def _is_prompt(record: dict[str, Any]) -> bool:
    """Whether the record is ``{"prompt": text}``, with what else but the keys of a format."""
    known = {key for name, (keys, _) in FORMATS.items() for key in keys if name != TEXT}
    return record.get("prompt") is not None and known.isdisjoint(record)


def recognise(record: dict[str, Any]) -> str:
    """The name of the format whose keys the record has; ``ValueError`` for none and for several."""
    given = {key for key, value in record.items() if value is not None}
    whole = [name for name, (keys, _) in FORMATS.items() if given.issuperset(keys) and name != TEXT]
    # A record that lacks a key of the only format it resembles is told so by that format.
    found = whole or [name for name, (keys, _) in FORMATS.items() if not set(record).isdisjoint(keys)]
    # A text is an ordinary thing to stand beside what makes another format.
    found = [name for name in found if name != TEXT] or found
    if len(found) == 1:
        return found[0]
    keys = listed(record)
    if found:
        raise ValueError(f"the record could be {' or '.join(found)} (its keys: {keys}); keep the keys of one format.")
    raise ValueError(f"the record is in no known format (its keys: {keys}); known are {', '.join(FORMATS)}.")


# --- PaddleNLP's pairs, and Alpaca --------------------------------------------------------------------------


def src_tgt(record: Mapping[str, Any], needs_target: bool = True) -> list[Turn]:
    """PaddleNLP's format: ``src`` and ``tgt`` are both text, or both lists with the turns of one conversation.

    Of PaddleNLP's ``context`` (variables for its chat templates) ``system`` is known: it is the system turn.
    """
    for key in ("src", "tgt") if needs_target else ("src",):
        if key not in record:
            found = listed(record)
            raise ValueError(f'the record has no "{key}" (its keys: {found}); each needs "src" and "tgt".')
    sources = _texts(record["src"], "src")
    targets = [] if record.get("tgt") is None and not needs_target else _texts(record["tgt"], "tgt")
    asks = not needs_target and len(sources) == len(targets) + 1
    if len(sources) != len(targets) and not asks:
        raise ValueError(f'"src" and "tgt" must have as many turns; they have {len(sources)} and {len(targets)}.')
    context = record.get("context")
    if isinstance(context, dict) and set(context) - {"system"}:
        unknown = listed(sorted(set(context) - {"system"}))
        raise ValueError(f'"context" has {unknown}, and only "system" is known there; take the rest out.')
    turns = system_of(context) if isinstance(context, dict) else []
    for source, target in zip(sources, targets, strict=not asks):
        turns += [Turn("user", source), Turn("assistant", target, trains=True)]
    return [*turns, Turn("user", sources[-1])] if asks else turns


def alpaca(record: Mapping[str, Any], needs_target: bool = True) -> list[Turn]:
    """``instruction``, an optional ``input`` below it, and ``output``; optionally ``system``, and ``history``: a list
    of earlier [question, answer], which are learned too."""
    for key in ("instruction", "output") if needs_target else ("instruction",):
        if record.get(key) is None:
            found = listed(record)
            raise ValueError(
                f'the record has no "{key}" (its keys: {found}); each needs "instruction" and "output", and may have '
                '"input".'
            )
    given = optional_of(record, "input")
    instruction = text_of(record["instruction"], '"instruction"')
    question = f"{instruction}\n{given}" if instruction and given else instruction + given
    turns = system_of(record)
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError(f'"history" must be a list of [question, answer], not {reprlib.repr(history)}.')
    for number, (earlier, reply) in enumerate(history, start=1):
        turns.append(Turn("user", text_of(earlier, f'question {number} of "history"')))
        turns.append(Turn("assistant", answer_of(reply, f'answer {number} of "history"'), trains=True))
    turns.append(Turn("user", question))
    if record.get("output") is None:
        return turns
    return [*turns, Turn("assistant", answer_of(record["output"], '"output"'), trains=True)]


def raw_text(record: Mapping[str, Any], needs_target: bool = True) -> list[Turn]:
    """``text``: a document of which every token is learned, for continued pre-training."""
    text = text_of(record["text"], '"text"')
    if not text:
        raise ValueError('"text" is empty, so nothing can be learned from it.')
    return [Turn(TEXT_ROLE, text, trains=True)]


TEXT = "text (raw text)"
FORMATS: dict[str, tuple[tuple[str, ...], Callable[..., list[Turn]]]] = {
    "src/tgt": (("src", "tgt"), src_tgt),
    "messages (role/content)": (("messages",), messages),
    "ShareGPT (conversations)": (("conversations",), sharegpt),
    "Alpaca (instruction/input/output)": (("instruction", "output"), alpaca),
    TEXT: (("text",), raw_text),
}
"""The core's formats by name: the keys that each needs, and what reads a record. Its last answer may be missing where
``needs_target`` is false; a list of messages ends as it likes."""
_SHORT_NAMES = {name.partition(" ")[0].lower(): name for name in FORMATS}
"""Their names by what settings call them."""


def _texts(value: Any, key: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'"{key}" must be text or a list of texts, not {reprlib.repr(value)}.')
    return [answer_of(text, f'"{key}"') if key == "tgt" else text_of(text, f'"{key}"') for text in texts]

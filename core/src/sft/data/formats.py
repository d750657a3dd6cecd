"""From records to the turns of conversations: which format a data set is in, and each format's reading.

A data set is in one format, recognised from the keys of its records and named to the user. Plugins may know more
formats (``sft_record_format``) and are asked first.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sft.data.bad_records import BadRecord, BadRecordError, Place
from sft.data.sources import Record
from sft.errors import PluginError
from sft.foreign_text import listed
from sft.plugins.registry import Plugins
from sft.seams import Turn

LONGEST = 4_000_000
"""Characters of a record: a tokenizer takes some five seconds and a gigabyte for so many, War and Peace has fewer."""


class Conversation(list[Turn]):
    """The turns of a record, and where it stands, for what can only be found wrong later."""

    def __init__(self, turns: Iterable[Turn], place: Place | None = None) -> None:
        super().__init__(turns)
        self.place = place

    def before_last_answer(self) -> tuple[list[Turn], str]:
        """The turns before the last answer that is learned, and that answer."""
        last = max(index for index, turn in enumerate(self) if turn.trains)
        return self[:last], self[last].content


class Formats:
    """Reads the records of one data set, all of which must be in the format of the first."""

    def __init__(self, plugins: Plugins, skips: bool = False) -> None:
        """``skips``: whether :meth:`turns_or_bad` skips records that cannot be read."""
        self.name = ""
        """The format, once a record has been read."""
        self._place: Place | None = None
        self._plugins, self._skips = plugins, skips
        self._providers = plugins.implementing("sft_record_format")

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
            name, turns = self._read(record.value, needs_target)
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
        asks = not needs_target and bool(turns) and turns[-1].role == "user"
        if not asks and not any(turn.trains for turn in turns):
            raise BadRecordError(
                record.place, ": no turn of this record is a target, so nothing can be learned from it."
            )
        length = sum(len(turn.content) for turn in turns)
        if length > LONGEST:
            raise BadRecordError(
                record.place,
                f": the record has {length:,} characters, and at most {LONGEST:,} are read; divide it, or take it out.",
            )
        if not self.name:
            self.name, self._place = name, record.place
        return Conversation(turns, record.place)

    def _read(self, value: dict[str, Any], needs_target: bool) -> tuple[str, list[Turn]]:
        for plugin in self._providers:
            turns = self._plugins.ask(plugin, "sft_record_format", record=value)
            if turns is not None:
                return f"the format of plugin {plugin}", turns
        if not needs_target and _is_prompt(value):
            return "a prompt", [Turn("user", _text(value["prompt"], '"prompt"'))]
        name = recognise(value)
        return name, FORMATS[name][1](value, needs_target)


def _is_prompt(record: dict[str, Any]) -> bool:
    """Whether the record is ``{"prompt": text}``, with what else but the keys of a format."""
    known = {key for keys, _ in FORMATS.values() for key in keys}
    return record.get("prompt") is not None and known.isdisjoint(record)


def recognise(record: dict[str, Any]) -> str:
    """The name of the format whose keys the record has; ``ValueError`` for none and for several."""
    given = {key for key, value in record.items() if value is not None}
    whole = [name for name, (keys, _) in FORMATS.items() if given.issuperset(keys)]
    # A record that lacks a key of the only format it resembles is told so by that format.
    found = whole or [name for name, (keys, _) in FORMATS.items() if not set(record).isdisjoint(keys)]
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
        raise ValueError(f'"src" has {len(sources)} turns and "tgt" has {len(targets)}; they must be as many.')
    context = record.get("context")
    if isinstance(context, dict) and set(context) - {"system"}:
        unknown = listed(sorted(set(context) - {"system"}))
        raise ValueError(f'"context" has {unknown}, and only "system" is known there; take the rest out.')
    turns = _system(context) if isinstance(context, dict) else []
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
    given = _optional(record, "input")
    instruction = _text(record["instruction"], '"instruction"')
    question = f"{instruction}\n{given}" if instruction and given else instruction + given
    turns = _system(record)
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError(f'"history" must be a list of [question, answer], not {reprlib.repr(history)}.')
    for number, (earlier, reply) in enumerate(history, start=1):
        turns.append(Turn("user", _text(earlier, f'question {number} of "history"')))
        turns.append(Turn("assistant", _answer(reply, f'answer {number} of "history"'), trains=True))
    turns.append(Turn("user", question))
    if record.get("output") is None:
        return turns
    return [*turns, Turn("assistant", _answer(record["output"], '"output"'), trains=True)]


# --- lists of messages --------------------------------------------------------------------------------------

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def messages(record: Mapping[str, Any], needs_target: bool = True) -> list[Turn]:
    """``messages`` with ``role`` and ``content``; ``weight`` 0 excludes an answer from what is learned."""
    return _conversation(record, "messages")


def sharegpt(record: Mapping[str, Any], needs_target: bool = True) -> list[Turn]:
    """``conversations`` with ``from`` (human, gpt, system) and ``value``, or with ``role`` and ``content``."""
    return _conversation(record, "conversations")


def _conversation(record: Mapping[str, Any], key: str) -> list[Turn]:
    value = record[key]
    if not isinstance(value, list) or not value:
        raise ValueError(f'"{key}" must be a list of at least one message, not {reprlib.repr(value)}.')
    if _has_tools(record.get("tools")):
        raise ValueError(
            'the record has "tools", which are not supported; take "tools" out, or the record where its answers call '
            "them."
        )
    turns = _system(record)
    if turns and isinstance(value[0], dict) and "system" in (value[0].get("role"), value[0].get("from")):
        raise ValueError(f'"system" and the first message of "{key}" both are system turns; keep one.')
    turns += [_message(message, f'message {number} of "{key}"') for number, message in enumerate(value, start=1)]
    first = next(turn for turn in [*turns, Turn("", "")] if turn.role != "system")
    if first.role == "assistant" and first.trains:
        raise ValueError(
            f'"{key}" begins with an answer to nothing; begin with a user\'s message, or give it weight 0.'
        )
    return turns


def _has_tools(value: Any) -> bool:
    """Whether there are any: some data sets hold the list as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "null")
        except ValueError:
            return True
    return bool(value)


def _message(message: Any, what: str) -> Turn:
    if not isinstance(message, dict):
        raise ValueError(f"{what} must be an object with role and content, not {reprlib.repr(message)}.")
    names = ("from", "value") if message.get("role") is None and "from" in message else ("role", "content")
    for name in names:
        if name not in message:
            raise ValueError(f'{what} has no "{name}" (its keys: {listed(message)}).')
    role = message[names[0]]
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise ValueError(f"{what} has the role {reprlib.repr(role)}; known are {known}: take the record out.")
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise ValueError(f'{what} has "{name}", which is not supported; take the record out.')
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise ValueError(f'{what} has the weight {reprlib.repr(weight)}; "weight" must be 0 or 1.')
    trains = ROLES[role] == "assistant" and weight != 0
    content = message[names[1]]
    return Turn(ROLES[role], _answer(content, what) if trains else _text(content, what), trains)


FORMATS: dict[str, tuple[tuple[str, ...], Callable[..., list[Turn]]]] = {
    "src/tgt": (("src", "tgt"), src_tgt),
    "messages (role/content)": (("messages",), messages),
    "ShareGPT (conversations)": (("conversations",), sharegpt),
    "Alpaca (instruction/input/output)": (("instruction", "output"), alpaca),
}
"""The core's formats by name: the keys that each needs, and what reads a record. Its last answer may be missing where
``needs_target`` is false; a list of messages ends as it likes."""


# --- texts --------------------------------------------------------------------------------------------------


def _system(record: Mapping[str, Any]) -> list[Turn]:
    text = _optional(record, "system")
    return [Turn("system", text)] if text.strip() else []


def _optional(record: Mapping[str, Any], key: str) -> str:
    return "" if record.get(key) is None else _text(record[key], f'"{key}"')


def _texts(value: Any, key: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'"{key}" must be text or a list of texts, not {reprlib.repr(value)}.')
    return [_answer(text, f'"{key}"') if key == "tgt" else _text(text, f'"{key}"') for text in texts]


def _answer(value: Any, what: str) -> str:
    text = _text(value, what)
    if not text.strip():
        raise ValueError(f"{what} is empty; remove the record or give it an answer.")
    return text


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {reprlib.repr(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a surrogate pair, which is no text; correct it.") from None
    return value

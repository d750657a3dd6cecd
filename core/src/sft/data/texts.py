"""Texts of a record: what is one, what is wrong with what is none, and all those that a conversation holds."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any

from sft.conversations import Conversation, Turn


def text_of(value: Any, what: str) -> str:
    """``value``, if it is text that can be encoded; ``ValueError``, which begins with ``what``, if it is not."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {reprlib.repr(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a surrogate pair, which is no text; correct it.") from None
    return value


def answer_of(value: Any, what: str) -> str:
    """The same for an answer that is learned, in which there must be something."""
    text = text_of(value, what)
    if not text.strip():
        raise ValueError(f"{what} is empty; remove the record or give it an answer.")
    return text


_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Names under which records hold what is no text."""


def refuse_media(value: Mapping[str, Any], what: str) -> None:
    """Refuse a record or a message that comes with images, or the like: the model would learn to answer unseen ones."""
    found = next((name for name in _MEDIA if value.get(name)), None)
    if found is not None:
        raise ValueError(f'{what} has "{found}", and a model reads text here; take the record out, or "{found}".')


def optional_of(record: Mapping[str, Any], key: str) -> str:
    """The text ``key`` of a record, empty where there is none."""
    return "" if record.get(key) is None else text_of(record[key], f'"{key}"')


def system_of(record: Mapping[str, Any]) -> list[Turn]:
    """The system turn that a record's ``system`` is, if it says anything."""
    text = optional_of(record, "system")
    return [Turn("system", text)] if text.strip() else []


def all_texts(conversation: Conversation) -> list[str]:
    """All that a conversation holds, those beside it left out, as texts: a template's budget grows with them."""
    texts = [json.dumps(tool, ensure_ascii=False) for tool in conversation.tools]
    for turn in conversation:
        texts.append(turn.content)
        if turn.reasoning:
            texts.append(turn.reasoning)
        texts += [call.name + json.dumps(call.arguments, ensure_ascii=False) for call in turn.tool_calls]
    return texts


def characters(conversation: Conversation) -> int:
    """The characters of all that a conversation holds, and those beside it."""
    return sum(len(text) for one in conversation.together for text in all_texts(one))

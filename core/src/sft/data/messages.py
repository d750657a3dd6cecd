"""Lists of messages: OpenAI's ``messages`` and ShareGPT's ``conversations``, with tools, calls and thoughts.

The dialects differ in where they put a call and in what they call a role. All of them become the same turns: a call is
a part of an answer, a result is a turn of its own.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Mapping
from typing import Any

from sft.conversations import Conversation, ToolCall, Turn
from sft.data.sources import DECODER
from sft.data.texts import answer_of, refuse_media, system_of, text_of
from sft.data.thoughts import NAMES, parted
from sft.data.weights import message_weight
from sft.foreign_text import listed
from sft.small_files import why

ROLES = {
    **{"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"},
    **{"tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool"},
}
CALLING = ("function_call", "tool_call")
"""Roles of messages that are nothing but calls, as JSON; with the answer before them they are one turn."""


def messages(record: Mapping[str, Any], needs_target: bool = True) -> Conversation:
    """``messages`` with ``role`` and ``content``; ``weight`` is what an answer counts, and 0 excludes it from what is
    learned."""
    return _conversation(record, "messages")


def sharegpt(record: Mapping[str, Any], needs_target: bool = True) -> Conversation:
    """``conversations`` with ``from`` (human, gpt, system, function_call, observation) and ``value``, or with ``role``
    and ``content``."""
    return _conversation(record, "conversations")


def _conversation(record: Mapping[str, Any], key: str) -> Conversation:
    value = record[key]
    if not isinstance(value, list) or not value:
        raise ValueError(f'"{key}" must be a list of at least one message, not {reprlib.repr(value)}.')
    tools = tools_of(record.get("tools") or record.get("functions"))
    if record.get("tools") and record.get("functions") and tools_of(record["functions"]) != tools:
        raise ValueError('the record has "tools" and "functions" that are not the same; keep one.')
    turns = system_of(record)
    if turns and isinstance(value[0], dict) and "system" in (value[0].get("role"), value[0].get("from")):
        raise ValueError(f'"system" and the first message of "{key}" both are system turns; keep one.')
    merges = False
    called: set[str] = set()
    for number, message in enumerate(value, start=1):
        what = f'message {number} of "{key}"'
        turn, calls_alone = _turn(message, what)
        _check_result(turn, called, what)
        called |= {call.id for call in turn.tool_calls if call.id is not None}
        if calls_alone and merges:
            if turn.weight != turns[-1].weight:
                raise ValueError(f"{what} and the answer before it are one turn; give both the same weight.")
            answer = turns.pop()
            turn = dataclasses.replace(answer, tool_calls=(*answer.tool_calls, *turn.tool_calls))
        turns.append(turn)
        merges = turn.role == "assistant"
    first = next(turn for turn in [*turns, Turn("", "")] if turn.role != "system")
    if first.role == "assistant" and first.trains:
        raise ValueError(
            f'"{key}" begins with an answer to nothing; begin with a user\'s message, or give it weight 0.'
        )
    return Conversation(turns, tools=tools)


def _turn(message: Any, what: str) -> tuple[Turn, bool]:
    """A message as a turn, and whether it is one of those that are nothing but calls."""
    if not isinstance(message, dict):
        raise ValueError(f"{what} must be an object with role and content, not {reprlib.repr(message)}.")
    by, text = ("from", "value") if message.get("role") is None and "from" in message else ("role", "content")
    calls = _calls(message, what)
    for name in (by, text):
        if name not in message and not (name == text and calls):
            raise ValueError(f'{what} has no "{name}" (its keys: {listed(message)}).')
    role, content = message[by], message.get(text)
    if not isinstance(role, str) or (role not in ROLES and role not in CALLING):
        known = ", ".join((*ROLES, *CALLING))
        raise ValueError(f"{what} has the role {reprlib.repr(role)}; known are {known}: take the record out.")
    refuse_media(message, what)
    weight = message_weight(message, what)
    thought = _thought(message, what)
    alone = role in CALLING
    if alone:
        calls, content = (*calls_of(content, what), *calls), ""
    role = "assistant" if alone else ROLES[role]
    if role != "assistant" and (calls or thought):
        raise ValueError(
            f"{what} has {'calls' if calls else 'a thought'}, and its role is {reprlib.repr(message[by])}; only an "
            "assistant's message may have them."
        )
    if role != "assistant" and weight not in (0, 1):
        raise ValueError(
            f"{what} has the weight {weight:g}, and its role is {reprlib.repr(message[by])}; only answers weigh: take "
            "it out, or give the record a weight."
        )
    trains = role == "assistant" and weight != 0
    asked = next((name for name in ("train", "training") if role != "assistant" and message.get(name)), None)
    if asked is not None:
        raise ValueError(
            f'{what} is to be learned ("{asked}"), and its role is {reprlib.repr(message[by])}; only answers are: take '
            f'"{asked}" out, and give train_on everything to learn the rest too.'
        )
    content = "" if content is None and calls else _joined(content, what)
    if thought and isinstance(content, str):
        content = _without_thought(content, thought, what)
    content = answer_of(content, what) if trains and not calls else text_of(content, what)
    if role != "tool":
        return Turn(role, content, trains, weight, thought or None, calls), alone
    answered, tool = (_optional_text(message, name, what) for name in ("tool_call_id", "name"))
    return Turn(role, content, weight=weight, tool_call_id=answered, name=tool), False


def _joined(content: Any, what: str) -> Any:
    """Content that is a list of parts as one text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise ValueError(
                f'{what} must be text, or a list of parts like {{"type": "text", "text": …}}, not '
                f"{reprlib.repr(content)}."
            )
        if kind != "text":
            raise ValueError(
                f"{what} has a part of the type {reprlib.repr(kind)}, and a model reads text here; take the record out."
            )
        texts.append(text_of(part.get("text"), f'the "text" of a part of {what}'))
    return "".join(texts)


def _thought(message: Mapping[str, Any], what: str) -> str:
    found = {name: text for name in NAMES if (text := _optional_text(message, name, what))}
    if len(set(found.values())) > 1:
        raise ValueError(f"{what} has two thoughts ({listed(found)}); keep one.")
    return next(iter(found.values()), "")


def _without_thought(content: str, thought: str, what: str) -> str:
    """The content of a message that has its ``thought`` beside it: some data has the same in both."""
    inside, rest = parted(Turn("assistant", content))
    if inside is None:
        return content
    if inside.strip() not in ("", thought.strip()):
        raise ValueError(f"{what} has two thoughts, one of them in its content; keep one.")
    return rest


def _optional_text(message: Mapping[str, Any], name: str, what: str) -> str | None:
    value = message.get(name)
    return None if value is None else text_of(value, f'"{name}" of {what}')


def _check_result(turn: Turn, called: set[str], what: str) -> None:
    """Refuse the result of a call whose id is not among those ``called``. Some data has calls as plain text, so not all
    need one."""
    if turn.tool_call_id is not None and called and turn.tool_call_id not in called:
        raise ValueError(
            f'{what} has the "tool_call_id" {reprlib.repr(turn.tool_call_id)}, and no call before it has this "id"; '
            "correct it."
        )


# --- calls and tools ----------------------------------------------------------------------------------------


def _calls(message: Mapping[str, Any], what: str) -> tuple[ToolCall, ...]:
    """The calls that stand in a message beside its content."""
    names = [name for name in ("tool_calls", "function_call") if message.get(name)]
    found = [calls_of(message[name], f'"{name}" of {what}') for name in names]
    same = [[(call.name, call.arguments) for call in calls] for calls in found]
    if same[1:] and same[0] != same[1]:
        raise ValueError(f"{what} has {listed(names)} that are not the same; keep one.")
    return found[0] if found else ()


def calls_of(value: Any, what: str) -> tuple[ToolCall, ...]:
    """One call or a list of them, as JSON values or as JSON text; ``ValueError`` for anything else."""
    value = _json_of(value, what)
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list) or not calls:
        raise ValueError(f"{what} must hold a call, or a list of them, not {reprlib.repr(value)}.")
    return tuple(
        _call(call, what if len(calls) == 1 else f"call {number} of {what}")
        for number, call in enumerate(calls, start=1)
    )


def _call(value: Any, what: str) -> ToolCall:
    inner = value.get("function") if isinstance(value, dict) and value.get("function") is not None else value
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
        raise ValueError(
            f'{what} must be an object with "name" and "arguments", or one with such a "function", not '
            f"{reprlib.repr(value)}."
        )
    given = inner.get("arguments")
    arguments = {} if given is None or given == "" else _json_of(given, f'"arguments" of {what}')
    if not isinstance(arguments, dict):
        raise ValueError(f'"arguments" of {what} must be a JSON object, not {reprlib.repr(given)}.')
    call = ToolCall(text_of(inner["name"], f'"name" of {what}'), arguments, _optional_text(value, "id", what))
    _check_values(arguments, f'"arguments" of {what}')
    return call


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """The tools of a record, a list or JSON text of one, each in OpenAI's form; a bare function becomes such a tool."""
    value = _json_of(value, '"tools"') if value else []
    tools = value or []
    if not isinstance(tools, list):
        raise ValueError(f'"tools" must be a list of tools, not {reprlib.repr(value)}.')
    found = []
    for number, tool in enumerate(tools, start=1):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
            raise ValueError(
                f'tool {number} of "tools" must be an object with "name", or one with such a "function", not '
                f"{reprlib.repr(tool)}."
            )
        _check_values(tool, f'tool {number} of "tools"')
        found.append({"type": "function", **tool} if "function" in tool else {"type": "function", "function": tool})
    return tuple(found)


def _json_of(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return DECODER.decode(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON ({why(error)}); correct it.") from None


def _check_values(value: Any, what: str) -> None:
    """Refuse what cannot be written down as JSON in UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a surrogate pair, which is no text; correct it.") from None
    except (ValueError, RecursionError, TypeError) as error:
        raise ValueError(f"{what} cannot be written as JSON ({why(error)}); correct it.") from None

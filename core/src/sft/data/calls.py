"""Tool calls in the text of an answer. Each model writes them in its own way, most of them as JSON with the name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sft.conversations import ToolCall
from sft.data.messages import tools_of
from sft.errors import UsageError
from sft.small_files import read_json

_OPENS = re.compile(r"(?:\s*(?:<(?!/?think>)[^<>\s]{1,40}>|\[[A-Z_]+\]|\[))*\s*$")
"""What stands before the JSON of a call: a mark such as ``<tool_call>`` or ``[TOOL_CALLS]``, and the list's bracket."""
_CLOSES = re.compile(r"\s*(?:(?:</?[^<>\s]{1,40}>|\]|,|```)\s*)*")
_NAMED = r"(?<!\w){}[\s`]*(?:json)?\s*$"
"""A name before the JSON of its arguments."""


def read_tools(path: Path) -> tuple[dict[str, Any], ...]:
    """The tools in a file of JSON: a list as it stands in a record, or an object with such ``tools``."""
    value = read_json(path, "tools ", "give a file with a list of tools")
    try:
        tools = tools_of(value["tools"] if isinstance(value, dict) and "tools" in value else value)
    except ValueError as error:
        raise UsageError(f"tools {path}: {error}") from error
    if not tools:
        raise UsageError(f"tools {path} holds none; leave the option out, or give a list of them.")
    return tools


def calls_in(text: str, tools: Iterable[dict[str, Any]]) -> tuple[str, tuple[ToolCall, ...]]:
    """What an answer says beside its calls of ``tools``, and these calls. A form that is not known stays text."""
    names = [str(tool["function"]["name"]) for tool in tools]
    said: list[str] = []
    calls: list[ToolCall] = []
    decoder = json.JSONDecoder()
    at = position = 0
    while (position := text.find("{", position)) >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        before = text[at:position]
        call = _call(value, names) or _named(before, value, names)
        if call is not None:
            calls.append(call)
            said.append(_OPENS.sub("", _without_name(before, call.name)))
            end = at = _CLOSES.match(text, end).end()  # type: ignore[union-attr]  # it matches nothing, too
        position = end
    if not calls:
        return text, ()
    said.append(text[at:])
    return "\n".join(part.strip() for part in said if part.strip()), tuple(calls)


def shown_call(call: ToolCall) -> str:
    return f"{call.name} {json.dumps(call.arguments, ensure_ascii=False)}"


def _call(value: dict[str, Any], names: Sequence[str]) -> ToolCall | None:
    inner = value["function"] if isinstance(value.get("function"), dict) else value
    arguments = inner.get("arguments", inner.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if inner.get("name") not in names or not isinstance(arguments, dict):
        return None
    identity = value.get("id")
    return ToolCall(inner["name"], arguments, identity if isinstance(identity, str) else None)


def _named(before: str, value: dict[str, Any], names: Sequence[str]) -> ToolCall | None:
    name = next((name for name in names if re.search(_NAMED.format(re.escape(name)), before)), None)
    return None if name is None else ToolCall(name, value)


def _without_name(before: str, name: str) -> str:
    found = re.search(_NAMED.format(re.escape(name)), before)
    return before[: found.start()] if found else before

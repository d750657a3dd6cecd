"""What a chat template takes beyond texts: tools, calls, results and thoughts.

It is seen in what the template writes of conversations made up for this, and of each record: templates are programs,
and what a name in them does cannot be read off. What a template leaves out is refused, with the cure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

from sft.conversations import Conversation, ToolCall, Turn
from sft.data.thoughts import NAMES, parted, with_thought
from sft.errors import UsageError
from sft.foreign_text import quoted

Write = Callable[[list[dict[str, Any]], Sequence[dict[str, Any]]], str]
"""Writes messages, with these tools."""
_QUESTION = {"role": "user", "content": "seen question"}
_CALL = ToolCall("seen_function", {"seen_name": "seen value"})
_FURTHER = ToolCall("further_function", {"further_name": "further value"})
_TOOL = {
    "type": "function",
    "function": {
        "name": "seen_function",
        "description": "Seen.",
        "parameters": {
            "type": "object",
            "properties": {"seen_name": {"type": "string", "description": "Seen."}},
            "required": ["seen_name"],
        },
    },
}
_CURE = "give chat_template one that does, or take such records out"


class CallForm(NamedTuple):
    """How a template wants a call."""

    ids: bool
    """Whether each call needs an id, of nine letters and digits."""
    as_text: bool
    """Whether it takes arguments as JSON text only."""
    nothing: bool
    """Whether an answer that is nothing but calls must have null as its content, and not an empty text."""


class Habits:
    """What one template takes. ``place`` is how it is named to people."""

    def __init__(self, write: Write, place: str) -> None:
        self._write, self._place = write, place

    # --- what it takes --------------------------------------------------------------------------------------

    @cached_property
    def thought(self) -> str | None:
        """The key in which it takes a thought; None where it takes none."""
        answer = {"role": "assistant", "content": "seen answer"}
        return next((key for key in NAMES if "seen thought" in self._seen({**answer, key: "seen thought"})), None)

    @cached_property
    def _parts_content(self) -> bool:
        """Whether it finds a thought that stands in the content by itself."""
        answer = {"role": "assistant", "content": "seen answer"}
        inside = {"role": "assistant", "content": "<think>\nseen thought\n</think>\n\nseen answer"}
        return self._seen(inside) == self._seen({**answer, str(self.thought): "seen thought"})

    @cached_property
    def tools(self) -> bool:
        """Whether it writes what tools there are."""
        text = self._seen(tools=[_TOOL])
        return "seen_function" in text and text != self._seen()

    @cached_property
    def calls(self) -> CallForm | None:
        """How it takes calls; None where it writes none."""
        for form in (CallForm(*wants) for wants in product((False, True), repeat=3)):
            [message] = _messages([Turn("assistant", "", tool_calls=(_CALL,))], self._with_thought, form)
            text = self._seen(message)
            # A dictionary as Python prints it is no JSON.
            if holds_call(_CALL, text) and "'seen_name'" not in text:
                return form
        return None

    @cached_property
    def _leaves_calls_out(self) -> bool:
        """Whether it writes only some of several calls in a turn. The words of a call that is missing may stand in the
        question and in the tools, so that a record does not show it."""
        text = self._seen(*self.messages([Turn("assistant", "", tool_calls=(_CALL, _FURTHER))]))
        return bool(text) and not (holds_call(_CALL, text) and holds_call(_FURTHER, text))

    @cached_property
    def _leaves_results_out(self) -> bool:
        """Whether it writes no results of calls, which may stand in an answer as well."""
        calls = (_CALL,) if self.calls is not None else ()
        turns = [Turn("assistant", "" if calls else "seen answer", tool_calls=calls), Turn("tool", "seen result")]
        text = self._seen(*self.messages([*turns, Turn("assistant", "seen answer")]))
        return bool(text) and "seen result" not in text

    def _seen(self, *messages: dict[str, Any], tools: Sequence[dict[str, Any]] = ()) -> str:
        """What it writes of a question and these messages; nothing where it refuses them."""
        try:
            return self._write([_QUESTION, *messages], tools)
        except UsageError:
            return ""

    # --- what it gets ---------------------------------------------------------------------------------------

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """``turns`` as the template takes them, which is how transformers passes messages."""
        form = self.calls if any(turn.tool_calls for turn in turns) else None
        return _messages(turns, self._with_thought, form or CallForm(False, False, False))

    def _with_thought(self, turn: Turn) -> dict[str, Any]:
        if turn.reasoning is None and "<think>" not in turn.content:
            return {"content": turn.content}
        if self.thought is None:
            return {"content": with_thought(turn)}
        if turn.reasoning is None and self._parts_content:
            return {"content": turn.content}
        thought, content = parted(turn)
        return {"content": content, **({} if thought is None else {self.thought: thought})}

    # --- what it must have written ----------------------------------------------------------------------------

    def check(self, conversation: Conversation, text: str) -> None:
        """Refuse a ``text`` in which tools, calls or results of the ``conversation`` are missing."""
        if conversation.tools:
            names = [str(tool["function"].get("name")) for tool in conversation.tools]
            missing = next((name for name in names if name not in text), None)
            if not self.tools or missing is not None:
                what = "the tools of a record" if not self.tools else f"the tool {quoted(missing)} here"
                raise UsageError(
                    f"The chat template of {self._place} does not write {what}, so the model would not know of them; "
                    f'give chat_template one that does, or take "tools" out.'
                )
        for turn in conversation:
            if len(turn.tool_calls) > 1 and self.calls is not None and self._leaves_calls_out:
                raise UsageError(f"The chat template of {self._place} does not write all calls of a turn; {_CURE}.")
            for call in turn.tool_calls:
                if self.calls is None or not holds_call(call, text):
                    what = "calls" if self.calls is None else f"the call of {quoted(call.name)} as it stands here"
                    raise UsageError(f"The chat template of {self._place} does not write {what}; {_CURE}.")
            if turn.role == "tool" and (self._leaves_results_out or not _holds(turn.content.strip(), text)):
                raise UsageError(
                    f"The chat template of {self._place} leaves the result {quoted(turn.content)} out; {_CURE}."
                )


def refuse_tools(conversation: Conversation, place: str) -> None:
    """Refuse a conversation with tools, calls or results, of which a template knows nothing."""
    calls = any(turn.tool_calls or turn.role == "tool" for turn in conversation)
    if conversation.tools or calls:
        raise UsageError(f"{place} has no place for {'calls and results' if calls else 'tools'}; {_CURE}.")


def _messages(
    turns: Sequence[Turn], content_of: Callable[[Turn], dict[str, Any]], form: CallForm
) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    number = 0
    waiting: Iterator[str] = iter(())
    for turn in turns:
        if turn.role != "assistant":
            plain = {"role": turn.role, "content": turn.content}
            about = {"tool_call_id": turn.tool_call_id, "name": turn.name}
            if turn.role == "tool" and form.ids and turn.tool_call_id is None:
                about["tool_call_id"] = next(waiting, None)
            messages.append({**plain, **{name: value for name, value in about.items() if value is not None}})
            continue
        message: dict[str, Any] = {"role": turn.role, **content_of(turn)}
        if turn.tool_calls:
            calls = []
            for call in turn.tool_calls:
                number += 1
                arguments = json.dumps(call.arguments, ensure_ascii=False) if form.as_text else call.arguments
                one = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
                made = f"call{number:05d}" if form.ids else None
                calls.append(one if (call.id or made) is None else {"id": call.id or made, **one})
            message["tool_calls"] = calls
            waiting = iter([str(call["id"]) for call in calls if "id" in call])
            if form.nothing and not message["content"]:
                message["content"] = None
        messages.append(message)
    return messages


def holds_call(call: ToolCall, text: str) -> bool:
    """Whether the name and the arguments of a call stand in ``text``, in whatever form."""
    if call.name not in text:
        return False
    return json.dumps(call.arguments, ensure_ascii=False) in text or all(
        _holds(leaf, text) for leaf in _leaves(call.arguments)
    )


def _leaves(value: Any) -> Iterator[str]:
    """The names, texts and numbers in a JSON value."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from _leaves(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


def _holds(part: str, text: str) -> bool:
    """Whether a text stands there as it is, or as JSON writes it."""
    return part in text or any(json.dumps(part, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))

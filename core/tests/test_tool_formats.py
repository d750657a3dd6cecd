"""Tools, calls, results, thoughts and parts in the dialects of messages, and what a wrong one is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sft import ToolCall, Turn
from sft.conversations import Conversation
from sft.data.formats import FORMATS, recognise

USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "f", "arguments": {"x": [1, "ü"]}}
MADE = ToolCall("f", {"x": [1, "ü"]})


def read(record: dict[str, Any]) -> Conversation:
    turns = FORMATS[recognise(record)][1](record)
    assert isinstance(turns, Conversation)
    return turns


def refused(record: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        read(record)
    return str(caught.value)


# --- tools --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", [FUNCTION, {"type": "function", "function": FUNCTION}, {"function": FUNCTION}])
@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_in_each_dialect(dialect: dict[str, Any], as_text: bool, key: str) -> None:
    tools: Any = json.dumps([dialect]) if as_text else [dialect]
    assert read({"messages": [USER, BOT], key: tools}).tools == ({"type": "function", "function": FUNCTION},)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("see above", '"tools" is not valid JSON ('),
        ({"name": "f"}, "\"tools\" must be a list of tools, not {'name': 'f'}."),
        (3, '"tools" must be a list of tools, not 3.'),
        ([3], 'tool 1 of "tools" must be an object with "name", or one with such a "function", not 3.'),
        ([FUNCTION, {"function": {}}], 'tool 2 of "tools" must be an object with "name", or one with such a "functi'),
        ([{"name": " "}], 'tool 1 of "tools" must be an object with "name", or one'),
        ([{"name": "f", "description": "\ud800"}], 'tool 1 of "tools" holds half of a surrogate pair'),
        ('[{"name": "f", "x": NaN}]', 'tool 1 of "tools" cannot be written as JSON ('),
        ('[{"name": "f", "name": "g"}]', '"tools" is not valid JSON ("name" stands twice in one object); correct it.'),
        ("[" * 100_000, '"tools" is not valid JSON (it is nested too deep)'),
    ],
)
def test_wrong_tools(tools: Any, message: str) -> None:
    assert refused({"messages": [USER, BOT], "tools": tools}).startswith(message)


# --- calls and results --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [{"type": "function", "function": CALL}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": json.dumps(CALL["arguments"])}}]},
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": CALL},
        {"function_call": {"name": "f", "arguments": json.dumps(CALL["arguments"])}, "tool_calls": None},
    ],
)
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_calls_in_each_dialect_of_messages(calls: dict[str, Any], content: dict[str, Any]) -> None:
    messages = [USER, {"role": "assistant", **content, **calls}, {"role": "tool", "content": "3"}, BOT]
    assert read({"messages": messages})[1:3] == [Turn("assistant", "", True, tool_calls=(MADE,)), Turn("tool", "3")]


def test_several_calls_beside_a_text_and_their_results() -> None:
    calls = [{"id": name, "function": {"name": name, "arguments": ""}} for name in ("one", "two")]
    results = [
        {"role": "tool", "tool_call_id": "two", "name": "two", "content": "3"},
        {"role": "function", "content": ""},
    ]
    assert read({"messages": [USER, {**BOT, "tool_calls": calls}, *results, BOT]})[1:4] == [
        Turn("assistant", "b", True, tool_calls=(ToolCall("one", {}, "one"), ToolCall("two", {}, "two"))),
        Turn("tool", "3", tool_call_id="two", name="two"),
        Turn("tool", ""),
    ]


@pytest.mark.parametrize("value", [json.dumps(CALL), CALL, [CALL], json.dumps([CALL])])
def test_calls_of_sharegpt(value: Any) -> None:
    says = [("human", "a"), ("function_call", value), ("observation", "3"), ("gpt", "b")]
    turns = read({"conversations": [{"from": sender, "value": text} for sender, text in says], "tools": ""})
    assert turns == [
        Turn("user", "a"),
        Turn("assistant", "", True, tool_calls=(MADE,)),
        Turn("tool", "3"),
        Turn("assistant", "b", True),
    ]


def test_a_text_and_the_calls_after_it_are_one_turn() -> None:
    says = [("human", "a"), ("gpt", "b"), ("function_call", json.dumps(CALL)), ("function_call", json.dumps(CALL))]
    turns = read({"conversations": [{"from": sender, "value": text} for sender, text in says]})
    assert turns[1:] == [Turn("assistant", "b", True, tool_calls=(MADE, MADE))]


def test_roles_of_calls_in_messages_too() -> None:
    calling = {"role": "tool_call", "content": json.dumps(CALL)}
    turns = read({"messages": [USER, calling, {"role": "tool_response", "content": "3"}, BOT]})
    assert [(turn.role, turn.trains) for turn in turns] == [
        ("user", False),
        ("assistant", True),
        ("tool", False),
        ("assistant", True),
    ]


def test_a_call_with_weight_0_is_not_learned() -> None:
    assert [t.trains for t in read({"messages": [USER, {**BOT, "tool_calls": [CALL], "weight": 0}, BOT]})] == [
        *(False, False, True)
    ]


WHAT = 'message 2 of "messages"'


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (
            {**BOT, "tool_calls": [{"id": 1}]},
            f'"tool_calls" of {WHAT} must be an object with "name" and "arguments", or',
        ),
        ({**BOT, "tool_calls": [CALL, 3]}, f'call 2 of "tool_calls" of {WHAT} must be an object with "name" and'),
        ({**BOT, "tool_calls": "f(3)"}, f'"tool_calls" of {WHAT} is not valid JSON ('),
        ({**BOT, "tool_calls": 3}, f'"tool_calls" of {WHAT} must hold a call, or a list of them, not 3.'),
        ({**BOT, "tool_calls": [{**CALL, "arguments": "x=3"}]}, f'"arguments" of "tool_calls" of {WHAT} is not valid'),
        (
            {**BOT, "tool_calls": [{**CALL, "arguments": "[3]"}]},
            f'"arguments" of "tool_calls" of {WHAT} must be a JSON object, not \'[3]\'.',
        ),
        (
            {**BOT, "tool_calls": [{**CALL, "arguments": '{"x": NaN}'}]},
            f'"arguments" of "tool_calls" of {WHAT} cannot be',
        ),
        (
            {**BOT, "tool_calls": [{**CALL, "arguments": {"x": "\ud800"}}]},
            f'"arguments" of "tool_calls" of {WHAT} holds',
        ),
        ({**BOT, "tool_calls": [{**CALL, "id": 3}]}, f'"id" of "tool_calls" of {WHAT} must be text, not 3.'),
        ({**USER, "tool_calls": [CALL]}, f"{WHAT} has calls, and its role is 'user'; only an assistant's message may"),
        ({**USER, "thinking": "x"}, f"{WHAT} has a thought, and its role is 'user'; only an"),
        ({"role": "function_call", "content": ""}, f"{WHAT} must hold a call, or a list of them, not None."),
        ({"role": "tool", "content": {"x": 3}}, f"{WHAT} must be text, not {{'x': 3}}."),
        ({"role": "tool", "content": "3", "tool_call_id": 7}, f'"tool_call_id" of {WHAT} must be text, not 7.'),
        ({**BOT, "reasoning_content": 3}, f'"reasoning_content" of {WHAT} must be text, not 3.'),
        ({**BOT, "reasoning": "x", "thinking": "y"}, f"{WHAT} has two thoughts (reasoning, thinking); keep one."),
        ({**BOT, "content": "<think>y</think>b", "thinking": "x"}, f"{WHAT} has two thoughts, one of them in its con"),
        (
            {**BOT, "tool_calls": [CALL], "function_call": {**CALL, "name": "g"}},
            f"{WHAT} has tool_calls, function_call that are not the same; keep one.",
        ),
        ({**BOT, "content": "", "reasoning": "x"}, f"{WHAT} is empty; remove the record or give it an answer."),
    ],
)
def test_wrong_calls_and_thoughts(message: Any, text: str) -> None:
    assert refused({"messages": [USER, message, BOT]}).startswith(text)


def test_the_result_of_a_call_that_is_not_there() -> None:
    calls = {**BOT, "tool_calls": [{**CALL, "id": "x"}]}
    assert refused({"messages": [USER, calls, {"role": "tool", "tool_call_id": "y", "content": "3"}, BOT]}) == (
        'message 3 of "messages" has the "tool_call_id" \'y\', and no call before it has this "id"; correct it.'
    )


@pytest.mark.parametrize(("text", "call"), [(1, 0), (0.5, 1), (1, 2)])
def test_two_weights_in_one_turn(text: float, call: float) -> None:
    calling = {"role": "function_call", "content": json.dumps(CALL), "weight": call}
    assert refused({"messages": [USER, {**BOT, "weight": text}, calling]}) == (
        'message 3 of "messages" and the answer before it are one turn; give both the same weight.'
    )
    (_, turn) = read({"messages": [USER, {**BOT, "weight": 0.5}, {**calling, "weight": 0.5}]})
    assert turn == Turn("assistant", "b", True, 0.5, tool_calls=(MADE,))


# --- thoughts and parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_beside_its_answer(key: str) -> None:
    empty = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "")
    turns = read({"messages": [USER, {**BOT, **empty, key: "why"}, {**USER, **empty}, {**BOT, key: None}]})
    assert [turn.reasoning for turn in turns] == [None, "why", None, None]


def test_a_thought_in_the_answer_stays_there() -> None:
    assert read({"messages": [USER, {**BOT, "content": "<think>why</think>b"}]})[1] == Turn(
        "assistant", "<think>why</think>b", True
    )


@pytest.mark.parametrize("inside", ["", "why"])
def test_a_thought_in_both_places_is_one(inside: str) -> None:
    answer = {**BOT, "content": f"<think>\n{inside}\n</think>\n\nb", "reasoning_content": "why"}
    assert read({"messages": [USER, answer]})[1] == Turn("assistant", "b", True, reasoning="why")


def test_tools_and_calls_under_two_names_are_read_once() -> None:
    twice = {**BOT, "tool_calls": [{"id": "x", "function": CALL}], "function_call": CALL}
    turns = read({"messages": [USER, twice], "tools": [{"function": FUNCTION}], "functions": [FUNCTION]})
    assert (turns[1].tool_calls, len(turns.tools)) == ((ToolCall("f", MADE.arguments, "x"),), 1)
    other = {"tools": [FUNCTION], "functions": [{**FUNCTION, "name": "g"}]}
    assert refused({"messages": [USER, BOT], **other}).startswith('the record has "tools" and "functions" that are not')


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " this?"}]
    assert read({"messages": [{**USER, "content": parts}, {**BOT, "content": parts[:1]}]}) == [
        Turn("user", "What is this?"),
        Turn("assistant", "What is", True),
    ]


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (
            [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}],
            "message 1 of \"messages\" has a part of the type 'image_url', and a model reads text here; take the",
        ),
        ([{"type": "text"}], 'the "text" of a part of message 1 of "messages" must be text, not None.'),
        (
            ["x"],
            'message 1 of "messages" must be text, or a list of parts like {"type": "text", "text": …}, not [\'x\'].',
        ),
        ([{"text": "x"}], 'message 1 of "messages" must be text, or a list of parts like'),
    ],
)
def test_parts_that_are_no_text(parts: Any, text: str) -> None:
    assert refused({"messages": [{**USER, "content": parts}, BOT]}).startswith(text)
    assert refused({"messages": [USER, {**BOT, "content": []}]}).startswith('message 2 of "messages" is empty')

"""The formats other people's data is in: messages, ShareGPT and Alpaca, and what a wrong record of each is told."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sft import Turn
from sft.data.formats import FORMATS, recognise

SYSTEM, USER = {"role": "system", "content": "s"}, {"role": "user", "content": "a"}
BOT = {"role": "assistant", "content": "b"}
MUST_BE = '"weight" must be 0, or a number from 0.000001 to 1,000,000'


def read(record: dict[str, Any]) -> list[Turn]:
    return FORMATS[recognise(record)][1](record)


def refused(record: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        read(record)
    return str(caught.value)


# --- messages and conversations -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_several_turns_after_a_system_turn(key: str) -> None:
    assert read({key: [SYSTEM, USER, BOT, USER, BOT]}) == [
        Turn("system", "s"),
        Turn("user", "a"),
        Turn("assistant", "b", trains=True),
        Turn("user", "a"),
        Turn("assistant", "b", trains=True),
    ]


def test_sharegpts_names() -> None:
    values = [("system", "s"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")]
    record = {"conversations": [{"from": sender, "value": text} for sender, text in values], "id": "x_0"}
    assert [(turn.role, turn.content, turn.trains) for turn in read(record)] == [
        ("system", "s", False),
        ("user", "a", False),
        ("assistant", "b", True),
        ("user", "c", False),
        ("assistant", "d", True),
    ]


@pytest.mark.parametrize(
    ("weight", "trains"),
    [({}, True), ({"weight": None}, True), ({"weight": 1}, True), ({"weight": 1.0}, True)]
    + [({"weight": 0}, False), ({"weight": 0.0}, False)],
)
def test_weight_0_excludes_an_answer(weight: dict[str, Any], trains: bool) -> None:
    turns = read({"messages": [USER, {**BOT, **weight}, USER, BOT]})
    assert [turn.trains for turn in turns] == [False, trains, False, True]


@pytest.mark.parametrize("weight", [0.5, 3, 1e-6, 1_000_000])
def test_an_answer_may_count_more_or_less_than_others(weight: float) -> None:
    turns = read({"messages": [USER, {**BOT, "weight": weight}, USER, BOT]})
    assert [(turn.trains, turn.weight) for turn in turns] == [(False, 1), (True, weight), (False, 1), (True, 1)]


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        ({"train": False}, 0),
        ({"training": False}, 0),
        ({"loss": False}, 0),
        ({"loss": 0}, 0),
        ({"loss_scale": 0.0}, 0),
        ({"train": True}, 1),
        ({"loss": 1}, 1),
        ({"loss_scale": 2.5}, 2.5),
        ({"loss": True, "loss_scale": 0.5}, 0.5),
        ({"train": True, "weight": 3}, 3),
        ({"weight": 0, "loss": False}, 0),
        ({"loss": None, "loss_scale": None, "train": None}, 1),
    ],
    ids=str,
)
def test_the_names_that_other_tools_have_for_a_weight(given: dict[str, Any], weight: float) -> None:
    """axolotl's train and training, ms-swift's loss and loss_scale; a question that is not learned may say so."""
    for turns in (
        read({"messages": [{**USER, "train": False, "loss": False}, {**BOT, **given}, USER, BOT]}),
        read({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", **given}, USER, BOT]}),
    ):
        assert (turns[1].trains, turns[1].weight) == (weight > 0, weight)
        assert turns[3].trains


def test_columns_of_a_table_that_are_absent_in_a_message() -> None:
    absent = {"from": None, "value": None, "tool_calls": None, "name": None, "weight": None}
    assert read({"messages": [{**USER, **absent}, {**BOT, **absent}], "tools": None}) == read({"messages": [USER, BOT]})


def test_an_answer_before_any_question_may_be_context() -> None:
    turns = read({"messages": [{**BOT, "weight": 0}, USER, BOT]})
    assert [turn.trains for turn in turns] == [False, False, True]


def test_an_empty_text_that_is_not_learned_is_allowed() -> None:
    empty = {"content": "", "weight": 0}
    assert [turn.content for turn in read({"messages": [{**USER, "content": ""}, {**BOT, **empty}, USER, BOT]})] == [
        *("", ""),
        *("a", "b"),
    ]


def test_a_system_text_beside_the_conversation() -> None:
    assert read({"system": "s", "conversations": [USER, BOT]}) == read({"messages": [SYSTEM, USER, BOT]})
    assert read({"system": "", "conversations": [USER, BOT]}) == read({"messages": [USER, BOT]})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], '"messages" must be a list of at least one message, not [].'),
        ("[]", "\"messages\" must be a list of at least one message, not '[]'."),
        (["a"], "message 1 of \"messages\" must be an object with role and content, not 'a'."),
        ([USER, {"role": "assistant"}], 'message 2 of "messages" has no "content" (its keys: role).'),
        ([{}], 'message 1 of "messages" has no "role" (its keys: none).'),
        ([{"from": "human", "text": "a"}], 'message 1 of "messages" has no "value" (its keys: from, text).'),
        ([{"role": "developer", "content": "3"}, USER, BOT], "message 1 of \"messages\" has the role 'developer'; kno"),
        ([{"role": ["user"], "content": "3"}, BOT], "message 1 of \"messages\" has the role ['user']; known are"),
        ([{"role": None, "content": "3"}, BOT], 'message 1 of "messages" has the role None; known are'),
        ([USER, {**BOT, "content": ""}], 'message 2 of "messages" is empty; remove the record or give it an answer.'),
        ([USER, {**BOT, "content": None}], 'message 2 of "messages" must be text, not None.'),
        ([{**USER, "content": "\udc00"}, BOT], 'message 1 of "messages" holds half of a surrogate pair'),
        *(
            ([USER, {**BOT, "weight": weight}], f'message 2 of "messages" has the weight {weight!r}; {MUST_BE}.')
            for weight in (True, "0", -1, -0.0001, float("nan"), float("inf"), 1e-7, 1_000_001, [1])
        ),
        ([USER, {**BOT, "weight": 10**400}], 'message 2 of "messages" has the weight 1000000000000000'),
        ([USER, {**BOT, "loss": 0.5}], 'message 2 of "messages" has the loss 0.5; "loss" must be true or false.'),
        (
            [USER, {**BOT, "train": "no"}],
            'message 2 of "messages" has the train \'no\'; "train" must be true',
        ),
        (
            [USER, {**BOT, "loss_scale": [1]}],
            'message 2 of "messages" has the loss_scale [1]; "loss_scale" must be',
        ),
        (
            [USER, {**BOT, "loss": False, "weight": 2}],
            'message 2 of "messages" has weights that contradict each other (weight, loss); keep one.',
        ),
        (
            [USER, {**BOT, "loss_scale": 3, "weight": 2}],
            'message 2 of "messages" has weights that contradict each other (weight, loss_scale); keep one.',
        ),
        (
            [USER, {**BOT, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}],
            'message 2 of "messages" has "train_detail", which is for parts of a message, and a message is',
        ),
        (
            [{**USER, "train": True}, BOT],
            'message 1 of "messages" is to be learned ("train"), and its role is \'user\'; only answers are: take',
        ),
        (
            [{**USER, "weight": 0.5}, BOT],
            "message 1 of \"messages\" has the weight 0.5, and its role is 'user'; only answers weigh: take it out, or",
        ),
        ([{**USER, "images": ["a.png"]}, BOT], 'message 1 of "messages" has "images", and a model reads text here;'),
        ([BOT], '"messages" begins with an answer to nothing; begin with a user\'s message, or give it weight 0.'),
        ([SYSTEM, BOT], '"messages" begins with an answer to nothing; begin'),
    ],
)
def test_wrong_messages(messages: Any, message: str) -> None:
    assert refused({"messages": messages}).startswith(message)


def test_two_system_texts_are_refused() -> None:
    both = refused({"system": "s", "conversations": [SYSTEM, USER, BOT]})
    assert re.match('"system" and the first message of "conversations" both are system turns; keep one', both)


# --- Alpaca -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "question"),
    [
        ({}, "Do"),
        ({"input": None}, "Do"),
        ({"input": ""}, "Do"),
        ({"input": "this"}, "Do\nthis"),
        ({"text": "x"}, "Do"),
    ],
)
def test_an_input_stands_below_the_instruction(given: dict[str, Any], question: str) -> None:
    record = {"instruction": "Do", "output": "Done", **given}
    assert read(record) == [Turn("user", question), Turn("assistant", "Done", trains=True)]


def test_an_input_alone_is_the_question() -> None:
    assert read({"instruction": "", "input": "this", "output": "Done"})[0] == Turn("user", "this")


def test_system_and_history_come_first() -> None:
    record = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    assert read(record) == [
        Turn("system", "s"),
        Turn("user", "a"),
        Turn("assistant", "b", trains=True),
        Turn("user", "c"),
        Turn("assistant", "d", trains=True),
    ]
    for empty in ({"system": None, "history": None}, {"system": "", "history": []}, {"system": " ", "history": ""}):
        assert len(read({**record, **empty})) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": ""}, '"output" is empty; remove the record or give it an answer.'),
        ({"output": " \n"}, '"output" is empty; remove the record or give it an answer.'),
        ({"output": ["b"]}, "\"output\" must be text, not ['b']."),
        ({"instruction": 3}, '"instruction" must be text, not 3.'),
        ({"input": {"a": 1}}, "\"input\" must be text, not {'a': 1}."),
        ({"input": "\ud800"}, '"input" holds half of a surrogate pair, which is no text; correct it.'),
        ({"system": 3}, '"system" must be text, not 3.'),
        ({"history": "[]"}, "\"history\" must be a list of [question, answer], not '[]'."),
        ({"history": [["a"]]}, "\"history\" must be a list of [question, answer], not [['a']]."),
        ({"history": [["a", ""]]}, 'answer 1 of "history" is empty; remove the record or give it an answer.'),
        ({"history": [["a", "b"], [None, "c"]]}, 'question 2 of "history" must be text, not None.'),
    ],
)
def test_wrong_alpaca_records(change: dict[str, Any], message: str) -> None:
    assert refused({"instruction": "a", "output": "b", **change}) == message


@pytest.mark.parametrize("tools", [[], "[]", "", " [ ] ", "null", {}, "{}"])
def test_a_list_of_no_tools_passes_as_text_too(tools: Any) -> None:
    assert read({"messages": [USER, BOT], "tools": tools}) == read({"messages": [USER, BOT]})

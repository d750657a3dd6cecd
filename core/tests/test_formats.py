"""Formats: from a record to the turns of a conversation, plugins first, and what a wrong record is told.

``test_message_formats.py`` has the formats that are lists of messages, and Alpaca.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sft
from sft import Turn, hookspecs
from sft.conversations import Conversation
from sft.data.formats import Formats, src_tgt
from sft.data.questions import before_last_answer
from sft.data.sources import Record
from sft.plugins.registry import Plugins


def formats(*plugins: type) -> Formats:
    active = Plugins.load([], hookspecs, plugins)
    active.start({})
    return Formats(active)


def record(value: dict[str, Any], line: int = 18) -> Record:
    return Record(value, Path("data/train.json"), line)


def turns_of(value: dict[str, Any], *plugins: type) -> list[Turn]:
    return list(formats(*plugins).turns(record(value)))


def refusal(value: dict[str, Any], *plugins: type) -> str:
    with pytest.raises(sft.UsageError) as caught:
        turns_of(value, *plugins)
    message = str(caught.value)
    assert message.startswith("data/train.json, line 18: ")
    return message.removeprefix("data/train.json, line 18: ")


# --- src and tgt --------------------------------------------------------------------------------------------


def test_texts_are_one_question_and_one_answer() -> None:
    assert turns_of({"src": "Hi", "tgt": "Hello"}) == [
        Turn("user", "Hi", trains=False),
        Turn("assistant", "Hello", trains=True),
    ]


def test_lists_are_the_turns_of_one_conversation_and_every_answer_trains() -> None:
    assert src_tgt({"src": ["a", "b"], "tgt": ["1", "2"]}) == [
        Turn("user", "a"),
        Turn("assistant", "1", trains=True),
        Turn("user", "b"),
        Turn("assistant", "2", trains=True),
    ]


def test_a_list_of_one_is_a_text() -> None:
    assert src_tgt({"src": ["a"], "tgt": "1"}) == src_tgt({"src": "a", "tgt": "1"})


def test_other_keys_are_of_no_concern() -> None:
    assert src_tgt({"id": 3, "src": "a", "tgt": "1", "lang": None}) == src_tgt({"src": "a", "tgt": "1"})


def test_white_space_is_kept_and_an_empty_question_allowed() -> None:
    assert [turn.content for turn in src_tgt({"src": "", "tgt": "\n x "})] == ["", "\n x "]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"src": "a"}, 'the record has no "tgt" (its keys: src); each needs "src" and "tgt".'),
        ({"src": ["a", "b"], "tgt": ["1"]}, '"src" and "tgt" must have as many turns; they have 2 and 1.'),
        ({"src": "a", "tgt": ["1", "2"]}, '"src" and "tgt" must have as many turns; they have 1 and 2.'),
        ({"src": "a", "tgt": ""}, '"tgt" is empty; remove the record or give it an answer.'),
        ({"src": "a", "tgt": " \n"}, '"tgt" is empty; remove the record or give it an answer.'),
        ({"src": ["a", "b"], "tgt": ["1", ""]}, '"tgt" is empty; remove the record or give it an answer.'),
        ({"src": 3, "tgt": "b"}, '"src" must be text or a list of texts, not 3.'),
        ({"src": "a", "tgt": None}, '"tgt" must be text or a list of texts, not None.'),
        ({"src": [], "tgt": []}, '"src" must be text or a list of texts, not [].'),
        ({"src": ["a", 1], "tgt": ["1", "2"]}, "\"src\" must be text or a list of texts, not ['a', 1]."),
        ({"src": {"a": "b"}, "tgt": "b"}, "\"src\" must be text or a list of texts, not {'a': 'b'}."),
        ({"src": "\ud83d", "tgt": "b"}, '"src" holds half of a surrogate pair, which is no text; correct it.'),
        ({"src": "a", "tgt": "b", "context": {"system": "s", "x": 1}}, '"context" has x, and only "system" is known'),
        ({"src": "a", "tgt": "b", "context": {"system": 3}}, '"system" must be text, not 3.'),
    ],
)
def test_wrong_records(value: dict[str, Any], message: str) -> None:
    assert refusal(value).startswith(message)


def test_paddlenlps_context_may_hold_the_system_turn() -> None:
    record = {"src": "a", "tgt": "1", "context": {"system": "s"}}
    assert src_tgt(record) == [Turn("system", "s"), Turn("user", "a"), Turn("assistant", "1", trains=True)]
    for other in ("a text", None, {}, {"system": ""}):  # other people's columns have that name too
        assert src_tgt({**record, "context": other}) == src_tgt({"src": "a", "tgt": "1"})


# --- which format -------------------------------------------------------------------------------------------

SRC = {"src": "a", "tgt": "b"}
ALPACA = {"instruction": "a", "input": "", "output": "b"}
MESSAGES = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
NAMES = {
    "src/tgt": SRC,
    "messages (role/content)": MESSAGES,
    "ShareGPT (conversations)": SHAREGPT,
    "Alpaca (instruction/input/output)": ALPACA,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_format_is_recognised_and_the_same_conversation_is_the_same(name: str) -> None:
    reader = formats()
    assert list(reader.turns(record({"id": 1, **NAMES[name], "source": None}))) == src_tgt(SRC)
    assert reader.name == name


def test_absent_columns_of_a_table_are_no_second_format() -> None:
    assert turns_of({"src": None, "tgt": None, **MESSAGES}) == src_tgt(SRC)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", NAMES)
def test_a_data_set_is_in_one_format(name: str, other: str) -> None:
    reader = formats()
    reader.turns(record(NAMES[name], 1))
    if name == other:
        reader.turns(record(NAMES[other], 2))
        return
    with pytest.raises(sft.UsageError) as caught:
        reader.turns(record(NAMES[other], 2))
    assert str(caught.value) == (
        f"data/train.json, line 2: this record is {other}, and data/train.json, line 1 is {name}; keep the records of "
        "one format in a data set."
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "the record is in no known format (its keys: none); known are src/tgt, messages (role/content), Share"),
        ({"words": "a"}, "the record is in no known format (its keys: words); known are"),
        ({"text": "a", "src": "b"}, 'the record has no "tgt" (its keys: text, src); each needs "src" and "tgt".'),
        ({"text": ""}, '"text" is empty, so nothing can be learned from it.'),
        ({**SRC, **MESSAGES}, "the record could be src/tgt or messages (role/content) (its keys: src, tgt, messages)"),
        ({"instruction": "a", "tgt": "b"}, "the record could be src/tgt or Alpaca (instruction/input/output) (its"),
        ({"instruction": "a"}, 'the record has no "output" (its keys: instruction); each needs "instruction" and "out'),
        ({"instruction": None, "output": "b"}, 'the record has no "instruction" (its keys: instruction, output)'),
        ({"messages": None}, '"messages" must be a list of at least one message, not None.'),
    ],
)
def test_records_of_no_or_several_formats(value: dict[str, Any], message: str) -> None:
    assert refusal(value).startswith(message)


# --- records that weigh -------------------------------------------------------------------------------------

RECORDS: list[dict[str, Any]] = [
    {"src": "a", "tgt": "b"},
    {"instruction": "a", "output": "b"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 2}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
]


@pytest.mark.parametrize(
    ("weight", "expected"), [(None, 1), (1, 1), (0.25, 0.25), (7, 7), ("0.5", 0.5), (" 2 ", 2), ("", 1)], ids=repr
)
@pytest.mark.parametrize("value", RECORDS, ids=lambda value: next(iter(value)))
def test_a_record_may_count_more_or_less_than_others(value: dict[str, Any], weight: Any, expected: float) -> None:
    """Text is what a CSV file has."""
    plain, found = (formats().turns(record(one)) for one in (value, {**value, "weight": weight}))
    assert found == plain  # its turns
    assert (plain.weight, found.weight) == (1, expected)


@pytest.mark.parametrize("weight", [-1, True, float("nan"), float("inf"), 1e-7, 1e7, "heavy", "nan", [1]], ids=repr)
@pytest.mark.parametrize("value", RECORDS, ids=lambda value: next(iter(value)))
def test_a_weight_that_is_none(value: dict[str, Any], weight: Any) -> None:
    shown = float(weight) if weight == "nan" else weight
    assert refusal({**value, "weight": weight}) == (
        f'the record has the weight {shown!r}; "weight" must be 0, or a number from 0.000001 to 1,000,000.'
    )


def test_a_record_of_weight_0_teaches_nothing() -> None:
    value = {"src": "a", "tgt": "b", "weight": 0}
    assert refusal(value) == "the record has the weight 0, so nothing can be learned from it; take it out."
    assert len(formats().turns(record(value), needs_target=False)) == 2  # as a question it is as good as any


# --- formats of plugins -------------------------------------------------------------------------------------


class Dialogue(sft.Plugin):
    """Knows ``{"dialogue": [...]}``, and takes ``{"src", "tgt", "swap"}`` from the core."""

    name = "dialogue"
    api_version = 1

    @sft.hookimpl
    def sft_record_format(self, record: dict[str, Any]) -> list[Turn] | None:
        if record.get("swap"):
            return [Turn("user", record["tgt"]), Turn("assistant", record["src"], trains=True)]
        if "dialogue" not in record:
            return None
        if not record["dialogue"]:
            raise ValueError("the dialogue is empty.")
        return [Turn("assistant" if i % 2 else "user", text, bool(i % 2)) for i, text in enumerate(record["dialogue"])]


class Second(sft.Plugin):
    name = "second"
    api_version = 1

    @sft.hookimpl
    def sft_record_format(self, record: dict[str, Any]) -> list[Turn] | None:
        return [Turn("assistant", "second", trains=True)] if "second" in record else None


def test_a_plugin_adds_a_format() -> None:
    assert turns_of({"dialogue": ["a", "1"]}, Dialogue) == src_tgt({"src": "a", "tgt": "1"})
    assert refusal({"dialogue": ["a", "1"]}).startswith("the record is in no known format (its keys: dialogue); known")


def test_a_plugin_is_asked_before_the_core() -> None:
    value = {"src": "a", "tgt": "1", "swap": True}
    assert turns_of(value, Dialogue) == src_tgt({"src": "1", "tgt": "a"})


def test_what_no_plugin_knows_is_the_cores() -> None:
    assert turns_of({"src": "a", "tgt": "1"}, Dialogue, Second) == src_tgt({"src": "a", "tgt": "1"})


def test_the_first_plugin_that_knows_it_decides() -> None:
    value = {"dialogue": ["a", "1"], "second": True}
    assert turns_of(value, Dialogue, Second)[0].content == "a"
    assert turns_of(value, Second, Dialogue)[0].content == "second"


def test_a_plugins_complaint_gets_file_and_line() -> None:
    assert refusal({"dialogue": []}, Dialogue) == "the dialogue is empty."


class Weighing(sft.Plugin):
    name = "weighing"
    api_version = 1

    @sft.hookimpl
    def sft_record_format(self, record: dict[str, Any]) -> list[Turn] | None:
        return [Turn("user", "a"), Turn("assistant", "b", True, record["weight"])]


def test_turns_of_a_plugin_may_weigh_and_its_records_keep_their_keys() -> None:
    found = formats(Weighing).turns(record({"weight": 0.5}))
    assert ([turn.weight for turn in found], found.weight) == ([1, 0.5], 1)
    assert refusal({"weight": -2}, Weighing).startswith("turn 2 has the weight -2; ")
    assert refusal({"weight": 0}, Weighing).startswith("turn 2 trains and has the weight 0; ")


class WeighingAsAWhole(sft.Plugin):
    name = "weighing-as-a-whole"
    api_version = 1

    @sft.hookimpl
    def sft_record_format(self, record: dict[str, Any]) -> list[Turn] | None:
        return sft.Conversation([Turn("user", "a"), Turn("assistant", "b", True)], weight=record["count"])


def test_a_conversation_of_a_plugin_may_weigh() -> None:
    assert formats(WeighingAsAWhole).turns(record({"count": 3})).weight == 3
    assert refusal({"count": -2}, WeighingAsAWhole).startswith("the record has the weight -2; ")
    assert refusal({"count": 0}, WeighingAsAWhole).startswith("the record has the weight 0, so nothing can be")


def test_a_plugins_format_has_its_name() -> None:
    reader = formats(Dialogue, Second)
    reader.turns(record({"dialogue": ["a", "1"]}, 1))
    assert reader.name == "the format of plugin dialogue"
    reader.turns(record({"src": "a", "tgt": "1", "swap": True}, 2))
    with pytest.raises(sft.UsageError, match=r"line 3: this record is the format of plugin second, and .*, line 1 is "):
        reader.turns(record({"second": 1}, 3))
    with pytest.raises(
        sft.UsageError, match=r"line 4: this record is src/tgt, and .*, line 1 is the format of plugin d"
    ):
        reader.turns(record({"src": "a", "tgt": "1"}, 4))


# --- questions, of which no answer is needed ----------------------------------------------------------------

ASKED = [Turn("user", "a"), Turn("assistant", "b", trains=True), Turn("user", "c")]
TALK = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]


@pytest.mark.parametrize(
    ("value", "turns"),
    [
        ({"src": "c"}, ASKED[2:]),
        ({"src": ["c"], "tgt": None}, ASKED[2:]),
        ({"src": ["a", "c"], "tgt": ["b"], "context": {"system": "s"}}, [Turn("system", "s"), *ASKED]),
        ({"conversations": TALK}, ASKED),
        ({"messages": TALK, "prompt": "a"}, ASKED),
        ({"instruction": "c", "history": [["a", "b"]]}, ASKED),
        ({"prompt": "c", "completion": "d", "id": 3}, ASKED[2:]),
        (SRC, src_tgt(SRC)),
    ],
)
def test_a_question_is_a_record_where_no_target_is_needed(value: dict[str, Any], turns: list[Turn]) -> None:
    assert list(formats().turns(record(value), needs_target=False)) == turns
    if not turns[-1].trains and "messages" not in value and "conversations" not in value:
        refusal(value)


def test_a_text_beside_a_prompt_is_no_document() -> None:
    found = formats().turns(record({"prompt": "c", "text": "d"}), needs_target=False)
    assert list(found) == [Turn("user", "c")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"src": ["a", "b", "c"], "tgt": ["1"]}, '"src" and "tgt" must have as many turns; they have 3 and 1.'),
        ({"src": "a", "tgt": ["1", "2"]}, '"src" and "tgt" must have as many turns; they have 1 and 2.'),
        ({"tgt": "a"}, 'the record has no "src"'),
        ({"prompt": 3}, '"prompt" must be text, not 3.'),
        ({"messages": [{"role": "nobody", "content": "a"}]}, "message 1 of \"messages\" has the role 'nobody'; known"),
        ({"messages": [{"role": "system", "content": "a"}]}, "no turn of this record is a target"),
    ],
)
def test_wrong_questions(value: dict[str, Any], message: str) -> None:
    with pytest.raises(sft.UsageError) as caught:
        formats().turns(record(value), needs_target=False)
    assert str(caught.value).removeprefix("data/train.json, line 18: ").startswith(message)


def test_a_plugin_is_asked_for_questions_first() -> None:
    reader = formats(Dialogue)
    assert list(reader.turns(record({"dialogue": ["a"], "prompt": "b"}), needs_target=False)) == [Turn("user", "a")]
    assert reader.name == "the format of plugin dialogue"


def test_what_stands_before_the_last_answer_that_is_learned() -> None:
    turns = Conversation([*ASKED, Turn("assistant", "d", trains=True), Turn("user", "e"), Turn("assistant", "f")])
    assert before_last_answer(turns) == (ASKED, Turn("assistant", "d", trains=True))


def test_a_record_without_a_target() -> None:
    message = refusal({"dialogue": ["only a question"]}, Dialogue)
    assert message == "no turn of this record is a target, so nothing can be learned from it."


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "b"}]},
        {"instruction": "a", "output": "b"},
        {"src": "a", "tgt": "b"},
    ],
)
def test_a_record_with_images_is_refused(value: dict[str, Any]) -> None:
    assert turns_of({**value, "images": []})
    text = refusal({**value, "images": ["a.png"]})
    assert text.endswith('the record has "images", and a model reads text here; take the record out, or "images".')

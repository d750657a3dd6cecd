"""Formats: from a record to the turns of a conversation, plugins first, and what a wrong record is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sft
from sft import Turn
from sft.data.formats import src_tgt, turns_of
from sft.data.sources import Record
from sft.plugins import Plugins


def hook(*plugins: type) -> Any:
    active = Plugins.load([], plugins)
    active.start({})
    return active.hook


def record(value: dict[str, Any]) -> Record:
    return Record(value, Path("data/train.json"), 18)


def refusal(value: dict[str, Any], *plugins: type) -> str:
    with pytest.raises(sft.UsageError) as caught:
        turns_of(record(value), hook(*plugins))
    message = str(caught.value)
    assert message.startswith("data/train.json, line 18: ")
    return message.removeprefix("data/train.json, line 18: ")


# --- src and tgt --------------------------------------------------------------------------------------------


def test_texts_are_one_question_and_one_answer() -> None:
    assert turns_of(record({"src": "Hi", "tgt": "Hello"}), hook()) == [
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
        ({"instruction": "a", "tgt": "b"}, 'the record has no "src" (its keys: instruction, tgt); each needs'),
        ({}, 'the record has no "src" (its keys: none); each needs "src" and "tgt".'),
        ({"src": ["a", "b"], "tgt": ["1"]}, '"src" has 2 turns and "tgt" has 1; they must be as many.'),
        ({"src": "a", "tgt": ["1", "2"]}, '"src" has 1 turns and "tgt" has 2; they must be as many.'),
        ({"src": "a", "tgt": ""}, '"tgt" is empty; remove the record or give it an answer.'),
        ({"src": "a", "tgt": " \n"}, '"tgt" is empty; remove the record or give it an answer.'),
        ({"src": ["a", "b"], "tgt": ["1", ""]}, '"tgt" is empty; remove the record or give it an answer.'),
        ({"src": 3, "tgt": "b"}, '"src" must be text or a list of texts, not 3.'),
        ({"src": "a", "tgt": None}, '"tgt" must be text or a list of texts, not None.'),
        ({"src": [], "tgt": []}, '"src" must be text or a list of texts, not [].'),
        ({"src": ["a", 1], "tgt": ["1", "2"]}, "\"src\" must be text or a list of texts, not ['a', 1]."),
        ({"src": {"a": "b"}, "tgt": "b"}, "\"src\" must be text or a list of texts, not {'a': 'b'}."),
    ],
)
def test_wrong_records(value: dict[str, Any], message: str) -> None:
    assert refusal(value).startswith(message)


# --- formats of plugins -------------------------------------------------------------------------------------


class Dialogue(sft.Plugin):
    """Knows ``{"dialogue": [...]}``, and takes ``{"src", "tgt", "swap"}`` from the core."""

    name = "dialogue"

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

    @sft.hookimpl
    def sft_record_format(self, record: dict[str, Any]) -> list[Turn] | None:
        return [Turn("assistant", "second", trains=True)] if "second" in record else None


def test_a_plugin_adds_a_format() -> None:
    assert turns_of(record({"dialogue": ["a", "1"]}), hook(Dialogue)) == src_tgt({"src": "a", "tgt": "1"})
    assert refusal({"dialogue": ["a", "1"]}).startswith('the record has no "src"')


def test_a_plugin_is_asked_before_the_core() -> None:
    value = {"src": "a", "tgt": "1", "swap": True}
    assert turns_of(record(value), hook(Dialogue)) == src_tgt({"src": "1", "tgt": "a"})


def test_what_no_plugin_knows_is_the_cores() -> None:
    assert turns_of(record({"src": "a", "tgt": "1"}), hook(Dialogue, Second)) == src_tgt({"src": "a", "tgt": "1"})


def test_the_first_plugin_that_knows_it_decides() -> None:
    value = {"dialogue": ["a", "1"], "second": True}
    assert turns_of(record(value), hook(Dialogue, Second))[0].content == "a"
    assert turns_of(record(value), hook(Second, Dialogue))[0].content == "second"


def test_a_plugins_complaint_gets_file_and_line() -> None:
    assert refusal({"dialogue": []}, Dialogue) == "the dialogue is empty."


def test_a_record_without_a_target() -> None:
    message = refusal({"dialogue": ["only a question"]}, Dialogue)
    assert message == "no turn of this record is a target, so nothing can be learned from it."

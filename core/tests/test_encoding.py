"""Encoding with a chat template: what the model reads, on which tokens it is trained, and the data set of it.

``test_encoding_plain.py`` has conversations without a template and BOS, ``test_encoding_lengths.py`` the two limits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conversations import EOS, LONG, TokenizerWith, answered, one, targets_of, tokens_of

from sft import Turn
from sft.data.encoded import Encoded
from sft.data.encoding import encode
from sft.data.questions import encode_prompt
from sft.data.tokenizer import Tokenizer

CHAT_FOLDERS = ("llama-tied-gqa", "llama3-scaled", "qwen2-untied")


# --- labels -------------------------------------------------------------------------------------------------


def test_labels_are_shifted_once() -> None:
    ids = np.array([10, 11, 12, 13, 14, 20, 21, 22], np.int32)
    trained = np.array([False, False, True, True, False, False, True, True])
    encoded = Encoded(ids, trained, np.array([0, 5, 8]))
    assert len(encoded) == 2
    assert encoded[0].input_ids.tolist() == [10, 11, 12, 13]
    assert encoded[0].labels.tolist() == [-100, 12, 13, -100]
    assert encoded[1].input_ids.tolist() == [20, 21]
    assert encoded[1].labels.tolist() == [21, 22]
    assert encoded.lengths.tolist() == [4, 2]
    assert {encoded[0].input_ids.dtype, encoded[0].labels.dtype} == {np.dtype(np.int64)}


def test_a_first_token_cannot_be_a_target() -> None:
    encoded = Encoded(np.array([10, 11], np.int32), np.array([True, True]), np.array([0, 2]))
    assert encoded[0].labels.tolist() == [11]


# --- with a chat template -----------------------------------------------------------------------------------


def after_headers(ids: Sequence[int], header: Sequence[int], end: int) -> list[bool]:
    """Which ids stand after ``header`` up to and with the next ``end``."""
    marks, inside = [], False
    for index, token in enumerate(ids):
        marks.append(inside)
        if token == end:
            inside = False
        elif list(ids[index + 1 - len(header) : index + 1]) == list(header):
            inside = True
    return marks


@pytest.mark.parametrize("folder", CHAT_FOLDERS)
@pytest.mark.parametrize("name", ["multi", "system", "leading-newline"])
def test_rows_are_the_references_with_the_answers_as_targets(models: Path, folder: str, name: str) -> None:
    cases = json.loads((models / folder / "chat_reference.json").read_text(encoding="utf-8"))
    (case,) = (case for case in cases if case["name"] == name)
    tokenizer = Tokenizer(models / folder)
    end = tokenizer.eos_ids[0]
    # What the template adds to be answered is how each answer begins.
    header = case["ids_generation"][len(case["ids"]) :]
    ids = case["ids"][: len(case["ids"]) - case["ids"][::-1].index(end)]
    marks = after_headers(ids, header, end)

    turns = [Turn(m["role"], m["content"], m["role"] == "assistant") for m in case["messages"]]
    encoded = one(turns, tokenizer)

    assert encoded[0].input_ids.tolist() == ids[:-1]
    expected = [token if mark else -100 for token, mark in zip(ids, marks, strict=True)]
    assert encoded[0].labels.tolist() == expected[1:]
    # Read as text: the answers as the template writes them (Llama 3's trims them), each with its end of turn.
    written = [m["content"].strip() if folder == "llama3-scaled" else m["content"] for m in case["messages"]]
    answers = [text for text, turn in zip(written, turns, strict=True) if turn.trains]
    assert tokenizer.decode(targets_of(encoded)) == "".join(text + tokenizer.eos_token for text in answers)


@pytest.mark.parametrize("folder", CHAT_FOLDERS)
def test_a_prompt_is_what_transformers_makes(models: Path, folder: str) -> None:
    tokenizer = Tokenizer(models / folder)
    for case in json.loads((models / folder / "chat_reference.json").read_text(encoding="utf-8")):
        turns = [Turn(m["role"], m["content"]) for m in case["messages"]]
        assert encode_prompt(turns, tokenizer) == case["ids_generation"], case["name"]


@pytest.mark.parametrize("folder", CHAT_FOLDERS)
@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("answer", ["day", "\n\nThe day", " the day", "你好"])
def test_training_shows_before_an_answer_what_generation_starts_from(
    tokenizer_with: TokenizerWith, folder: str, template: bool, answer: str
) -> None:
    tokenizer = tokenizer_with(folder) if template else tokenizer_with(folder, template=None)
    turns = answered("Hello, how are you to", "First.", "What is the", answer)
    prompt = encode_prompt(turns[:3], tokenizer)
    encoded = one(turns, tokenizer)
    assert tokens_of(encoded)[: len(prompt)] == prompt
    assert encoded[0].labels[len(prompt) - 1] != -100
    assert encoded[0].labels[len(prompt) - 2] == -100


def test_only_turns_that_train_are_targets(models: Path) -> None:
    tokenizer = Tokenizer(models / "llama-tied-gqa")
    turns = [Turn("user", "a"), Turn("assistant", "no"), Turn("user", "b"), Turn("assistant", "yes", trains=True)]
    assert tokenizer.decode(targets_of(one(turns, tokenizer))) == "yes<|im_end|>"


def test_what_follows_the_last_answer_is_left_out(models: Path) -> None:
    tokenizer = Tokenizer(models / "llama-tied-gqa")
    turns = answered("a", "1", "b")
    assert tokens_of(one(turns, tokenizer)) == tokens_of(one(turns[:2], tokenizer))
    assert tokens_of(one(turns, tokenizer))[-1] == EOS


def test_an_answer_that_also_stands_in_the_prompt(models: Path) -> None:
    tokenizer = Tokenizer(models / "llama-tied-gqa")
    encoded = one(answered("say 42, only 42", "42"), tokenizer)
    assert targets_of(encoded) == [19, 17, EOS]  # "4", "2"
    assert encoded[0].labels[-3:].tolist() == [19, 17, EOS]


def test_trap_the_end_token_is_a_target_even_if_it_pads(tokenizer_with: TokenizerWith) -> None:
    tokenizer = tokenizer_with("llama-tied-gqa", pad_token="<|im_end|>")
    assert tokenizer.pad_id == EOS
    assert targets_of(one(answered("a", "42"), tokenizer)) == [19, 17, EOS]


HISTORY_CUTTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_rewritten_answers_are_counted_as_they_are_at_last(tokenizer_with: TokenizerWith) -> None:
    tokenizer = tokenizer_with("llama-tied-gqa", template=HISTORY_CUTTING)
    talk = answered("a", "<think>b</think>c", "d", "<think>e</think>f", "g", "h")
    assert one(talk, tokenizer).counts.answers_rewritten_by_template == 2
    shorter = one(talk, tokenizer, max_length=len(tokens_of(one(talk[2:], tokenizer))))
    assert shorter.counts.turns_dropped == 2
    assert shorter.counts.answers_rewritten_by_template == 1
    assert tokenizer.decode(targets_of(shorter)) == "h<|im_end|>"


WITHOUT_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_without_an_end_of_turn_gets_end_of_text(tokenizer_with: TokenizerWith) -> None:
    tokenizer = tokenizer_with("llama-tied-gqa", template=WITHOUT_END)
    encoded = one(answered("a", "b", "c", "d"), tokenizer)
    assert tokenizer.decode(tokens_of(encoded)) == "user: a\nassistant: b\nuser: c\nassistant: d\n<|im_end|>"
    assert tokenizer.decode(targets_of(encoded)) == "b\nd\n<|im_end|>"


# --- the data set -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 5])
def test_records_are_encoded_the_same_in_groups_of_any_size(models: Path, group: int) -> None:
    tokenizer = Tokenizer(models / "llama-tied-gqa")
    conversations = [answered("a" * number, "b" * number) for number in range(1, 6)]
    encoded = encode(conversations, tokenizer, LONG, LONG, group=group)
    assert [tokens_of(encoded, index) for index in range(5)] == [tokens_of(one(c, tokenizer)) for c in conversations]


def test_counts_are_sums_over_the_records(models: Path) -> None:
    tokenizer = Tokenizer(models / "llama-tied-gqa")
    encoded = encode((answered("a", "b" * number) for number in range(1, 6)), tokenizer, LONG, LONG)
    assert encoded.counts.tokens == sum(len(encoded[index].input_ids) for index in range(5))
    assert encoded.counts.target_tokens == sum(len(targets_of(encoded, index)) for index in range(5))
    assert encoded.report()["records"] == 5


def test_the_fingerprint_knows_tokens_targets_and_order(models: Path) -> None:
    tokenizer = Tokenizer(models / "llama-tied-gqa")
    one_way, other_way = answered("a", "b"), answered("c", "d")
    first = encode([one_way, other_way], tokenizer, LONG, LONG).fingerprint()
    assert first == encode([one_way, other_way], tokenizer, LONG, LONG).fingerprint()
    prints = [
        first,
        encode([other_way, one_way], tokenizer, LONG, LONG).fingerprint(),
        encode([one_way, answered("c", "e")], tokenizer, LONG, LONG).fingerprint(),
        encode([one_way], tokenizer, LONG, LONG).fingerprint(),
    ]
    same_tokens = Encoded(np.array([1, 2, 3]), np.array([False, True, True]), np.array([0, 3]))
    other_targets = Encoded(np.array([1, 2, 3]), np.array([False, False, True]), np.array([0, 3]))
    prints += [same_tokens.fingerprint(), other_targets.fingerprint()]
    assert len(set(prints)) == len(prints)

"""Encoding without a chat template, and one BOS with and without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from conversations import EOS, TokenizerWith, answered, one, targets_of, texts, tokens_of

from sft.data.questions import encode_prompt

# --- without a chat template --------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "bos"), [("llama-tied-gqa", []), ("llama3-scaled", [315])])
def test_without_a_template_source_target_and_end_follow_each_other(
    models: Path, tokenizer_with: TokenizerWith, folder: str, bos: list[int]
) -> None:
    tokenizer = tokenizer_with(folder, template=None)
    (source, source_ids), (target, target_ids) = texts(models, folder)[0], texts(models, folder)[2]
    encoded = one(answered(source, target), tokenizer)
    assert tokens_of(encoded) == [*bos, *source_ids, *target_ids, EOS]
    assert targets_of(encoded) == [*target_ids, EOS]
    assert encode_prompt(answered(source), tokenizer) == [*bos, *source_ids]


def test_without_a_template_each_answer_ends(models: Path, tokenizer_with: TokenizerWith) -> None:
    tokenizer = tokenizer_with("llama-tied-gqa", template=None)
    (a, a_ids), (b, b_ids), (c, c_ids), (d, d_ids) = (texts(models)[index] for index in (0, 2, 3, 7))
    encoded = one(answered(a, b, c, d), tokenizer)
    assert tokens_of(encoded) == [*a_ids, *b_ids, EOS, *c_ids, *d_ids, EOS]
    assert targets_of(encoded) == [*b_ids, EOS, *d_ids, EOS]
    assert encode_prompt(answered(a, b, c), tokenizer) == [*a_ids, *b_ids, EOS, *c_ids]


def test_without_a_template_source_and_target_are_tokenised_apart(tokenizer_with: TokenizerWith) -> None:
    tokenizer = tokenizer_with("llama-tied-gqa", template=None)
    assert tokenizer.encode("the") == [83, 258]  # t, he
    encoded = one(answered("th", "e"), tokenizer)
    assert tokens_of(encoded) == [83, 71, 68, EOS]  # t, h | e
    assert targets_of(encoded) == [68, EOS]


def test_without_a_template_too_what_follows_the_last_answer_is_left_out(tokenizer_with: TokenizerWith) -> None:
    tokenizer = tokenizer_with("llama-tied-gqa", template=None)
    assert tokens_of(one(answered("a", "1", "b"), tokenizer)) == tokens_of(one(answered("a", "1"), tokenizer))


def test_a_system_turn_stands_before_the_source(tokenizer_with: TokenizerWith) -> None:
    tokenizer = tokenizer_with("llama-tied-gqa", template=None)
    encoded = one(answered("a", "b", system="s"), tokenizer)
    assert tokenizer.decode(tokens_of(encoded)) == "sab<|im_end|>"
    assert tokenizer.decode(targets_of(encoded)) == "b<|im_end|>"


# --- BOS ----------------------------------------------------------------------------------------------------

LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.mark.parametrize(
    ("tokenizer_adds", "template", "expected"),
    [
        (True, "{{ bos_token }}" + LLAMA3, 1),
        (True, LLAMA3, 1),
        (False, "{{ bos_token }}" + LLAMA3, 1),
        (False, "{{ bos_token }}{{ bos_token }}" + LLAMA3, 1),
        (False, LLAMA3, 0),
        (True, None, 1),
        (False, None, 0),
    ],
)
def test_trap_one_bos_where_there_is_one(
    tokenizer_with: TokenizerWith, tokenizer_adds: bool, template: str | None, expected: int
) -> None:
    tokenizer = tokenizer_with("llama3-scaled", template=template, adds_bos=tokenizer_adds)
    turns = answered("Hi", "Hello!", "And", "you?")
    encoded = one(turns, tokenizer)
    for ids in (tokens_of(encoded), encode_prompt(turns[:3], tokenizer)):
        assert ids.count(315) == expected
        assert ids[:expected] == [315] * expected
    assert tokenizer.decode(targets_of(encoded)) == "Hello!<|eot_id|>you?<|eot_id|>"

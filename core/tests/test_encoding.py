"""Encoding: what the model reads, on which tokens it is trained, and what the two length limits leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft import Turn
from sft.data.encoding import Counts, Encoded, encode, encode_prompt
from sft.data.tokenizer import Tokenizer

CHAT_FOLDERS = ("llama-tied-gqa", "llama3-scaled", "qwen2-untied")
EOS = 319  # <|im_end|> of llama-tied-gqa, <|eot_id|> of llama3-scaled
LONG = 10**6
Variant = Callable[..., Tokenizer]


@pytest.fixture
def variant(models: Path, tmp_path: Path) -> Variant:
    """A model directory's tokenizer with another chat template (None: none), pad token, or no BOS of its own."""

    def make(folder: str, template: Any = ..., adds_bos: bool = True, **config: Any) -> Tokenizer:
        copy = tmp_path / f"{folder}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(models / folder, copy, ignore=shutil.ignore_patterns("*.safetensors", "*reference*"))
        declared = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
        if template is not ...:
            (copy / "chat_template.jinja").unlink(missing_ok=True)
            declared["chat_template"] = template
        (copy / "tokenizer_config.json").write_text(json.dumps({**declared, **config}), encoding="utf-8")
        if not adds_bos:
            stored = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
            stored["post_processor"] = stored["post_processor"]["processors"][0]
            (copy / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
        return Tokenizer(copy)

    return make


def answered(*pairs: str, system: str | None = None) -> list[Turn]:
    """A conversation of questions and answers, all answers training."""
    turns = [Turn("system", system)] if system is not None else []
    for index, text in enumerate(pairs):
        turns.append(Turn("assistant", text, trains=True) if index % 2 else Turn("user", text))
    return turns


def tokens_of(encoded: Encoded, index: int = 0) -> list[int]:
    """All tokens of a record, the last of which is only ever a label."""
    return encoded.ids[encoded.offsets[index] : encoded.offsets[index + 1]].tolist()


def targets_of(encoded: Encoded, index: int = 0) -> list[int]:
    labels = encoded[index].labels
    return labels[labels != -100].tolist()


def one(turns: list[Turn], tokenizer: Tokenizer, src_length: int = LONG, max_length: int = LONG) -> Encoded:
    return encode([turns], tokenizer, src_length, max_length)


def texts(models: Path, folder: str = "llama-tied-gqa") -> list[tuple[str, list[int]]]:
    """Texts and their ids by transformers."""
    cases = json.loads((models / folder / "tokenizer_reference.json").read_text(encoding="utf-8"))
    return [(case["text"], case["ids"]) for case in cases]


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
    variant: Variant, folder: str, template: bool, answer: str
) -> None:
    tokenizer = variant(folder) if template else variant(folder, template=None)
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


def test_trap_the_end_token_is_a_target_even_if_it_pads(variant: Variant) -> None:
    tokenizer = variant("llama-tied-gqa", pad_token="<|im_end|>")
    assert tokenizer.pad_id == EOS
    assert targets_of(one(answered("a", "42"), tokenizer)) == [19, 17, EOS]


HISTORY_CUTTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_rewritten_answers_are_counted_as_they_are_at_last(variant: Variant) -> None:
    tokenizer = variant("llama-tied-gqa", template=HISTORY_CUTTING)
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


def test_a_template_without_an_end_of_turn_gets_end_of_text(variant: Variant) -> None:
    tokenizer = variant("llama-tied-gqa", template=WITHOUT_END)
    encoded = one(answered("a", "b", "c", "d"), tokenizer)
    assert tokenizer.decode(tokens_of(encoded)) == "user: a\nassistant: b\nuser: c\nassistant: d\n<|im_end|>"
    assert tokenizer.decode(targets_of(encoded)) == "b\nd\n<|im_end|>"


# --- without a chat template --------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "bos"), [("llama-tied-gqa", []), ("llama3-scaled", [315])])
def test_without_a_template_source_target_and_end_follow_each_other(
    models: Path, variant: Variant, folder: str, bos: list[int]
) -> None:
    tokenizer = variant(folder, template=None)
    (source, source_ids), (target, target_ids) = texts(models, folder)[0], texts(models, folder)[2]
    encoded = one(answered(source, target), tokenizer)
    assert tokens_of(encoded) == [*bos, *source_ids, *target_ids, EOS]
    assert targets_of(encoded) == [*target_ids, EOS]
    assert encode_prompt(answered(source), tokenizer) == [*bos, *source_ids]


def test_without_a_template_each_answer_ends(models: Path, variant: Variant) -> None:
    tokenizer = variant("llama-tied-gqa", template=None)
    (a, a_ids), (b, b_ids), (c, c_ids), (d, d_ids) = (texts(models)[index] for index in (0, 2, 3, 7))
    encoded = one(answered(a, b, c, d), tokenizer)
    assert tokens_of(encoded) == [*a_ids, *b_ids, EOS, *c_ids, *d_ids, EOS]
    assert targets_of(encoded) == [*b_ids, EOS, *d_ids, EOS]
    assert encode_prompt(answered(a, b, c), tokenizer) == [*a_ids, *b_ids, EOS, *c_ids]


def test_without_a_template_source_and_target_are_tokenised_apart(variant: Variant) -> None:
    tokenizer = variant("llama-tied-gqa", template=None)
    assert tokenizer.encode("the") == [83, 258]  # t, he
    encoded = one(answered("th", "e"), tokenizer)
    assert tokens_of(encoded) == [83, 71, 68, EOS]  # t, h | e
    assert targets_of(encoded) == [68, EOS]


def test_without_a_template_too_what_follows_the_last_answer_is_left_out(variant: Variant) -> None:
    tokenizer = variant("llama-tied-gqa", template=None)
    assert tokens_of(one(answered("a", "1", "b"), tokenizer)) == tokens_of(one(answered("a", "1"), tokenizer))


def test_a_system_turn_stands_before_the_source(variant: Variant) -> None:
    tokenizer = variant("llama-tied-gqa", template=None)
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
def test_one_bos_where_there_is_one(
    variant: Variant, tokenizer_adds: bool, template: str | None, expected: int
) -> None:
    tokenizer = variant("llama3-scaled", template=template, adds_bos=tokenizer_adds)
    turns = answered("Hi", "Hello!", "And", "you?")
    encoded = one(turns, tokenizer)
    for ids in (tokens_of(encoded), encode_prompt(turns[:3], tokenizer)):
        assert ids.count(315) == expected
        assert ids[:expected] == [315] * expected
    assert tokenizer.decode(targets_of(encoded)) == "Hello!<|eot_id|>you?<|eot_id|>"


# --- src_length and max_length ------------------------------------------------------------------------------

SOURCE = "Hello, how are you today?"  # 19 tokens in llama-tied-gqa and in llama3-scaled
TARGET = "\n\n\n\n"  # 4 tokens, and the end


@pytest.fixture
def plain(variant: Variant) -> Tokenizer:
    return variant("llama-tied-gqa", template=None)


def test_nothing_is_cut_that_just_fits(models: Path, plain: Tokenizer) -> None:
    source_ids = texts(models)[0][1]
    assert len(source_ids) == 19
    encoded = one(answered(SOURCE, TARGET), plain, src_length=19, max_length=24)
    assert tokens_of(encoded) == [*source_ids, 198, 198, 198, 198, EOS]
    assert encoded.counts == Counts(records=1, tokens=23, target_tokens=5)


def test_src_length_cuts_the_beginning_of_the_prompt(models: Path, plain: Tokenizer) -> None:
    source_ids = texts(models)[0][1]
    encoded = one(answered(SOURCE, TARGET), plain, src_length=6)
    assert tokens_of(encoded) == [*source_ids[-6:], 198, 198, 198, 198, EOS]
    assert encoded.counts == Counts(records=1, prompts_truncated=1, tokens=10, target_tokens=5)


def test_src_length_keeps_bos(models: Path, variant: Variant) -> None:
    tokenizer = variant("llama3-scaled", template=None)
    source_ids = texts(models, "llama3-scaled")[0][1]
    encoded = one(answered(SOURCE, TARGET), tokenizer, src_length=6)
    assert tokens_of(encoded)[:6] == [315, *source_ids[-5:]]
    assert targets_of(encoded)[-1] == EOS
    exact = one(answered(SOURCE, TARGET), tokenizer, src_length=20)
    assert tokens_of(exact)[:20] == [315, *source_ids]
    assert exact.counts.prompts_truncated == 0


def test_max_length_cuts_the_end_of_the_answer(models: Path, plain: Tokenizer) -> None:
    source_ids = texts(models)[0][1]
    encoded = one(answered(SOURCE, TARGET), plain, max_length=21)
    assert tokens_of(encoded) == [*source_ids, 198, 198]
    assert encoded.counts == Counts(records=1, targets_truncated=1, tokens=20, target_tokens=2)


def test_both_limits(models: Path, plain: Tokenizer) -> None:
    source_ids = texts(models)[0][1]
    encoded = one(answered(SOURCE, TARGET), plain, src_length=6, max_length=9)
    assert tokens_of(encoded) == [*source_ids[-6:], 198, 198, 198]
    assert encoded.counts == Counts(records=1, prompts_truncated=1, targets_truncated=1, tokens=8, target_tokens=3)


def test_a_record_that_keeps_no_target_is_dropped_and_counted(plain: Tokenizer) -> None:
    fits = answered("a", "b")
    encoded = encode([fits, answered(SOURCE, TARGET), fits], plain, LONG, 19)
    assert len(encoded) == 2
    assert encoded.counts.records == 3
    assert encoded.counts.dropped == 1
    assert encoded.counts.tokens == encoded.lengths.sum() == 4
    assert tokens_of(encoded, 1) == tokens_of(encoded, 0)


def test_a_first_token_alone_is_no_target_to_keep_a_record_for(plain: Tokenizer) -> None:
    assert one(answered("", TARGET), plain, max_length=1).counts.dropped == 1
    assert targets_of(one(answered("", TARGET), plain, max_length=2)) == [198]


def test_when_every_record_is_dropped(plain: Tokenizer) -> None:
    encoded = encode([answered(SOURCE, TARGET)] * 3, plain, LONG, 10)
    assert len(encoded) == 0
    assert encoded.lengths.tolist() == []
    assert encoded.report()["dropped"] == 3


CONVERSATION = answered("first question", "one", "second question", "two", "third question", "three", system="Short.")


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_the_oldest_turns_go_first_and_the_system_turn_stays(variant: Variant, template: bool, dropped: int) -> None:
    tokenizer = variant("llama-tied-gqa") if template else variant("llama-tied-gqa", template=None)
    expected = tokens_of(one([CONVERSATION[0], *CONVERSATION[1 + 2 * dropped :]], tokenizer))
    encoded = one(CONVERSATION, tokenizer, max_length=len(expected))
    assert tokens_of(encoded) == expected
    assert encoded.counts.turns_dropped == 2 * dropped
    assert encoded.counts.records == 1
    assert (encoded.counts.prompts_truncated, encoded.counts.targets_truncated, encoded.counts.dropped) == (0, 0, 0)


def test_the_last_turns_are_cut_when_they_alone_are_too_long(variant: Variant) -> None:
    tokenizer = variant("llama-tied-gqa")
    last = tokens_of(one([CONVERSATION[0], *CONVERSATION[5:]], tokenizer))
    encoded = one(CONVERSATION, tokenizer, max_length=len(last) - 1)
    assert tokens_of(encoded) == last[:-1]
    assert encoded.counts.turns_dropped == 4
    assert encoded.counts.targets_truncated == 1


def test_turns_are_dropped_until_the_prompt_fits_too(variant: Variant) -> None:
    tokenizer = variant("llama-tied-gqa", template=None)
    encoded = one(answered(SOURCE, "one", "b", "two"), tokenizer, src_length=5)
    assert tokens_of(encoded) == tokens_of(one(answered("b", "two"), tokenizer))
    assert encoded.counts.turns_dropped == 2
    assert encoded.counts.prompts_truncated == 0


def test_turns_are_kept_whose_prompt_just_fits(models: Path, plain: Tokenizer) -> None:
    assert len(texts(models)[0][1]) == 19
    encoded = one(answered(SOURCE, "one", "b", "two"), plain, src_length=19)
    assert encoded.counts.turns_dropped == 0
    assert plain.decode(targets_of(encoded)) == "one<|im_end|>two<|im_end|>"


def test_turns_that_hold_the_only_target_are_kept(plain: Tokenizer) -> None:
    turns = [*answered("a", "yes"), Turn("user", SOURCE), Turn("assistant", "no")]
    encoded = one(turns, plain, max_length=8)
    assert plain.decode(targets_of(encoded)) == "yes<|im_end|>"
    assert encoded.counts.turns_dropped == 0


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

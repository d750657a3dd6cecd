"""What src_length and max_length leave of a conversation, in training and of a prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conversations import EOS, LONG, TokenizerWith, answered, one, targets_of, texts, tokens_of

from sft import Turn
from sft.conversations import Conversation
from sft.data.encoded import Counts
from sft.data.encoding import encode
from sft.data.questions import Question, encode_prompt, fitting
from sft.data.tokenizer import Tokenizer

SOURCE = "Hello, how are you today?"  # 19 tokens in llama-tied-gqa and in llama3-scaled
TARGET = "\n\n\n\n"  # 4 tokens, and the end


@pytest.fixture
def plain(tokenizer_with: TokenizerWith) -> Tokenizer:
    return tokenizer_with("llama-tied-gqa", template=None)


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


def test_src_length_keeps_bos(models: Path, tokenizer_with: TokenizerWith) -> None:
    tokenizer = tokenizer_with("llama3-scaled", template=None)
    source_ids = texts(models, "llama3-scaled")[0][1]
    encoded = one(answered(SOURCE, TARGET), tokenizer, src_length=6)
    assert tokens_of(encoded)[:6] == [315, *source_ids[-5:]]
    assert targets_of(encoded)[-1] == EOS
    exact = one(answered(SOURCE, TARGET), tokenizer, src_length=20)
    assert tokens_of(exact)[:20] == [315, *source_ids]
    assert exact.counts.prompts_truncated == 0


def test_max_length_cuts_the_end_of_the_answer(models: Path, plain: Tokenizer) -> None:
    source_ids = texts(models)[0][1]
    encoded = one(answered(SOURCE, TARGET), plain, src_length=20, max_length=21)
    assert tokens_of(encoded) == [*source_ids, 198, 198]
    assert encoded.counts == Counts(records=1, targets_truncated=1, tokens=20, target_tokens=2)


def test_both_limits(models: Path, plain: Tokenizer) -> None:
    source_ids = texts(models)[0][1]
    encoded = one(answered(SOURCE, TARGET), plain, src_length=6, max_length=9)
    assert tokens_of(encoded) == [*source_ids[-6:], 198, 198, 198]
    assert encoded.counts == Counts(records=1, prompts_truncated=1, targets_truncated=1, tokens=8, target_tokens=3)


@pytest.mark.parametrize(
    ("max_length", "prompt", "targets"),
    [(24, 19, 5), (23, 18, 5), (12, 7, 5), (10, 5, 5), (8, 4, 4), (5, 2, 3), (2, 1, 1)],
)
def test_a_prompt_that_may_fill_max_length_leaves_its_answer_room(
    models: Path, plain: Tokenizer, max_length: int, prompt: int, targets: int
) -> None:
    """19 tokens and 5: the answer is whole as long as it is no more than half of max_length, the prompt loses its
    beginning alone, and every token of max_length is used."""
    source_ids = texts(models)[0][1]
    encoded = one(answered(SOURCE, TARGET), plain, src_length=1024, max_length=max_length)
    assert tokens_of(encoded) == [*source_ids[-prompt:], *[198, 198, 198, 198, EOS][:targets]]
    assert encoded.counts == Counts(
        records=1,
        prompts_truncated=int(prompt < 19),
        targets_truncated=int(targets < 5),
        tokens=max_length - 1,
        target_tokens=targets,
    )


def test_a_dropped_record_counts_as_nothing_else(plain: Tokenizer) -> None:
    encoded = encode([answered("a", "b"), answered("", TARGET), answered("a", "b")], plain, LONG, 1)
    assert encoded.counts == Counts(records=3, records_dropped=3)


def test_a_long_conversation_loses_what_a_short_one_loses(tokenizer_with: TokenizerWith) -> None:
    """Against the last turns alone, found one by one; and quickly, though the template writes it all down."""
    turns = [Turn("system", "Short.")]
    for number in range(1000):
        turns += [Turn("user", f"question {number}"), Turn("assistant", f"answer {number}", trains=True)]
    for template in ({}, {"template": None}):
        tokenizer = tokenizer_with("llama-tied-gqa", **template)
        kept = 1
        while len(tokens_of(one([turns[0], *turns[-2 * (kept + 1) :]], tokenizer))) <= 200:
            kept += 1
        found = one(turns, tokenizer, max_length=200)
        assert tokens_of(found) == tokens_of(one([turns[0], *turns[-2 * kept :]], tokenizer))
        assert found.counts.turns_dropped == 2000 - 2 * kept
        asked = fitting([*turns, Turn("user", "?")], tokenizer, 100)
        assert len(encode_prompt(asked, tokenizer)) <= 100
        assert len(encode_prompt([turns[0], *turns[-len(asked) :], Turn("user", "?")], tokenizer)) > 100


def test_a_first_token_alone_is_no_target_to_keep_a_record_for(plain: Tokenizer) -> None:
    assert one(answered("", TARGET), plain, max_length=1).counts.records_dropped == 1
    assert targets_of(one(answered("", TARGET), plain, max_length=2)) == [198]


def test_when_every_record_is_dropped(plain: Tokenizer) -> None:
    encoded = encode([answered("", TARGET)] * 3, plain, LONG, 1)
    assert len(encoded) == 0
    assert encoded.lengths.tolist() == []
    assert encoded.report()["records_dropped"] == 3


CONVERSATION = answered("first question", "one", "second question", "two", "third question", "three", system="Short.")


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_the_oldest_turns_go_first_and_the_system_turn_stays(
    tokenizer_with: TokenizerWith, template: bool, dropped: int
) -> None:
    tokenizer = tokenizer_with("llama-tied-gqa") if template else tokenizer_with("llama-tied-gqa", template=None)
    expected = tokens_of(one([CONVERSATION[0], *CONVERSATION[1 + 2 * dropped :]], tokenizer))
    encoded = one(CONVERSATION, tokenizer, max_length=len(expected))
    assert tokens_of(encoded) == expected
    assert encoded.counts.turns_dropped == 2 * dropped
    assert encoded.counts.records == 1
    assert (encoded.counts.prompts_truncated, encoded.counts.targets_truncated, encoded.counts.records_dropped) == (
        0,
        0,
        0,
    )


def test_the_last_turns_are_cut_when_they_alone_are_too_long(tokenizer_with: TokenizerWith) -> None:
    tokenizer = tokenizer_with("llama-tied-gqa")
    last = tokens_of(one([CONVERSATION[0], *CONVERSATION[5:]], tokenizer))
    encoded = one(CONVERSATION, tokenizer, src_length=len(last) - 2, max_length=len(last) - 1)
    assert tokens_of(encoded) == last[:-1]
    assert encoded.counts.turns_dropped == 4
    assert encoded.counts.targets_truncated == 1


def test_turns_are_dropped_until_the_prompt_fits_too(tokenizer_with: TokenizerWith) -> None:
    tokenizer = tokenizer_with("llama-tied-gqa", template=None)
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


# --- prompts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama-tied-gqa", "llama3-scaled", "qwen2-untied"])
@pytest.mark.parametrize("longest", [12, 17, 40, 1000])
def test_a_prompt_is_shortened_as_training_shortens_it(models: Path, case: str, longest: int) -> None:
    """Against the tokens before the target, which the encoder of training keeps of one question and answer."""
    tokenizer = Tokenizer(models / case)
    for text in ("type#dress*color#red*style#long and warm", "a"):
        turns = Conversation([Turn("user", text), Turn("assistant", "yes", trains=True)])
        found = encode([turns], tokenizer, longest, 2000)
        prompt = found.ids[: int(np.argmax(found.trained))]
        assert Question.of(turns, tokenizer, longest) == Question(prompt.tolist(), text, "yes")


def test_the_oldest_questions_and_answers_go_first(models: Path) -> None:
    tokenizer = Tokenizer(models / "llama-tied-gqa")
    system = Turn("system", "be kind")
    talk = [Turn("user", "one"), Turn("assistant", "1"), Turn("user", "two"), Turn("assistant", "2")]
    turns = [system, *talk, Turn("user", "three")]
    lengths = [len(encode_prompt([system, *rest], tokenizer)) for rest in (turns[1:], turns[3:], turns[5:])]
    assert fitting(turns, tokenizer, lengths[0]) == turns
    assert fitting(turns, tokenizer, lengths[0] - 1) == [system, *turns[3:]]
    assert fitting(turns, tokenizer, lengths[1] - 1) == [system, turns[5]]
    assert fitting(turns, tokenizer, 1) == [system, turns[5]]
    assert fitting(turns[1:], tokenizer, 1) == [turns[5]]

"""What of a conversation is learned: thoughts or not, the last answer or everything, and templates told to think."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_templates import ANSWER, ASKED, PLAIN, TokenizerOf, chosen, learned, of_case, one, read, refused
from conversations import LONG

import sft
from sft import Conversation, Turn
from sft.data.encoded import Counts, Encoded
from sft.data.encoding import encode
from sft.data.learned import Learned
from sft.data.tokenizer import Tokenizer


def counted(encoded: Encoded) -> dict[str, int]:
    """What is counted of it, but for tokens and records."""
    plain = ("tokens", "target_tokens", "records")
    return {name: value for name, value in vars(encoded.counts).items() if value and name not in plain}


# --- thoughts -------------------------------------------------------------------------------------------------

THINK = "<think>\n{}\n</think>\n\n{}<|im_end|>".format


@pytest.mark.parametrize(
    ("thoughts", "texts", "counts"),
    [
        ("all", [THINK("It has no divisors.", "Yes.")], {"thoughts": 1}),
        ("not_empty", [THINK("It has no divisors.", "Yes.")], {"thoughts": 1}),
        ("none", ["Yes.<|im_end|>"], {"thoughts_left_out": 1}),
    ],
)
@pytest.mark.parametrize("place", ["inside", "beside"])
@pytest.mark.parametrize("template", ["qwen3_tools", "qwen25_tools", "chatml_tools_blocks"])
def test_a_thought_is_learned_or_not(
    tokenizer_of: TokenizerOf, template: str, place: str, thoughts: str, texts: list[str], counts: dict[str, int]
) -> None:
    answer = {
        "inside": Turn("assistant", "<think>\nIt has no divisors.\n</think>\n\nYes.", True),
        "beside": Turn("assistant", "Yes.", True, reasoning="It has no divisors."),
    }[place]
    tokenizer = tokenizer_of(template)
    encoded = one([ASKED, answer], tokenizer, "answers", thoughts)
    assert learned(encoded, tokenizer) == texts
    put = {"thoughts_put_before_answer": 1} if template == "qwen25_tools" and place == "beside" else {}
    assert counted(encoded) == {**counts, **put}


@pytest.mark.parametrize(
    ("thoughts", "text", "counts"),
    [
        ("all", THINK("", "b"), {"empty_thoughts": 1}),
        ("not_empty", "b<|im_end|>", {"empty_thoughts_left_out": 1}),
        ("none", "b<|im_end|>", {"empty_thoughts_left_out": 1}),
    ],
)
def test_an_empty_thought_is_learned_or_not(
    tokenizer_of: TokenizerOf, thoughts: str, text: str, counts: dict[str, int]
) -> None:
    tokenizer = tokenizer_of("qwen3_tools")
    encoded = one([ASKED, ANSWER], tokenizer, "answers", thoughts)
    assert learned(encoded, tokenizer) == [text]
    assert counted(encoded) == counts


def test_a_thought_that_is_not_learned_is_no_part_of_the_prompt_that_is_cut(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of("qwen3_tools")
    answer = Turn("assistant", "b", True, reasoning="why " * 50)
    encoded = encode([[ASKED, answer]], tokenizer, 20, LONG, learned=Learned("answers", "none"))
    assert (encoded.counts.prompts_truncated, encoded.counts.turns_dropped) == (0, 0)
    assert "why why" in tokenizer.decode(encoded.ids.tolist())


def test_thoughts_that_the_template_takes_out_are_counted(tokenizer_of: TokenizerOf) -> None:
    case = chosen(template="qwen3_tools", conversation="plain")
    assert counted(one(read(case), of_case(tokenizer_of, case))) == {
        "answers_rewritten_by_template": 1,
        "thoughts": 1,
        "thoughts_removed_by_template": 1,
    }


def test_a_thought_under_another_name_and_between_other_marks(tokenizer_of: TokenizerOf) -> None:
    """As gpt-oss has it: the key is thinking, and a thought that stands in the content is none of the answer."""
    text = PLAIN.replace("{{ m.content }}", "{% if m.thinking %}[{{ m.thinking }}] {% endif %}{{ m.content }}")
    tokenizer = tokenizer_of(text)
    for answer in (Turn("assistant", "b", True, reasoning="c"), Turn("assistant", "<think>\nc\n</think>\n\nb", True)):
        encoded = one([ASKED, answer], tokenizer)
        assert learned(encoded, tokenizer) == ["[c] b<|im_end|>"]
        assert encoded.counts.answers_altered_by_template == 0


def test_the_rest_of_a_thought_that_the_prompt_begins(tokenizer_of: TokenizerOf) -> None:
    text = PLAIN.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    tokenizer = tokenizer_of(text)
    turns = [ASKED, Turn("assistant", "<think>\nc\n</think>\n\nb", True)]
    assert learned(one(turns, tokenizer), tokenizer) == ["c\n</think>\n\nb<|im_end|>"]
    assert learned(one(turns, tokenizer, "answers", "none"), tokenizer) == ["b<|im_end|>"]


# --- enable_thinking --------------------------------------------------------------------------------------------


def test_a_template_is_told_whether_to_think(tokenizer_of: TokenizerOf) -> None:
    off, on = (tokenizer_of("qwen3_tools", enable_thinking=value) for value in (False, True))
    assert off.render([ASKED], add_generation_prompt=True).endswith("assistant\n<think>\n\n</think>\n\n")
    assert on.render([ASKED], add_generation_prompt=True).endswith("assistant\n")
    assert learned(one([ASKED, ANSWER], off), off) == ["b<|im_end|>"]
    case = chosen(template="qwen3_tools", conversation="call")
    tokens = learned(one(read(case), off), off)
    assert [text[:11] for text in tokens] == ["<tool_call>", "Yes.<|im_en"]
    assert off.fingerprint() != on.fingerprint()
    for thinking in (Turn("assistant", "b", True, reasoning="c"), Turn("assistant", "<think>c</think>b", True)):
        said = refused(Conversation([ASKED, thinking]), off, everything=False)
        assert said.startswith("train.json, line 7: enable_thinking is false, so the model is asked for answers withou")


def test_a_template_that_does_not_heed_it_is_refused(tokenizer_of: TokenizerOf, tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match="writes the same whether enable_thinking is true or false; leave it out"):
        tokenizer_of(PLAIN, enable_thinking=False)
    with pytest.raises(sft.UsageError, match="leave it out"):
        Tokenizer(tokenizer_of(PLAIN).folder, chat_template="none", enable_thinking=True)


# --- train_on -----------------------------------------------------------------------------------------------------

TALK = Conversation([ASKED, ANSWER, Turn("user", "c"), Turn("assistant", "d", True), Turn("user", "e")])


@pytest.mark.parametrize("template", ["chatml", "chatml_blocks"])
def test_what_is_learned_of_a_conversation(tokenizer_of: TokenizerOf, template: str) -> None:
    tokenizer = tokenizer_of(template)
    assert learned(one(TALK, tokenizer, "answers"), tokenizer) == ["b<|im_end|>", "d<|im_end|>"]
    assert learned(one(TALK, tokenizer, "last_answer"), tokenizer) == ["d<|im_end|>"]
    assert one(TALK, tokenizer, "answers").counts.turns_after_answers == 1
    whole = one(TALK, tokenizer, "everything")
    assert whole.ids.tolist() == one(TALK, tokenizer).ids.tolist()
    assert whole.trained.all()
    assert whole.counts.target_tokens == whole.counts.tokens == len(whole.ids) - 1


def test_everything_of_texts_without_a_template(tokenizer_of: TokenizerOf) -> None:
    tokenizer = Tokenizer(tokenizer_of(PLAIN).folder, chat_template="none")
    assert learned(one(TALK, tokenizer, "everything"), tokenizer) == ["ab<|im_end|>cd<|im_end|>"]
    assert learned(one(TALK, tokenizer, "last_answer"), tokenizer) == ["d<|im_end|>"]


def test_counts_add_up() -> None:
    counts = Counts(calls=1, thoughts=2) + Counts(calls=3, empty_thoughts=4)
    assert (counts.calls, counts.thoughts, counts.empty_thoughts) == (4, 2, 4)
    assert "4 calls learned, 2 thoughts learned, 4 empty thoughts learned" in str(counts)

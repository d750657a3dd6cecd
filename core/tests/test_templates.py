"""Chat templates in Jinja: text, ids and mask as transformers has them, and what is learned is the answers."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from chat_templates import FIXTURES, TokenizerOf, learned, name_of, of_case, one

import sft
from sft import Turn
from sft.data.bad_records import Place
from sft.data.questions import encode_prompt

CASES = json.loads((FIXTURES / "jinja_references.json").read_text(encoding="utf-8"))


def turns_of(messages: list[dict[str, str]], untrained: tuple[int, ...] = ()) -> list[Turn]:
    """Turns of which every answer trains but those with these numbers."""
    return [
        Turn(m["role"], m["content"], m["role"] == "assistant" and index not in untrained)
        for index, m in enumerate(messages)
    ]


# --- as transformers renders --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_texts_and_ids_are_those_of_transformers(tokenizer_of: TokenizerOf, case: dict[str, Any]) -> None:
    tokenizer = of_case(tokenizer_of, case)
    turns = turns_of(case["messages"])
    assert tokenizer.render(turns) == case["text"]
    assert tokenizer.render(turns, add_generation_prompt=True) == case["generation_text"]
    assert encode_prompt(turns, tokenizer) == case["generation_ids"]


def test_the_fixture_has_every_shape() -> None:
    shapes = {"chatml", "chatml_blocks", "llama3", "llama3_blocks", "llama31", "qwen25", "qwen3", "mistral_v03"}
    assert {case["template"] for case in CASES} == shapes
    assert len(CASES) == len(shapes) * 6
    assert not any("error" in case for case in CASES)


# --- what is learned ----------------------------------------------------------------------------------------


def expected(case: dict[str, Any]) -> list[str]:
    """The answers as the family writes them, read off the messages."""
    answers = [m["content"] for m in case["messages"] if m["role"] == "assistant"]
    family = case["template"]
    if family.startswith("llama3"):
        return [answer.strip() + "<|eot_id|>" for answer in answers]
    if family == "mistral_v03":
        return [" " + answer.strip() + "</s>" for answer in answers]
    if family != "qwen3":
        return [answer + "<|im_end|>" for answer in answers]
    thought, _, said = answers[-1].rpartition("</think>")  # only the last answer: it alone keeps its thoughts
    thought = thought.removeprefix("<think>").strip("\n")
    return [f"<think>\n{thought}\n</think>\n\n{said.lstrip(chr(10))}<|im_end|>"]


@pytest.mark.parametrize(
    "case", [c for c in CASES if (c["template"], c["conversation"]) != ("mistral_v03", "system")], ids=name_of
)
def test_the_answers_are_learned_with_their_ends(tokenizer_of: TokenizerOf, case: dict[str, Any]) -> None:
    if case["template"] == "qwen3" and case["conversation"] == "asked":
        case = {**case, "messages": case["messages"][:2]}  # the question that follows is left out
    tokenizer = of_case(tokenizer_of, case)
    encoded = one(turns_of(case["messages"]), tokenizer)
    # A byte-level tokenizer gives each answer back; Metaspace's decoder takes the first space of a run of tokens away.
    spaced = [" " + text if case["tokenizer"] == "metaspace" else text for text in learned(encoded, tokenizer)]
    assert spaced == expected(case)
    ids = encoded.ids.tolist()
    if case["template"] != "qwen3":
        assert ids == case["ids"][: len(ids)]
    bos = case["special"].get("bos_token")
    assert tokenizer.decode(ids).count(bos or "<s>") == (1 if bos else 0)
    answers = sum(m["role"] == "assistant" for m in case["messages"])
    counts = encoded.counts
    assert counts.answers_rewritten_by_template == (answers - 1 if case["template"] == "qwen3" else 0)
    assert counts.records_without_end == 0


@pytest.mark.parametrize(
    "case", [c for c in CASES if (c["template"], c["conversation"]) != ("mistral_v03", "system")], ids=name_of
)
def test_the_quick_way_to_the_texts_of_training_gives_the_same(tokenizer_of: TokenizerOf, case: dict[str, Any]) -> None:
    """It is what long conversations are measured by before they are cut."""
    template, turns = of_case(tokenizer_of, case).template, turns_of(case["messages"])
    if any(turn.trains for turn in turns):
        assert template.texts(turns) == [piece.text for piece in template.training(turns).pieces]


@pytest.mark.parametrize("case", [c for c in CASES if "mask" in c], ids=name_of)
def test_generation_blocks_are_masked_as_by_transformers(tokenizer_of: TokenizerOf, case: dict[str, Any]) -> None:
    encoded = one(turns_of(case["messages"]), of_case(tokenizer_of, case))
    length = len(encoded.ids)
    assert encoded.ids.tolist() == case["ids"][:length]
    assert encoded.trained.astype(int).tolist() == case["mask"][:length]
    assert not any(case["mask"][length:])


@pytest.mark.parametrize("template", ["chatml", "chatml_blocks"])
@pytest.mark.parametrize(
    ("untrained", "texts"), [((1,), ["42", "ok"]), ((3,), ["one", "ok"]), ((5,), ["one", "42"]), ((1, 5), ["42"])]
)
def test_an_answer_that_does_not_train_is_no_target(
    tokenizer_of: TokenizerOf, template: str, untrained: tuple[int, ...], texts: list[str]
) -> None:
    tokenizer = tokenizer_of(template)
    roles = ["user", "assistant"] * 3
    contents = ["a", "one", "b", "42", "c", "ok"]
    turns = [
        Turn(r, c, r == "assistant" and n not in untrained)
        for n, (r, c) in enumerate(zip(roles, contents, strict=True))
    ]
    assert learned(one(turns, tokenizer), tokenizer) == [text + "<|im_end|>" for text in texts]


def test_private_characters_in_a_message_mark_nothing(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of("chatml_blocks")
    turns = [Turn("user", "\ue000a\ue001"), Turn("assistant", "\ue002b\ue000", trains=True)]
    assert learned(one(turns, tokenizer), tokenizer) == ["\ue002b\ue000<|im_end|>"]
    assert tokenizer.render(turns) == tokenizer_of("chatml").render(turns)


# --- templates that need care -------------------------------------------------------------------------------

HEADER = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
FOOTER = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TALK = [
    Turn("user", "a"),
    Turn("assistant", "<think>b</think>c", True),
    Turn("user", "d"),
    Turn("assistant", "<think>e</think>f", True),
]


def test_answers_that_are_cut_later_are_counted_and_not_learned(tokenizer_of: TokenizerOf) -> None:
    cut = "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n"
    tokenizer = tokenizer_of(HEADER + cut + FOOTER)
    encoded = one(TALK, tokenizer)
    assert learned(encoded, tokenizer) == ["<think>e</think>f<|im_end|>"]
    assert encoded.counts.answers_rewritten_by_template == 1
    # Followed by a question, the last answer is what the model would have had to write all the same.
    encoded = one([*TALK, Turn("user", "g")], tokenizer)
    assert learned(encoded, tokenizer) == ["<think>e</think>f<|im_end|>"]
    plain = [Turn("user", "a"), Turn("assistant", "b", True), *TALK[2:]]
    assert learned(one(plain, tokenizer), tokenizer) == ["b<|im_end|>", "<think>e</think>f<|im_end|>"]


def test_a_prompt_that_no_answer_follows_is_refused(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(
        HEADER + "{{ m.content.split('</think>')[-1] }}<|im_end|>\n" + FOOTER.replace("{% endif", "<think>\n{% endif")
    )
    with pytest.raises(sft.UsageError) as caught:
        one(TALK[:2], tokenizer)
    message = str(caught.value)
    assert message.startswith(
        f"The chat template of {tokenizer.folder} writes an answer into another text than the one"
    )
    assert '("c<|im_end|>\\n" in the place of "<think>\\n")' in message


def test_a_system_turn_that_goes_once_it_is_answered_is_refused(tokenizer_of: TokenizerOf) -> None:
    """Mistral's template writes the system turn into the last question, and only if no answer follows."""
    (case,) = (c for c in CASES if (c["template"], c["conversation"]) == ("mistral_v03", "system"))
    with pytest.raises(sft.UsageError, match=r'in the place of "You answer in one sentence\.'):
        one(turns_of(case["messages"]), of_case(tokenizer_of, case))


def test_a_refusal_names_the_record(tokenizer_of: TokenizerOf) -> None:
    from sft.conversations import Conversation

    turns = Conversation(
        [Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c", True)], Place(Path("train.json"), 7)
    )
    with pytest.raises(sft.UsageError, match=r"^train\.json, line 7: The chat template of .* must alternate"):
        one(turns, tokenizer_of("mistral_v03", {"bos_token": "<s>", "eos_token": "</s>"}, "metaspace"))


def test_blocks_without_the_end_of_a_turn_are_counted(tokenizer_of: TokenizerOf) -> None:
    block = "{% generation %}{{ m.content }}{% endgeneration %}"
    body = "{% if m.role == 'assistant' %}" + block + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    tokenizer = tokenizer_of(HEADER + body + FOOTER)
    encoded = one(TALK, tokenizer)
    assert learned(encoded, tokenizer) == ["<think>b</think>c", "<think>e</think>f"]
    assert encoded.counts.records_without_end == 1


def test_end_of_text_that_is_not_marked_special_ends_a_turn_too(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(
        "{% for m in messages %}{{ m.content }}</think>\n{% endfor %}", special={"eos_token": "</think>"}
    )
    encoded = one([Turn("user", "a"), Turn("assistant", "b", True)], tokenizer)
    assert learned(encoded, tokenizer) == ["b</think>"]


LAST_BLOCK = (
    "{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
)


def test_a_template_may_mark_fewer_answers(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(HEADER + LAST_BLOCK + FOOTER)
    encoded = one(TALK, tokenizer)
    assert learned(encoded, tokenizer) == ["<think>e</think>f<|im_end|>"]
    assert encoded.counts.answers_rewritten_by_template == 1


def test_blocks_that_cannot_be_told_apart_are_refused(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(HEADER + LAST_BLOCK + FOOTER)
    turns = [TALK[0], Turn("assistant", "x"), *TALK[2:]]
    with pytest.raises(sft.UsageError, match="has not one generation block for each answer"):
        one(turns, tokenizer)


def test_empty_blocks_are_refused(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(HEADER + "{% generation %}{% endgeneration %}{{ m.content }}<|im_end|>\n" + FOOTER)
    with pytest.raises(sft.UsageError, match="puts no text into its generation blocks"):
        one(TALK, tokenizer)


def test_blocks_within_a_macro(tokenizer_of: TokenizerOf) -> None:
    """Positions are counted in the finished text, not while it is made."""
    macro = "{% macro say(m) %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endmacro %}"
    body = "{{ say(m) if m.role == 'assistant' else m.content + '<|im_end|>' }}\n"
    tokenizer = tokenizer_of(macro + HEADER + body + FOOTER)
    encoded = one(TALK, tokenizer)
    assert learned(encoded, tokenizer) == ["<think>b</think>c<|im_end|>", "<think>e</think>f<|im_end|>"]


def test_two_threads_may_write_conversations_at_once(tokenizer_of: TokenizerOf) -> None:
    """Blocks are marked with characters that a conversation does not hold, and the second one holds the first's."""
    text = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    )
    tokenizer = tokenizer_of(text + "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}\n")
    turns = [[Turn("user", question), Turn("assistant", "ok", trains=True)] for question in ("a", "\ue000\ue001")]
    template: Any = tokenizer.template
    own, others = template.between_edges, []

    def beside(text: str) -> str:
        marked = str(own(text))
        if not others:
            others.append(None)
            thread = threading.Thread(target=lambda: others.append(tokenizer.template.training(turns[1])))
            thread.start()
            thread.join()
        return marked

    expected = [tokenizer.template.training(one) for one in turns]
    template.between_edges = beside
    assert tokenizer.template.training(turns[0]) == expected[0]
    assert others[1] == expected[1]

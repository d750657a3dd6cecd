"""Tools, calls and thoughts through chat templates: texts as transformers writes them, and calls are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import (
    ANSWER,
    ASKED,
    FIXTURES,
    PLAIN,
    TOOL_CASES,
    TokenizerOf,
    chosen,
    learned,
    name_of,
    of_case,
    one,
    read,
    refused,
)
from tokenizers import Tokenizer as Backend

from sft import Conversation, ToolCall, Turn
from sft.data.messages import messages
from sft.data.questions import encode_prompt
from sft.data.tokenizer import Tokenizer

BACKEND = Backend.from_file(str(FIXTURES / "tokenizers" / "bytes.json"))
TAKES_CALLS = ("qwen25_tools", "qwen3_tools", "llama31_tools", "mistral_v03_tools", "mistral_nemo_tools")
TAKES_CALLS = (*TAKES_CALLS, "hermes_tools", "chatml_tools_blocks")
TAKES_THOUGHTS = ("qwen3_tools", "chatml_tools_blocks")
WRITTEN = [
    case
    for case in TOOL_CASES
    if "error" not in case
    and (case["template"] in TAKES_CALLS or case["tools"] is None)
    and (case["template"] in TAKES_THOUGHTS or case["conversation"] not in ("thought", "plain"))
]
"""What transformers writes, and writes whole."""


# --- as transformers writes it ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WRITTEN, ids=name_of)
def test_texts_and_ids_are_those_of_transformers(tokenizer_of: TokenizerOf, case: dict[str, Any]) -> None:
    tokenizer, turns = of_case(tokenizer_of, case), read(case)
    assert tokenizer.render(turns) == case["text"]
    before = turns.of(turns[:-1])
    assert tokenizer.render(before, add_generation_prompt=True) == case["generation_text"]
    assert encode_prompt(before, tokenizer) == tokenizer.with_bos(BACKEND.encode(case["generation_text"]).ids)


@pytest.mark.parametrize("case", [case for case in WRITTEN if "mask" in case], ids=name_of)
def test_generation_blocks_are_masked_as_by_transformers(tokenizer_of: TokenizerOf, case: dict[str, Any]) -> None:
    encoded = one(read(case), of_case(tokenizer_of, case))
    length = len(encoded.ids)
    assert encoded.ids.tolist() == case["ids"][:length]
    assert encoded.trained.astype(int).tolist() == case["mask"][:length]
    assert not any(case["mask"][length:])


# --- a reference of another kind: answers as the families' documentation has them, looked for in the text ------


def call_text(family: str, call: dict[str, Any]) -> str:
    function = call["function"]
    name, arguments = function["name"], json.dumps(function["arguments"], ensure_ascii=False)
    if family == "llama31_tools":
        return f'{{"name": "{name}", "parameters": {arguments}}}'
    if family.startswith("mistral"):
        return f'{{"name": "{name}", "arguments": {arguments}, "id": "{call["id"]}"}}'
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def answer_text(family: str, case: dict[str, Any], index: int) -> str:
    """An answer as it stands in the text, with the token that ends it."""
    message = case["messages"][index]
    calls = [call_text(family, call) for call in message.get("tool_calls", ())]
    content, end = message["content"], case["special"]["eos_token"]
    if family.startswith("mistral"):
        space = "" if "nemo" in family else " "
        return (f"[TOOL_CALLS]{space}[{', '.join(calls)}]" if calls else space + content) + end
    if family == "llama31_tools":
        return (calls[0] if calls else content.strip()) + end
    if family == "qwen25_tools":
        return "\n".join([*([content] if content else []), *calls]) + end
    if family == "hermes_tools":
        return ("\n".join(calls) or content) + end
    last_question = max(n for n, m in enumerate(case["messages"]) if m["role"] == "user")
    thought = message.get("reasoning_content", "")
    is_last = index + 1 == len(case["messages"])
    head = f"<think>\n{thought}\n</think>\n\n" if index > last_question and (thought or is_last) else ""
    return head + "\n".join([*([content] if content else []), *calls]) + end


def reference(case: dict[str, Any], answers: list[int]) -> tuple[list[int], list[bool]]:
    """Ids and mask, by offsets of the tokenizers library, of the ``answers`` with these numbers."""
    family, text, ranges, position = case["template"], case["text"], [], 0
    for index, message in enumerate(case["messages"]):
        if message["role"] == "assistant" and not (family == "qwen3_tools" and index not in answers):
            start = text.index(answer_text(family, case, index), position)
            position = start + len(answer_text(family, case, index))
            ranges += [(start, position)] if index in answers else []
    found = BACKEND.encode(text[:position], add_special_tokens=False)
    mask = [any(start < end and stop > begin for begin, end in ranges) for start, stop in found.offsets]
    return found.ids, mask


def answers_of(case: dict[str, Any]) -> list[int]:
    """The answers that are what the model would have had to answer."""
    answers = [index for index, message in enumerate(case["messages"]) if message["role"] == "assistant"]
    family, conversation = case["template"], case["conversation"]
    if family == "qwen3_tools" and conversation in ("plain", "later"):  # earlier thoughts go, empty ones too
        return [
            index for index in answers if index > max(n for n, m in enumerate(case["messages"]) if m["role"] == "user")
        ]
    if family.startswith("mistral") and conversation == "later":  # tools stand before the last question
        return answers[1:]
    return answers


@pytest.mark.parametrize(
    "case", [case for case in WRITTEN if "mask" not in case and case["conversation"] != "inside"], ids=name_of
)
def test_calls_are_learned_and_results_are_not(tokenizer_of: TokenizerOf, case: dict[str, Any]) -> None:
    tokenizer, turns = of_case(tokenizer_of, case), read(case)
    encoded = one(turns, tokenizer)
    ids, mask = reference(case, answers_of(case))
    assert encoded.ids.tolist() == ids
    assert encoded.trained.tolist() == mask
    counts, answers = encoded.counts, [turn for turn in turns if turn.role == "assistant"]
    calls = sum(len(turn.tool_calls) for turn in answers)
    assert (counts.calls, counts.calls_rewritten_by_template) == (calls, 0)
    assert counts.answers_rewritten_by_template == len(answers) - len(answers_of(case))
    drops = case["conversation"] == "beside" and case["template"] in ("hermes_tools", "llama31_tools")
    assert counts.texts_removed_by_template == (1 if drops or beside_mistral(case) else 0)


def beside_mistral(case: dict[str, Any]) -> bool:
    return case["conversation"] == "beside" and case["template"].startswith("mistral")


# --- what a template does not take ----------------------------------------------------------------------------

TOOLS = chosen(conversation="call")["tools"]


CALLING = Turn("assistant", "", True, tool_calls=(ToolCall("weather", {"city": "Bern"}),))


def test_a_template_that_ignores_tools_is_refused(tokenizer_of: TokenizerOf) -> None:
    message = refused(Conversation([ASKED, ANSWER], tools=TOOLS), tokenizer_of(PLAIN))
    assert message == (
        "train.json, line 7: The chat template of MODEL does not write the tools of a record, so the model would not "
        'know of them; give chat_template one that does, or take "tools" out.'
    )


def test_a_template_that_ignores_calls_is_refused(tokenizer_of: TokenizerOf) -> None:
    message = refused(Conversation([ASKED, CALLING]), tokenizer_of(PLAIN))
    assert message == (
        "train.json, line 7: The chat template of MODEL does not write calls; give chat_template one that does, or "
        "take such records out."
    )
    case = chosen(template="smollm3_tools", conversation="call")
    assert "does not write calls; give" in refused(read(case), of_case(tokenizer_of, case))


def test_a_template_that_leaves_results_out_is_refused(tokenizer_of: TokenizerOf) -> None:
    text = PLAIN.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' else '' }}")
    message = refused(Conversation([ASKED, ANSWER, Turn("tool", "it rains"), ANSWER]), tokenizer_of(text))
    assert "MODEL leaves the result 'it rains' out; give chat_template one that does" in message


def test_calls_and_results_whose_words_stand_elsewhere_too_are_missed(tokenizer_of: TokenizerOf) -> None:
    """A question and the tools have the words of a call, and an answer those of a result."""
    tools = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    calls = "{% for c in (m.tool_calls or [])[:MOST] %}{{ c.function | tojson }}{% endfor %}"
    written = tools + PLAIN.replace("{{ m.content }}", "{{ m.content }}" + calls)
    both = (ToolCall("weather", {"city": "Bern"}), ToolCall("weather", {"city": "Rome"}))
    calling, asked = Turn("assistant", "", True, tool_calls=both), Turn("user", "Rain in Bern and in Rome?")
    talk = Conversation([asked, calling, Turn("tool", "yes"), Turn("assistant", "yes", True)], tools=TOOLS)
    assert one(talk, tokenizer_of(written.replace("MOST", "9"))).counts.calls == 2
    first = refused(talk, tokenizer_of(written.replace("MOST", "1")))
    assert "MODEL does not write all calls of a turn; give chat_template one that does" in first
    silent = written.replace("MOST", "9").replace("messages %}", "messages if m.role != 'tool' %}", 1)
    assert "MODEL leaves the result 'yes' out; give chat_template one that does" in refused(talk, tokenizer_of(silent))


def test_what_a_template_refuses_is_refused_with_its_words(tokenizer_of: TokenizerOf) -> None:
    case = chosen(template="llama31_tools", conversation="two")
    assert case["error"] == "This model calls one tool at a time!"
    assert refused(read(case), of_case(tokenizer_of, case)).endswith(": This model calls one tool at a time!.")


@pytest.mark.parametrize(("kind", "text"), [("none", None), ("pairs", {"conversation": ["{{user}}", "{{bot}}"]})])
def test_templates_without_a_place_for_tools(tokenizer_of: TokenizerOf, tmp_path: Path, kind: str, text: Any) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(text), encoding="utf-8")
    folder = tokenizer_of(PLAIN).folder
    tokenizer = Tokenizer(folder, chat_template="none" if kind == "none" else str(path))
    assert " has no place for tools; give chat_template one that does" in refused(
        Conversation([ASKED, ANSWER], tools=TOOLS), tokenizer
    )
    assert " has no place for calls and results; " in refused(Conversation([ASKED, CALLING]), tokenizer)
    thinking = [ASKED, Turn("assistant", "b", True, reasoning="c")]
    assert "<think>\nc\n</think>\n\nb" in tokenizer.render(thinking)
    assert one(thinking, tokenizer).counts.thoughts_put_before_answer == 1


# --- how a template wants calls -------------------------------------------------------------------------------


def test_calls_without_ids_get_some_where_the_template_wants_them(tokenizer_of: TokenizerOf) -> None:
    case = chosen(template="mistral_v03_tools", conversation="two")
    bare = [{name: value for name, value in m.items() if name != "tool_call_id"} for m in case["messages"]]
    bare[1] = {**bare[1], "tool_calls": [{"function": call["function"]} for call in bare[1]["tool_calls"]]}
    text = of_case(tokenizer_of, case).render(messages({"messages": bare, "tools": case["tools"]}))
    assert text.count('"id": "call00001"') == text.count('"call_id": "call00001"') == 1
    assert text.count('"id": "call00002"') == text.count('"call_id": "call00002"') == 1


def test_arguments_and_empty_contents_as_the_template_takes_them(tokenizer_of: TokenizerOf) -> None:
    """As DeepSeek's V3: arguments as text, and calls only where the content is null."""
    call = "{% for c in m.tool_calls %}{{ 'CALL ' + c.function.name + ' ' + c.function.arguments }}{% endfor %}"
    text = PLAIN.replace(
        "{{ m.content }}", "{% if m.content is none %}" + call + "{% else %}{{ m.content }}{% endif %}"
    )
    tokenizer = tokenizer_of(text)
    turns = Conversation([ASKED, CALLING, Turn("tool", "rain"), ANSWER])
    assert learned(one(turns, tokenizer), tokenizer) == ['CALL weather {"city": "Bern"}<|im_end|>', "b<|im_end|>"]


def test_a_call_ends_an_answer_too(tokenizer_of: TokenizerOf) -> None:
    text = PLAIN.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}<|eot_id|>{% else %}{{ m.content }}<|im_end|>{% endif %}",
    )
    tokenizer = tokenizer_of(text)
    assert [tokenizer.decode([token]) for token in tokenizer.stop_ids] == ["<|im_end|>", "<|eot_id|>"]
    assert len(tokenizer_of(PLAIN).stop_ids) == len(tokenizer_of("qwen3_tools").stop_ids) == 1

"""Tools, calls and thoughts through chat templates: texts as transformers writes them, and calls are learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

import sft
from sft import Conversation, ToolCall, Turn
from sft.data.bad_records import Place
from sft.data.encoded import Counts, Encoded
from sft.data.encoding import encode
from sft.data.learned import Learned
from sft.data.messages import messages
from sft.data.questions import encode_prompt
from sft.data.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures" / "templates"
CASES = json.loads((FIXTURES / "tool_references.json").read_text(encoding="utf-8"))
BACKEND = Backend.from_file(str(FIXTURES / "tokenizers" / "bytes.json"))
Make = Callable[..., Tokenizer]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A tokenizer of the fixtures with a template: the name of a fixture, or the text of one."""

    def tokenizer(template: str, special: dict[str, str] | None = None, **told: Any) -> Tokenizer:
        folder = tmp_path / f"tokenizer-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes((FIXTURES / "tokenizers" / "bytes.json").read_bytes())
        (folder / "tokenizer_config.json").write_text(json.dumps(special or {"eos_token": "<|im_end|>"}))
        path = FIXTURES / f"{template}.jinja"
        text = path.read_text(encoding="utf-8") if "{" not in template else template
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
        return Tokenizer(folder, **told)

    return tokenizer


def of_case(make: Make, case: dict[str, Any], **told: Any) -> Tokenizer:
    return make(case["template"], case["special"], **told)


def read(case: dict[str, Any]) -> Conversation:
    return messages({"messages": case["messages"], "tools": case["tools"]})


def one(turns: list[Turn], tokenizer: Tokenizer, *learned: str) -> Encoded:
    return encode([turns], tokenizer, 10**6, 10**6, learned=Learned(*learned))


def counted(encoded: Encoded) -> dict[str, int]:
    """What is counted of it, but for tokens and records."""
    plain = ("tokens", "target_tokens", "records")
    return {name: value for name, value in vars(encoded.counts).items() if value and name not in plain}


def learned(encoded: Encoded, tokenizer: Tokenizer) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    runs: list[list[int]] = [[]]
    for token, trained in zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def chosen(**wanted: Any) -> dict[str, Any]:
    return next(case for case in CASES if all(case[name] == value for name, value in wanted.items()))


def name(case: dict[str, Any]) -> str:
    return f"{case['template']}-{case['conversation']}"


TAKES_CALLS = ("qwen25_tools", "qwen3_tools", "llama31_tools", "mistral_v03_tools", "mistral_nemo_tools")
TAKES_CALLS = (*TAKES_CALLS, "hermes_tools", "chatml_tools_blocks")
TAKES_THOUGHTS = ("qwen3_tools", "chatml_tools_blocks")
WRITTEN = [
    case
    for case in CASES
    if "error" not in case
    and (case["template"] in TAKES_CALLS or case["tools"] is None)
    and (case["template"] in TAKES_THOUGHTS or case["conversation"] not in ("thought", "plain"))
]
"""What transformers writes, and writes whole."""


# --- as transformers writes it ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WRITTEN, ids=name)
def test_texts_and_ids_are_those_of_transformers(make: Make, case: dict[str, Any]) -> None:
    tokenizer, turns = of_case(make, case), read(case)
    assert tokenizer.render(turns) == case["text"]
    before = turns.of(turns[:-1])
    assert tokenizer.render(before, add_generation_prompt=True) == case["generation_text"]
    assert encode_prompt(before, tokenizer) == tokenizer.with_bos(BACKEND.encode(case["generation_text"]).ids)


@pytest.mark.parametrize("case", [case for case in WRITTEN if "mask" in case], ids=name)
def test_generation_blocks_are_masked_as_by_transformers(make: Make, case: dict[str, Any]) -> None:
    encoded = one(read(case), of_case(make, case))
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
    "case", [case for case in WRITTEN if "mask" not in case and case["conversation"] != "inside"], ids=name
)
def test_calls_are_learned_and_results_are_not(make: Make, case: dict[str, Any]) -> None:
    tokenizer, turns = of_case(make, case), read(case)
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

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = chosen(conversation="call")["tools"]


def refused(turns: Conversation, tokenizer: Tokenizer, everything: bool = True) -> str:
    with pytest.raises(sft.UsageError) as caught:
        one(Conversation(turns, Place(Path("train.json"), 7), turns.tools), tokenizer)
    if everything:
        with pytest.raises(sft.UsageError):
            one(turns, tokenizer, "everything")
    return str(caught.value).replace(str(tokenizer.folder), "MODEL")


ASKED, ANSWER = Turn("user", "a"), Turn("assistant", "b", trains=True)
CALLING = Turn("assistant", "", True, tool_calls=(ToolCall("weather", {"city": "Bern"}),))


def test_a_template_that_ignores_tools_is_refused(make: Make) -> None:
    message = refused(Conversation([ASKED, ANSWER], tools=TOOLS), make(PLAIN))
    assert message == (
        "train.json, line 7: The chat template of MODEL does not write the tools of a record, so the model would not "
        'know of them; give chat_template one that does, or take "tools" out.'
    )


def test_a_template_that_ignores_calls_is_refused(make: Make) -> None:
    message = refused(Conversation([ASKED, CALLING]), make(PLAIN))
    assert message == (
        "train.json, line 7: The chat template of MODEL does not write calls; give chat_template one that does, or "
        "take such records out."
    )
    case = chosen(template="smollm3_tools", conversation="call")
    assert "does not write calls; give" in refused(read(case), of_case(make, case))


def test_a_template_that_leaves_results_out_is_refused(make: Make) -> None:
    text = PLAIN.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' else '' }}")
    message = refused(Conversation([ASKED, ANSWER, Turn("tool", "it rains"), ANSWER]), make(text))
    assert "MODEL leaves the result 'it rains' out; give chat_template one that does" in message


def test_calls_and_results_whose_words_stand_elsewhere_too_are_missed(make: Make) -> None:
    """A question and the tools have the words of a call, and an answer those of a result."""
    tools = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    calls = "{% for c in (m.tool_calls or [])[:MOST] %}{{ c.function | tojson }}{% endfor %}"
    written = tools + PLAIN.replace("{{ m.content }}", "{{ m.content }}" + calls)
    both = (ToolCall("weather", {"city": "Bern"}), ToolCall("weather", {"city": "Rome"}))
    calling, asked = Turn("assistant", "", True, tool_calls=both), Turn("user", "Rain in Bern and in Rome?")
    talk = Conversation([asked, calling, Turn("tool", "yes"), Turn("assistant", "yes", True)], tools=TOOLS)
    assert one(talk, make(written.replace("MOST", "9"))).counts.calls == 2
    first = refused(talk, make(written.replace("MOST", "1")))
    assert "MODEL does not write all calls of a turn; give chat_template one that does" in first
    silent = written.replace("MOST", "9").replace("messages %}", "messages if m.role != 'tool' %}", 1)
    assert "MODEL leaves the result 'yes' out; give chat_template one that does" in refused(talk, make(silent))


def test_what_a_template_refuses_is_refused_with_its_words(make: Make) -> None:
    case = chosen(template="llama31_tools", conversation="two")
    assert case["error"] == "This model calls one tool at a time!"
    assert refused(read(case), of_case(make, case)).endswith(": This model calls one tool at a time!.")


@pytest.mark.parametrize(("kind", "text"), [("none", None), ("pairs", {"conversation": ["{{user}}", "{{bot}}"]})])
def test_templates_without_a_place_for_tools(make: Make, tmp_path: Path, kind: str, text: Any) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(text), encoding="utf-8")
    folder = make(PLAIN).folder
    tokenizer = Tokenizer(folder, chat_template="none" if kind == "none" else str(path))
    assert " has no place for tools; give chat_template one that does" in refused(
        Conversation([ASKED, ANSWER], tools=TOOLS), tokenizer
    )
    assert " has no place for calls and results; " in refused(Conversation([ASKED, CALLING]), tokenizer)
    thinking = [ASKED, Turn("assistant", "b", True, reasoning="c")]
    assert "<think>\nc\n</think>\n\nb" in tokenizer.render(thinking)
    assert one(thinking, tokenizer).counts.thoughts_put_before_answer == 1


# --- how a template wants calls -------------------------------------------------------------------------------


def test_calls_without_ids_get_some_where_the_template_wants_them(make: Make) -> None:
    case = chosen(template="mistral_v03_tools", conversation="two")
    bare = [{name: value for name, value in m.items() if name != "tool_call_id"} for m in case["messages"]]
    bare[1] = {**bare[1], "tool_calls": [{"function": call["function"]} for call in bare[1]["tool_calls"]]}
    text = of_case(make, case).render(messages({"messages": bare, "tools": case["tools"]}))
    assert text.count('"id": "call00001"') == text.count('"call_id": "call00001"') == 1
    assert text.count('"id": "call00002"') == text.count('"call_id": "call00002"') == 1


def test_arguments_and_empty_contents_as_the_template_takes_them(make: Make) -> None:
    """As DeepSeek's V3: arguments as text, and calls only where the content is null."""
    call = "{% for c in m.tool_calls %}{{ 'CALL ' + c.function.name + ' ' + c.function.arguments }}{% endfor %}"
    text = PLAIN.replace(
        "{{ m.content }}", "{% if m.content is none %}" + call + "{% else %}{{ m.content }}{% endif %}"
    )
    tokenizer = make(text)
    turns = Conversation([ASKED, CALLING, Turn("tool", "rain"), ANSWER])
    assert learned(one(turns, tokenizer), tokenizer) == ['CALL weather {"city": "Bern"}<|im_end|>', "b<|im_end|>"]


def test_a_call_ends_an_answer_too(make: Make) -> None:
    text = PLAIN.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}<|eot_id|>{% else %}{{ m.content }}<|im_end|>{% endif %}",
    )
    tokenizer = make(text)
    assert [tokenizer.decode([token]) for token in tokenizer.stop_ids] == ["<|im_end|>", "<|eot_id|>"]
    assert len(make(PLAIN).stop_ids) == len(make("qwen3_tools").stop_ids) == 1


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
    make: Make, template: str, place: str, thoughts: str, texts: list[str], counts: dict[str, int]
) -> None:
    answer = {
        "inside": Turn("assistant", "<think>\nIt has no divisors.\n</think>\n\nYes.", True),
        "beside": Turn("assistant", "Yes.", True, reasoning="It has no divisors."),
    }[place]
    tokenizer = make(template)
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
def test_an_empty_thought_is_learned_or_not(make: Make, thoughts: str, text: str, counts: dict[str, int]) -> None:
    tokenizer = make("qwen3_tools")
    encoded = one([ASKED, ANSWER], tokenizer, "answers", thoughts)
    assert learned(encoded, tokenizer) == [text]
    assert counted(encoded) == counts


def test_a_thought_that_is_not_learned_is_no_part_of_the_prompt_that_is_cut(make: Make) -> None:
    tokenizer = make("qwen3_tools")
    answer = Turn("assistant", "b", True, reasoning="why " * 50)
    encoded = encode([[ASKED, answer]], tokenizer, 20, 10**6, learned=Learned("answers", "none"))
    assert (encoded.counts.prompts_truncated, encoded.counts.turns_dropped) == (0, 0)
    assert "why why" in tokenizer.decode(encoded.ids.tolist())


def test_thoughts_that_the_template_takes_out_are_counted(make: Make) -> None:
    case = chosen(template="qwen3_tools", conversation="plain")
    assert counted(one(read(case), of_case(make, case))) == {
        "answers_rewritten_by_template": 1,
        "thoughts": 1,
        "thoughts_removed_by_template": 1,
    }


def test_a_thought_under_another_name_and_between_other_marks(make: Make) -> None:
    """As gpt-oss has it: the key is thinking, and a thought that stands in the content is none of the answer."""
    text = PLAIN.replace("{{ m.content }}", "{% if m.thinking %}[{{ m.thinking }}] {% endif %}{{ m.content }}")
    tokenizer = make(text)
    for answer in (Turn("assistant", "b", True, reasoning="c"), Turn("assistant", "<think>\nc\n</think>\n\nb", True)):
        encoded = one([ASKED, answer], tokenizer)
        assert learned(encoded, tokenizer) == ["[c] b<|im_end|>"]
        assert encoded.counts.answers_altered_by_template == 0


def test_the_rest_of_a_thought_that_the_prompt_begins(make: Make) -> None:
    text = PLAIN.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    tokenizer = make(text)
    turns = [ASKED, Turn("assistant", "<think>\nc\n</think>\n\nb", True)]
    assert learned(one(turns, tokenizer), tokenizer) == ["c\n</think>\n\nb<|im_end|>"]
    assert learned(one(turns, tokenizer, "answers", "none"), tokenizer) == ["b<|im_end|>"]


# --- enable_thinking --------------------------------------------------------------------------------------------


def test_a_template_is_told_whether_to_think(make: Make) -> None:
    off, on = (make("qwen3_tools", enable_thinking=value) for value in (False, True))
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


def test_a_template_that_does_not_heed_it_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match="writes the same whether enable_thinking is true or false; leave it out"):
        make(PLAIN, enable_thinking=False)
    with pytest.raises(sft.UsageError, match="leave it out"):
        Tokenizer(make(PLAIN).folder, chat_template="none", enable_thinking=True)


# --- train_on -----------------------------------------------------------------------------------------------------

TALK = Conversation([ASKED, ANSWER, Turn("user", "c"), Turn("assistant", "d", True), Turn("user", "e")])


@pytest.mark.parametrize("template", ["chatml", "chatml_blocks"])
def test_what_is_learned_of_a_conversation(make: Make, template: str) -> None:
    tokenizer = make(template)
    assert learned(one(TALK, tokenizer, "answers"), tokenizer) == ["b<|im_end|>", "d<|im_end|>"]
    assert learned(one(TALK, tokenizer, "last_answer"), tokenizer) == ["d<|im_end|>"]
    assert one(TALK, tokenizer, "answers").counts.turns_after_answers == 1
    whole = one(TALK, tokenizer, "everything")
    assert whole.ids.tolist() == one(TALK, tokenizer).ids.tolist()
    assert whole.trained.all()
    assert whole.counts.target_tokens == whole.counts.tokens == len(whole.ids) - 1


def test_everything_of_texts_without_a_template(make: Make) -> None:
    tokenizer = Tokenizer(make(PLAIN).folder, chat_template="none")
    assert learned(one(TALK, tokenizer, "everything"), tokenizer) == ["ab<|im_end|>cd<|im_end|>"]
    assert learned(one(TALK, tokenizer, "last_answer"), tokenizer) == ["d<|im_end|>"]


def test_counts_add_up() -> None:
    counts = Counts(calls=1, thoughts=2) + Counts(calls=3, empty_thoughts=4)
    assert (counts.calls, counts.thoughts, counts.empty_thoughts) == (4, 2, 4)
    assert "4 calls learned, 2 thoughts learned, 4 empty thoughts learned" in str(counts)

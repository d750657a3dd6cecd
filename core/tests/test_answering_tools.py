"""``sft generate`` and ``sft chat`` with tools and thoughts: what is offered, what is shown, how results come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typed_commands import MODEL, Type

import sft
from sft import Conversation, ToolCall, Turn
from sft.data.calls import calls_in
from sft.data.questions import encode_prompt
from sft.data.tokenizer import Tokenizer

TEMPLATE = Path(__file__).parent / "fixtures" / "templates" / "qwen3_tools.jinja"
TOOLS = [{"type": "function", "function": {"name": "weather"}}, {"type": "function", "function": {"name": "square"}}]
ASKED = Turn("user", "a")
BERN = ToolCall("weather", {"city": "Bern"})
WRITTEN = 'Wait.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


# --- calls in a text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (WRITTEN, "Wait.", (BERN,)),
        ('<tool_call>\n{"name": "weather", "arguments": "{\\"city\\": \\"Bern\\"}"}\n</tool_call>', "", (BERN,)),
        ('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bern"}, "id": "abc"}]', "",
         (ToolCall("weather", {"city": "Bern"}, "abc"),)),
        ('[{"name": "weather", "arguments": {"city": "Bern"}}, {"name": "square", "arguments": {"of": 3}}]', "",
         (BERN, ToolCall("square", {"of": 3}))),
        ('<|python_tag|>{"name": "weather", "parameters": {"city": "Bern"}}', "", (BERN,)),
        ('{"type": "function", "function": {"name": "square", "arguments": {}}} Done.', "Done.",
         (ToolCall("square", {}),)),
        ('function weather\n```json\n{"city": "Bern"}\n```', "function", (BERN,)),
        ('<think>\nx {"a": 1}\n</think>\n\n<tool_call>{"name": "square", "arguments": {}}</tool_call>',
         '<think>\nx {"a": 1}\n</think>', (ToolCall("square", {}),)),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', ()),
        ('{"name": "weather"} {', '{"name": "weather"} {', ()),
        ("{" * 5000, "{" * 5000, ()),
        ("It rains.", "It rains.", ()),
    ],
)  # fmt: skip
def test_calls_in_an_answer(text: str, said: str, calls: tuple[ToolCall, ...]) -> None:
    assert calls_in(text, TOOLS) == (said, calls)
    assert calls_in(text, ()) == (text, ())


# --- sft generate -------------------------------------------------------------------------------------------


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], list[str]]:
    """The prompts that a model gets, and what it answers, in the place of what it would."""
    prompts: list[list[int]] = []
    texts: list[str] = []

    def answers(model: Any, tokenizer: Any, asked: Any, generation: Any, seed: Any, show: Any = None, *_: Any) -> Any:
        prompts.extend(asked)
        found = [texts.pop(0) for _ in asked]
        if show is not None:
            show(found[0])
        return found

    monkeypatch.setattr("sft.models.generation.answers", answers)
    monkeypatch.setattr("sft.models.generation.check_room", lambda *_: None)
    return prompts, texts


@pytest.fixture
def tokenizer(models: Path) -> Tokenizer:
    return Tokenizer(models / MODEL, chat_template=str(TEMPLATE))


def test_tools_of_a_file_or_of_a_record_are_offered(
    typed: Type, answering: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prompts, texts = answering
    (tmp_path / "tools.json").write_text(json.dumps({"tools": TOOLS}))
    own = [{"type": "function", "function": {"name": "own"}}]
    call = {"role": "assistant", "tool_calls": [{"name": "own", "arguments": {"x": 1}}]}
    result = {"role": "tool", "content": "3"}
    messages = [{"role": "user", "content": "a"}, call, result]
    records = [{"messages": messages, "tools": own}, {"messages": messages[:2], "tools": own}]
    path = tmp_path / "asked.json"
    path.write_text(json.dumps(records))
    texts += ["ok", '{"name": "own", "arguments": {"x": 1}}', WRITTEN]
    template = ("--chat_template", str(TEMPLATE), "--enable_thinking", "false")
    found = typed("generate", *template, "--prompts_file", str(path), "--json").stdout.splitlines()
    assert [json.loads(line) for line in found] == [
        {"prompt": "3", "answer": "ok"},
        {
            "prompt": "a",
            "answer": '{"name": "own", "arguments": {"x": 1}}',
            "calls": [{"name": "own", "arguments": {"x": 1}}],
            "reference": '<tool_call>\n{"name": "own", "arguments": {"x": 1}}\n</tool_call>',
        },
    ]
    asked = [ASKED, Turn("assistant", "", tool_calls=(ToolCall("own", {"x": 1}),)), Turn("tool", "3")]
    tokenizer = Tokenizer(tokenizer.folder, chat_template=str(TEMPLATE), enable_thinking=False)
    assert prompts[0] == encode_prompt(Conversation(asked, tools=own), tokenizer)
    assert tokenizer.decode(prompts[0]).endswith("<think>\n\n</think>\n\n")
    result = typed("generate", *template, "--tools", str(tmp_path / "tools.json"), "--prompt", "a")
    assert result.stdout == WRITTEN + "\n"
    assert 'call: weather {"city": "Bern"}' in result.stderr
    assert prompts[2] == encode_prompt(Conversation([ASKED], tools=TOOLS), tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"tools .*tools\.json cannot be read"),
        ("[]", r"tools .*tools\.json holds none; leave the option out, or give a list of them"),
        ("{", r"tools .*tools\.json is not valid JSON \(.*\); give a file with a list of tools"),
        ('{"name": "f"}', r"""tools .*tools\.json: "tools" must be a list of tools, not \{'name': 'f'\}"""),
        ("[3]", r'tools .*tools\.json: tool 1 of "tools" must be an object with "name"'),
        (json.dumps(TOOLS), "does not write the tools of a record"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_wrong_tools(typed: Type, tmp_path: Path, command: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tools.json").write_text(content)
    if command == "chat" and "does not" in message:
        result = typed(command, "--tools", str(tmp_path / "tools.json"), lines="a\n")
        assert message in result.stderr
        return
    with pytest.raises(sft.UsageError, match=message):
        typed(command, "--tools", str(tmp_path / "tools.json"), lines="a\n")


def test_thinking_that_the_template_does_not_know(typed: Type) -> None:
    with pytest.raises(sft.UsageError, match="writes the same whether enable_thinking is true or false"):
        typed("generate", "--enable_thinking", "true", "--prompt", "a")


# --- sft chat -----------------------------------------------------------------------------------------------


def test_a_chat_shows_calls_and_takes_their_results(
    typed: Type, answering: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prompts, texts = answering
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    square = '<tool_call>\n{"name": "square", "arguments": {"of": 3}}\n</tool_call>'
    texts += [f"{WRITTEN}\n{square}", "ok"]
    lines = "/result 1\na\n/result rain\n/result 9\n/exit\n"
    options = ("--chat_template", str(TEMPLATE), "--tools", str(tmp_path / "tools.json"))
    result = typed("chat", *options, lines=lines)
    said = result.stderr
    assert "no call waits for a result" in said
    assert '(call: weather {"city": "Bern"}; /result TEXT gives the result)' in said
    assert '(call: square {"of": 3}; /result TEXT gives the result)' in said
    assert "(/result TEXT gives the result of square)" in said
    assert result.stdout == f"{WRITTEN}\n{square}\nok\n"
    calling = Turn("assistant", "Wait.", tool_calls=(BERN, ToolCall("square", {"of": 3})))
    turns = [ASKED, calling, Turn("tool", "rain", name="weather"), Turn("tool", "9", name="square")]
    assert prompts[1] == encode_prompt(Conversation(turns, tools=TOOLS), tokenizer)

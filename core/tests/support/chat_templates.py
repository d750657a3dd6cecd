"""Tokenizers of the fixtures with any chat template, conversations that they write, and what is learned of these."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversations import LONG

import sft
from sft import Conversation, Turn
from sft.data.bad_records import Place
from sft.data.encoded import Encoded
from sft.data.encoding import encode
from sft.data.learned import Learned
from sft.data.messages import messages
from sft.data.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures" / "templates"
TOOL_CASES = json.loads((FIXTURES / "tool_references.json").read_text(encoding="utf-8"))
"""Conversations with tools, calls and thoughts as transformers writes them."""
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED, ANSWER = Turn("user", "a"), Turn("assistant", "b", trains=True)
TokenizerOf = Callable[..., Tokenizer]


@pytest.fixture
def tokenizer_of(tmp_path: Path) -> TokenizerOf:
    """A tokenizer of the fixtures with a template: the name of a fixture, or the text of one."""

    def make(template: str, special: dict[str, str] | None = None, kind: str = "bytes", **told: Any) -> Tokenizer:
        folder = tmp_path / f"tokenizer-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes((FIXTURES / "tokenizers" / f"{kind}.json").read_bytes())
        config = special or {"eos_token": "<|im_end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        path = FIXTURES / f"{template}.jinja"
        text = path.read_text(encoding="utf-8") if "{" not in template else template
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
        return Tokenizer(folder, **told)

    return make


def of_case(tokenizer_of: TokenizerOf, case: dict[str, Any], **told: Any) -> Tokenizer:
    return tokenizer_of(case["template"], case["special"], case.get("tokenizer", "bytes"), **told)


def name_of(case: dict[str, Any]) -> str:
    return f"{case['template']}-{case['conversation']}"


def chosen(**wanted: Any) -> dict[str, Any]:
    return next(case for case in TOOL_CASES if all(case[name] == value for name, value in wanted.items()))


def read(case: dict[str, Any]) -> Conversation:
    return messages({"messages": case["messages"], "tools": case["tools"]})


def one(turns: list[Turn], tokenizer: Tokenizer, *learned: str) -> Encoded:
    return encode([turns], tokenizer, LONG, LONG, learned=Learned(*learned))


def learned(encoded: Encoded, tokenizer: Tokenizer) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    runs: list[list[int]] = [[]]
    for token, trained in zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def refused(turns: Conversation, tokenizer: Tokenizer, everything: bool = True) -> str:
    with pytest.raises(sft.UsageError) as caught:
        one(Conversation(turns, Place(Path("train.json"), 7), turns.tools), tokenizer)
    if everything:
        with pytest.raises(sft.UsageError):
            one(turns, tokenizer, "everything")
    return str(caught.value).replace(str(tokenizer.folder), "MODEL")

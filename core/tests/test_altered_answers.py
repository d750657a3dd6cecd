"""Templates that leave answers out, or some of them: refused, or counted."""

from __future__ import annotations

from pathlib import Path

import pytest

import sft
from sft.conversations import Conversation, Turn
from sft.data.encoded import Encoded
from sft.data.encoding import encode
from sft.data.tokenizer import Tokenizer

TURNS = [Turn("user", "What is a river?"), Turn("assistant", "It is water\nthat flows.", trains=True)]


def each(content: str) -> str:
    """A template that writes ``content`` of each message."""
    return "{% for m in messages %}{{ m.role }}: " + content + "<|im_end|>{% endfor %}"


def encoded(models: Path, tmp_path: Path, name: str, text: str) -> Encoded:
    (tmp_path / name).write_text(text)
    tokenizer = Tokenizer(models / "llama-tied-gqa", chat_template=str(tmp_path / name))
    return encode([Conversation(TURNS, "data.json, line 3")], tokenizer, 512, 512)


@pytest.mark.parametrize(
    "content",
    ["{{ m.content }}", "{{ m.content | trim }}", "{{ m.content.split() | join(' ') }}", "<<{{ m.content }}>>"],
)
def test_an_answer_that_stands_there_whole(models: Path, tmp_path: Path, content: str) -> None:
    assert encoded(models, tmp_path, "t.jinja", each(content)).counts.answers_altered_by_template == 0


@pytest.mark.parametrize(
    "content",
    ["{{ m.content[:9] }}", "{{ m.content.split('water')[-1] }}", "{{ m.content | replace('water', 'wine') }}"],
)
def test_an_answer_of_which_some_is_left_is_counted(models: Path, tmp_path: Path, content: str) -> None:
    counts = encoded(models, tmp_path, "t.jinja", each(content)).counts
    assert counts.answers_altered_by_template == 1
    assert "1 answer altered by template" in str(counts)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.jinja", "{{ messages[0].content }}<|im_end|>"),
        ("t.jinja", each("{% if m.role == 'user' %}{{ m.content }}{% endif %}")),
        ("t.jinja", "{{ messages[0].content }}{% generation %}yes<|im_end|>{% endgeneration %}"),
        ("t.json", '{"conversation": ["{{user}}", "yes<|im_end|>"]}'),
    ],
)
def test_an_answer_that_is_left_out_is_refused(models: Path, tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(sft.UsageError, match=r"^data\.json, line 3: the chat template leaves this record's answer out"):
        encoded(models, tmp_path, name, text)

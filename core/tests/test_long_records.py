"""Records of very many turns, and very long ones: read in seconds, or refused, and in little memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.conversations import Conversation, Turn
from sft.data import encoding
from sft.data import formats as formats_module
from sft.data.encoding import encode
from sft.data.formats import Formats
from sft.data.questions import Question
from sft.data.sources import read
from sft.data.tokenizer import Tokenizer
from sft.resolve import resolve

BLOCKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "the model's": None,
    "none": "none",
    "blocks": ("t.jinja", BLOCKS),
    "pairs": ("t.json", '{"conversation": ["{{user}}", "{{bot}}<|im_end|>"]}'),
}


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_ten_thousand_turns_take_seconds(models: Path, tmp_path: Path, template: str) -> None:
    given: Any = TEMPLATES[template]
    if isinstance(given, tuple):
        (tmp_path / given[0]).write_text(given[1])
        given = str(tmp_path / given[0])
    tokenizer = Tokenizer(models / "llama-tied-gqa", chat_template=given)
    turns = [Turn("user", "How are you?"), Turn("assistant", "Well.", trains=True)] * 5000
    began = time.monotonic()
    encoded = encode([Conversation(turns, "here")], tokenizer, 1024, 2048)
    question = Question.of(Conversation(turns, "here"), tokenizer, 1024)
    assert time.monotonic() - began < 60  # it is 2 on an idle core, and was more than 180
    assert 2000 < encoded.counts.tokens < 2048
    assert encoded.counts.turns_dropped > 9000
    assert 1000 < len(question.ids) <= 1024


def test_long_records_go_to_the_tokenizer_a_few_at_a_time(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_LARGEST_GROUP", 100)
    tokenizer = Tokenizer(models / "llama-tied-gqa")
    conversations = [
        Conversation([Turn("user", "a" * length), Turn("assistant", "b", trains=True)])
        for length in (10, 20, 90, 200, 5)
    ]
    sizes: list[int] = []

    def noting(work: Any, groups: Iterator[list[list[Turn]]]) -> Iterator[Any]:
        for group in groups:
            sizes.append(len(group))
            yield work(group)

    few = encode(conversations, tokenizer, 64, 64, by=noting)
    assert sizes == [3, 1, 1]
    monkeypatch.undo()
    whole = encode(conversations, tokenizer, 64, 64)
    for name in ("ids", "trained", "offsets"):
        np.testing.assert_array_equal(getattr(few, name), getattr(whole, name))
    assert few.counts == whole.counts


def test_a_record_that_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_module, "LONGEST", 10)
    path = tmp_path / "train.json"
    path.write_text('{"src": "123456789", "tgt": "a"}\n{"src": "123456789", "tgt": "ab"}\n')
    formats = Formats(resolve({}, ())[1])
    records = read([path])
    assert formats.turns(next(records))
    with pytest.raises(
        sft.UsageError, match="line 2: the record has 11 characters, and at most 10 are read; divide it"
    ):
        formats.turns(next(records))

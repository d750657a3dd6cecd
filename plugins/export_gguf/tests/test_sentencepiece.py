"""Tokenizers of SentencePiece in GGUF files: what the library itself makes of texts, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sft

KINDS = ("prefixed", "plain")


@pytest.mark.parametrize("kind", KINDS)
def test_the_fixture_is_what_sentencepiece_does(fixtures: Path, kind: str) -> None:
    """Its ids of every text."""
    from tokenizers import Tokenizer

    folder = fixtures / "sentencepiece" / kind
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    assert [tokenizer.encode(answer["text"], add_special_tokens=False).ids for answer in answers] == [
        answer["converted"] for answer in answers
    ]
    assert [answer["ids"] for answer in answers] == [answer["converted"] for answer in answers]


def lacking(content: dict[str, Any]) -> None:
    """Two ways lead to "one", and one of them is no merge."""
    vocabulary = content["model"]["vocab"]
    assert "one" in vocabulary
    vocabulary["ne"] = vocabulary.pop("k")


def mixed(content: dict[str, Any]) -> None:
    lacking(content)
    content["model"]["merges"].append(["o", "ne"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(normalizer={"type": "NFKC"}), r"that normalizes by .*NFKC.* and cuts by null"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "that normalizes by .* cuts by .*Whitespace"),
        (lambda c: c["model"]["vocab"].pop("<0x0A>"), "that lacks 1 of the 256 bytes, such as <0x0A>"),
        (mixed, "whose merges to one do not follow each other, so that no score says them"),
        (lacking, "that never merges o and ne"),
    ],
    ids=["normalizer", "words", "bytes", "mixed", "lacking"],
)
def test_one_that_llama_cpp_does_not_follow_is_refused(
    cases: ModuleType, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    from sft.inference.export import export

    folder = cases.prepare("mistral-prefixed", tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(sft.UsageError, match=f"The tokenizer is BPE with bytes to fall back on {message}"):
        export(str(folder), None, "gguf", tmp_path / "out", lambda text: None)
    assert not (tmp_path / "out").exists()

"""Conversations, their encoding read back, and tokenizers with another chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft import Turn
from sft.data.encoded import Encoded
from sft.data.encoding import encode
from sft.data.tokenizer import Tokenizer

EOS = 319  # <|im_end|> of llama-tied-gqa, <|eot_id|> of llama3-scaled
LONG = 10**6
TokenizerWith = Callable[..., Tokenizer]


@pytest.fixture
def tokenizer_with(models: Path, tmp_path: Path) -> TokenizerWith:
    """A model directory's tokenizer with another chat template (None: none), pad token, or no BOS of its own."""

    def make(folder: str, template: Any = ..., adds_bos: bool = True, **config: Any) -> Tokenizer:
        copy = tmp_path / f"{folder}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(models / folder, copy, ignore=shutil.ignore_patterns("*.safetensors", "*reference*"))
        declared = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
        if template is not ...:
            (copy / "chat_template.jinja").unlink(missing_ok=True)
            declared["chat_template"] = template
        (copy / "tokenizer_config.json").write_text(json.dumps({**declared, **config}), encoding="utf-8")
        if not adds_bos:
            stored = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
            stored["post_processor"] = stored["post_processor"]["processors"][0]
            (copy / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
        return Tokenizer(copy)

    return make


def answered(*pairs: str, system: str | None = None) -> list[Turn]:
    """A conversation of questions and answers, all answers training."""
    turns = [Turn("system", system)] if system is not None else []
    for index, text in enumerate(pairs):
        turns.append(Turn("assistant", text, trains=True) if index % 2 else Turn("user", text))
    return turns


def tokens_of(encoded: Encoded, index: int = 0) -> list[int]:
    """All tokens of a record, the last of which is only ever a label."""
    return encoded.ids[encoded.offsets[index] : encoded.offsets[index + 1]].tolist()


def targets_of(encoded: Encoded, index: int = 0) -> list[int]:
    labels = encoded[index].labels
    return labels[labels != -100].tolist()


def one(turns: list[Turn], tokenizer: Tokenizer, src_length: int = LONG, max_length: int = LONG) -> Encoded:
    return encode([turns], tokenizer, src_length, max_length)


def texts(models: Path, folder: str = "llama-tied-gqa") -> list[tuple[str, list[int]]]:
    """Texts and their ids by transformers."""
    cases = json.loads((models / folder / "tokenizer_reference.json").read_text(encoding="utf-8"))
    return [(case["text"], case["ids"]) for case in cases]

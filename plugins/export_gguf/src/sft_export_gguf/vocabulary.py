"""The tokenizer in a GGUF file: SentencePiece's, or byte-level BPE, whose way of cutting text into words llama.cpp
knows by a name.

llama.cpp has no interpreter of ``tokenizer.json``: a name stands for regular expressions in its source. The name is
found here by the expressions, so it holds for any vocabulary that was trained with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sft
from sft_export_gguf.sentencepiece import describe_sentencepiece, is_sentencepiece

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_DIGIT = {"type": "Digits", "individual_digits": True}
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_NAMES: list[tuple[str, bool, list[dict[str, Any]]]] = [
    ("gpt-2", False, [_GPT2]),
    ("smollm", False, [_DIGIT, _GPT2]),
    ("llama-bpe", True, [_split(_CASES + r"\p{N}{1,3}" + _REST), _BYTES]),
    ("smaug-bpe", False, [_split(_CASES + r"\p{N}{1,3}" + _REST), _BYTES]),
    ("qwen2", False, [_split(_CASES + r"\p{N}" + _REST), _BYTES]),
]
"""llama.cpp's name, whether a word that is a token is never cut (ignore_merges), and what does the same in
``tokenizer.json``."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def describe_tokenizer(model: sft.FinishedModel, writer: Any) -> None:
    """Write the tokenizer of ``model`` into the header of ``writer`` (gguf's); :class:`sft.UsageError` for one that
    llama.cpp would not follow."""
    content = model.tokenizer_json
    bpe = content["model"]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if bpe.get(key):
            raise _refused(f"BPE with {key} {bpe[key]!r}")
    if is_sentencepiece(content):
        describe_sentencepiece(model, content, *_tokens(model, content), writer)
        _describe_special(model, writer)
        return
    if bpe.get("type") != "BPE" or (content.get("decoder") or {}).get("type") != "ByteLevel":
        raise _refused(f"{bpe.get('type')} that is not byte-level BPE")
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise _refused(f"byte-level BPE with normalizer {json.dumps(normalizer)[:200]}")
    if normalizer is not None:
        model.say(
            "note: llama.cpp does not compose letters as this tokenizer does (NFC): text with letters and accents "
            "apart becomes other tokens there"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_name(content.get("pre_tokenizer"), bool(bpe.get("ignore_merges"))))
    tokens, types = _tokens(model, content)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    if merges:
        writer.add_token_merges(merges)
    _describe_special(model, writer)


def _name(pre_tokenizer: Mapping[str, Any] | None, whole_words: bool) -> str:
    """What llama.cpp calls a way of cutting text into words."""
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    plain = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    for name, keeps, known in _NAMES:
        if plain == known and keeps == whole_words:
            return name
    raise _refused(
        f"byte-level BPE that cuts words by {json.dumps(plain)[:400]}{' and never cuts tokens' if whole_words else ''}"
    )


def _tokens(model: sft.FinishedModel, content: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """The text and type of each row of the embedding."""
    rows = model.architecture.vocabulary
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [_UNUSED] * rows
    vocabulary, added_tokens = content["model"]["vocab"], content.get("added_tokens", ())
    last = max([*vocabulary.values(), *(added["id"] for added in added_tokens)])
    if last >= rows:
        raise sft.UsageError(
            f"The tokenizer has a token {last:,}, and the embedding {rows:,} rows; the two do not belong together."
        )
    for token, number in vocabulary.items():
        tokens[number], types[number] = token, _NORMAL
    for added in added_tokens:
        number = added["id"]
        wide = [key for key in ("single_word", "lstrip", "rstrip") if added.get(key)]
        if wide:
            model.say(
                f"note: llama.cpp does not know {' and '.join(wide)} of the token {sft.shown(added['content'])}: what "
                "stands beside it may become other tokens there"
            )
        tokens[number], types[number] = added["content"], _CONTROL if added["special"] else _USER_DEFINED
    return tokens, types


def _describe_special(model: sft.FinishedModel, writer: Any) -> None:
    stops = model.stop_ids
    writer.add_eos_token_id(stops[0])
    for add, number in zip((writer.add_eot_token_id, writer.add_eom_token_id), stops[1:], strict=False):
        add(number)
    if len(stops) > 3:
        model.say(
            f"note: a GGUF file names three tokens that end an answer; {', '.join(map(str, stops[3:]))} of this model "
            "are left out"
        )
    if model.bos_id is not None:
        writer.add_bos_token_id(model.bos_id)
    writer.add_add_bos_token(model.adds_bos)
    if model.chat_template is not None:
        writer.add_chat_template(model.chat_template)
    elif model.renders:
        model.say("note: the chat template is not Jinja, so the file has none; prompts must be written in its form")


def _refused(what: str) -> sft.UsageError:
    names = ", ".join(dict.fromkeys(name for name, _, _ in _NAMES))
    return sft.UsageError(
        f"The tokenizer is {sft.shown(what)}, which cannot be written as GGUF here (what can: byte-level BPE that cuts "
        f"words as {names} do in llama.cpp, and SentencePiece's BPE); write --to huggingface."
    )

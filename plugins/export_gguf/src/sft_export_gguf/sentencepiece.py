"""The tokenizer in a GGUF file: SentencePiece's BPE (Llama 2, Mistral, Gemma), whose pieces llama.cpp merges by their
scores.

In ``tokenizer.json`` the same is BPE with a list of merges and bytes to fall back on. A piece's score is the place of
its merges in that list, with a minus; whether merging by scores does what the list says is looked at first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from typing import Any

import sft

MARK = "▁"
"""What a space is in a piece."""
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE, _NORMAL = 2, 3, 4, 5, 6, 1
_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
_PREFIXED = {"type": "Prepend", "prepend": MARK}
_IDLE = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
"""Gemma's: there is no space left to cut at."""


def is_sentencepiece(content: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` holds BPE with bytes to fall back on."""
    return content["model"].get("type") == "BPE" and bool(content["model"].get("byte_fallback"))


def describe_sentencepiece(
    model: sft.FinishedModel, content: Mapping[str, Any], tokens: list[str], types: list[int], writer: Any
) -> None:
    """Write it into the header of ``writer``; ``tokens`` and ``types`` are those of the embedding's rows, of which this
    changes some types. :class:`sft.UsageError` for one that llama.cpp would not follow."""
    prefixed = _prefixed(content)
    own = content["model"]
    _check_bytes(own["vocab"])
    user = {token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED}
    scores = _scores(own["vocab"], _pairs(own["merges"]), user)
    unknown = own["vocab"].get(own.get("unk_token"))
    listed = [0.0] * len(tokens)
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == _NORMAL:
            types[number] = _BYTE if _is_byte(token) else _NORMAL
            listed[number] = scores.get(token, 0.0)
        else:
            listed[number] = -1000.0
            tokens[number] = (
                token.replace(MARK, " ") if kind == _USER_DEFINED else token
            )  # it is looked for in the text
    if unknown is not None:
        types[unknown] = _UNKNOWN
        writer.add_unk_token_id(unknown)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(listed)
    writer.add_token_types(types)
    writer.add_add_space_prefix(prefixed)


def _prefixed(content: Mapping[str, Any]) -> bool:
    """Whether a space comes before each piece of text between special tokens."""
    normalizer, cutter = (content.get(key) for key in ("normalizer", "pre_tokenizer"))
    steps: Any = [normalizer]
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        steps = normalizer["normalizers"]
    if steps in ([_PREFIXED, _REPLACED], [_REPLACED]) and cutter in (None, _IDLE):
        return len(steps) == 2
    if normalizer is None and isinstance(cutter, dict) and cutter.get("type") == "Metaspace":
        scheme = cutter.get("prepend_scheme", "always") if cutter.get("replacement") == MARK else None
        if scheme in ("always", "never") and cutter.get("split") is False:
            return bool(scheme == "always")
    raise _refused(f"that normalizes by {json.dumps(normalizer)[:300]} and cuts by {json.dumps(cutter)[:300]}")


def _check_bytes(vocabulary: Mapping[str, int]) -> None:
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    if missing:
        raise _refused(f"that lacks {len(missing)} of the 256 bytes, such as <0x{missing[0]:02X}>")


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _pairs(merges: Sequence[Any]) -> list[tuple[str, str]]:
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges]
    return [(left, right) for left, right in pairs]


def _scores(vocabulary: Mapping[str, int], pairs: Sequence[tuple[str, str]], user: Set[str]) -> dict[str, float]:
    """The score of each piece that is merged. llama.cpp merges any two pieces that make one, that of the highest score
    first; the list must say the same: all merges of a piece together, and every way of making it among them.

    Pieces that the ``user`` has defined are not merged there but looked for in the text, the longest first. Of runs of
    spaces that is the same where their merges come before all others."""
    own = [pair for pair in pairs if "".join(pair) not in user]
    runs = {"".join(pair) for pair in pairs[: len(pairs) - len(own)]}
    if any("".join(pair) in user for pair in pairs[len(pairs) - len(own) :]):
        raise _refused("that merges other pieces before some that stand among its added tokens")
    for token in user:
        shorter = {MARK * length for length in range(2, len(token) + 1)}
        if MARK in token and (set(token) != {MARK} or not shorter <= user & runs):
            raise _refused(f"that has {sft.shown(token)} among its added tokens")
    scores: dict[str, float] = {}
    last = ""
    for place, pair in enumerate(own):
        piece = "".join(pair)
        if piece != last and piece in scores:
            raise _refused(f"whose merges to {sft.shown(piece)} do not follow each other, so that no score says them")
        if not user.isdisjoint(pair):
            raise _refused(f"that merges {sft.shown(pair[0])} and {sft.shown(pair[1])}, of which one is an added token")
        scores.setdefault(piece, -float(place))
        last = piece
    known = set(own)
    for piece in scores:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair not in known and user.isdisjoint(pair) and all(half in vocabulary for half in pair):
                raise _refused(
                    f"that never merges {sft.shown(pair[0])} and {sft.shown(pair[1])}, which llama.cpp does, as "
                    f"{sft.shown(piece)} is a piece"
                )
    return scores


def _refused(what: str) -> sft.UsageError:
    return sft.UsageError(
        f"The tokenizer is BPE with bytes to fall back on {what}; llama.cpp would not follow it (it follows "
        "SentencePiece's, as Llama 2, Mistral and Gemma have it), so write --to huggingface."
    )

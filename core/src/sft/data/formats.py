"""From a record to the turns of a conversation. The core knows ``{"src", "tgt"}``; plugins may know more."""

from __future__ import annotations

import reprlib
from typing import Any

from sft.data.sources import Record
from sft.errors import UsageError
from sft.seams import Turn


def turns_of(record: Record, hook: Any) -> list[Turn]:
    """The turns of ``record``: a plugin's ``sft_record_format`` first, then the core's own format.

    Raises :class:`UsageError` with file and line for a record that is in no known format, or wrong in its own.
    """
    try:
        turns = hook.sft_record_format(record=record.value)
        turns = turns if turns is not None else src_tgt(record.value)
    except ValueError as error:
        raise UsageError(f"{record.place}: {error}") from error
    if not any(turn.trains for turn in turns):
        raise UsageError(f"{record.place}: no turn of this record is a target, so nothing can be learned from it.")
    return turns


def src_tgt(record: dict[str, Any]) -> list[Turn]:
    """PaddleNLP's format: ``src`` and ``tgt`` are both text, or both lists with the turns of one conversation."""
    for key in ("src", "tgt"):
        if key not in record:
            found = ", ".join(record) or "none"
            raise ValueError(f'the record has no "{key}" (its keys: {found}); each needs "src" and "tgt".')
    sources, targets = (_texts(record[key], key) for key in ("src", "tgt"))
    if len(sources) != len(targets):
        raise ValueError(f'"src" has {len(sources)} turns and "tgt" has {len(targets)}; they must be as many.')
    turns = []
    for source, target in zip(sources, targets, strict=True):
        turns += [Turn("user", source), Turn("assistant", target, trains=True)]
    return turns


def _texts(value: Any, key: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'"{key}" must be text or a list of texts, not {reprlib.repr(value)}.')
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ValueError(f'"{key}" holds half of a surrogate pair, which is no text; correct it.') from None
    if key == "tgt" and not all(text.strip() for text in texts):
        raise ValueError('"tgt" is empty; remove the record or give it an answer.')
    return texts

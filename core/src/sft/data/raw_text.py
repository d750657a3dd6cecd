"""Raw text (``{"text": …}``): a conversation of one turn, which no chat template writes and of which all is learned."""

from __future__ import annotations

from collections.abc import Sequence

from sft.conversations import Turn
from sft.data.templates import Written, WrittenText

TEXT_ROLE = "text"


def is_raw(turns: Sequence[Turn]) -> bool:
    """Whether a conversation is a document."""
    return len(turns) == 1 and turns[0].role == TEXT_ROLE


def raw_written(turns: Sequence[Turn], end: str) -> Written:
    """The document with ``end``, the end-of-text token, behind it."""
    return Written((WrittenText.of(turns[0].content + end, turns[0]),), is_raw=True)

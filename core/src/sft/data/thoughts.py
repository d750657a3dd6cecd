"""Thoughts before an answer: where one stands in the text of it, and how one is written where nothing else is known."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from sft.conversations import Turn

NAMES = ("reasoning_content", "reasoning", "thinking")
"""The keys in which messages hold a thought, in data and for published templates, most of which know the first."""
_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""What stands around thoughts in published templates."""
_BEFORE = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_EMPTY = re.compile(r"<think>\s*</think>\s*")


def with_thought(turn: Turn) -> str:
    """The content of a turn with its thought before it, as models have it whose templates know of no thoughts."""
    return turn.content if turn.reasoning is None else f"<think>\n{turn.reasoning}\n</think>\n\n{turn.content}"


def parted(turn: Turn) -> tuple[str | None, str]:
    """The thought of a turn, wherever it stands, and the rest of its content. An empty thought is one."""
    if turn.reasoning is not None:
        return turn.reasoning, turn.content
    found = _BEFORE.match(turn.content) if turn.role == "assistant" else None
    return (found[1].strip("\n"), turn.content[found.end() :]) if found else (None, turn.content)


def has_closing(text: str) -> bool:
    """Whether what ends a thought stands in ``text``."""
    return any(closing in text for _, closing in _MARKS)


def without_empty(text: str) -> str:
    """``text`` without an empty thought at its beginning."""
    found = _EMPTY.match(text)
    return text[found.end() :] if found else text


def without_empty_end(text: str) -> str:
    """``text`` without an empty thought at its end."""
    start = text.rfind("<think>")
    return text[:start] if start >= 0 and _EMPTY.fullmatch(text, start) else text


def thoughts_in(
    text: str, targets: Sequence[tuple[int, int]], known: Sequence[str] = ()
) -> Iterator[tuple[int, int, bool]]:
    """Of each range of ``text`` that is learned, the range of the thought in it, if there is one, and whether it is
    empty. White space after a thought belongs to it. ``known`` are thoughts whose templates mark them otherwise."""
    for start, end in targets:
        found = _marked(text, start, end) or _known(text, start, end, known)
        if found is not None:
            yield found


def _marked(text: str, start: int, end: int) -> tuple[int, int, bool] | None:
    for opening, closing in _MARKS:
        close = text.find(closing, start, end)
        if close < 0:
            continue
        # Where the prompt ends within a thought, what is learned begins there.
        first = text.find(opening, start, close)
        inner = text[first + len(opening) if first >= 0 else start : close]
        return first if first >= 0 else start, _after_space(text, close + len(closing), end), not inner.strip()
    return None


def _known(text: str, start: int, end: int, known: Sequence[str]) -> tuple[int, int, bool] | None:
    for thought in known:
        first = text.find(thought.strip(), start, end) if thought.strip() else -1
        if first >= 0:
            return first, _after_space(text, first + len(thought.strip()), end), False
    return None


def _after_space(text: str, position: int, end: int) -> int:
    while position < end and text[position].isspace():
        position += 1
    return position

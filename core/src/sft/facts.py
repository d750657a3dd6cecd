"""Labels with what is known under them, as lines of text: each label once, and what stands beside it aligned.

Widths are counted in columns of a terminal, of which a Chinese character takes two.
"""

from __future__ import annotations

from collections.abc import Sequence

from sft.foreign_text import one_line

Fact = tuple[str, Sequence[str]]
"""A label, and the lines beside it."""


def columns(text: str) -> int:
    """How many columns of a terminal ``text`` takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def padded(text: str, width: int) -> str:
    """``text`` with spaces behind it, up to ``width`` columns."""
    return text + " " * (width - columns(text))


def lines_of(facts: Sequence[Fact], width: int | None = None, label: int | None = None) -> list[str]:
    """``facts`` as lines of at most ``width`` columns (None: of any length), indented by two. What is too long goes on
    below its beginning. The labels take ``label`` columns, or as many as the longest of them needs."""
    wide = label or max((columns(name) for name, _ in facts), default=0) + 2
    found = []
    for name, lines in facts:
        for number, line in enumerate(lines):
            for again, part in enumerate(wrapped(one_line(line), None if width is None else width - wide - 2)):
                found.append(f"  {padded('' if number or again else name, wide)}{part}".rstrip())
    return found


def wrapped(text: str, width: int | None) -> list[str]:
    """``text`` in lines of at most ``width`` columns; whole where that is None, or too few to be read."""
    if width is None or columns(text) <= width or width < 8:
        return [text]
    from rich.console import Console
    from rich.text import Text

    return [line.plain.rstrip() for line in Text(text).wrap(Console(width=width), width)]

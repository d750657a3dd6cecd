"""A report for the terminal: figures, a histogram, and records with what is learned highlighted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from sft.data_report import words
from sft.data_report.value import Bar, DataReport, Piece, Split
from sft.facts import Fact, lines_of
from sft.foreign_text import harmless

if TYPE_CHECKING:
    from rich.console import Console

LEARNED, SPECIAL = "black on green", "magenta"
OPENS, CLOSES = "⟦", "⟧"
"""Around what is learned, where there are no colours."""
_WIDE = 40
"""Columns of the longest bar."""
_LABEL = 12
_GUTTER = "│ "
"""Before each line of a record."""


def write(report: DataReport, console: Console) -> None:
    """Print a report. Nothing in it is taken for an order, by rich or by the terminal."""
    write_figures(report, console)
    write_records(report, console)
    for note in report.notes:
        _print(Text(f"\nnote: {harmless(note)}"), console)


def write_figures(report: DataReport, console: Console) -> None:
    """What is known of all records."""
    max_length = report.settings["max_length"]
    _facts(words.heading(report), console)
    for name, split in report.splits.items():
        _headline(f"{name} data", console)
        _facts(words.of_split(split, max_length), console)
        _histogram(split, max_length, console)
        _facts(words.below_lengths(report, name), console)


def write_records(report: DataReport, console: Console) -> None:
    """The records that are shown, and how many have what was looked for."""
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    search = words.of_search(report)
    if search is not None:
        _headline(search, console)
    for record in report.records:
        _headline(words.of_record(record), console)
        for row in record.rows:
            _with_gutter(_written(row, coloured), console)
    if report.records:
        told = Text.assemble(("learned", LEARNED), ", ", ("special token", SPECIAL)) if coloured else None
        plain = f"{OPENS}{CLOSES} stand around what is learned"
        _print(Text("\n").append_text(told or Text(plain)), console)


def _print(text: Text, console: Console) -> None:
    """On a terminal as wide as it is; elsewhere lines stay whole."""
    console.print(text, soft_wrap=not console.is_terminal)


def _with_gutter(text: Text, console: Console) -> None:
    """Print lines of data, none of which can be taken for one of ours."""
    whole = text.split("\n", allow_blank=True)
    for line in text.wrap(console, console.width - len(_GUTTER)) if console.is_terminal else whole:
        _print(Text().append(_GUTTER, style="dim").append_text(line), console)


def _headline(text: str, console: Console) -> None:
    _print(Text(f"\n{text}", style="bold"), console)


def _facts(facts: list[Fact], console: Console) -> None:
    if console.is_terminal:
        grid = Table.grid(padding=(0, 0, 0, 2))
        grid.add_column(width=_LABEL - 1, style="cyan")
        grid.add_column(overflow="fold")
        for label, lines in facts:
            grid.add_row(Text(label), Text("\n".join(lines)))
        console.print(grid)
        return
    for line in lines_of(facts, None, _LABEL):
        _print(Text(line), console)


def _histogram(split: Split, max_length: int, console: Console) -> None:
    if split.lengths is None:
        return
    bars = split.lengths.bars
    most = max(bar.records for bar in bars)
    wide = len(f"{bars[-1].last:,}")
    around = _LABEL + 2 + 2 * wide + len(" to  ") + len(f" {most:,}")
    longest = max(1, min(_WIDE, console.width - around)) if console.is_terminal else _WIDE
    for bar in bars:
        line = Text(" " * (_LABEL + 2))
        line.append(f"{bar.first:>{wide},} to {bar.last:>{wide},} ")
        line.append("█" * _columns(bar, most, longest), style="red" if bar.first > max_length else "green")
        line.append(f" {bar.records:,}")
        _print(line, console)


def _columns(bar: Bar, most: int, longest: int) -> int:
    """How long a bar is drawn: one column at least, where there is any record."""
    return max(int(bar.records > 0), round(longest * bar.records / most))


def _written(row: list[Piece], coloured: bool) -> Text:
    text = Text()
    learned = False
    for piece in row:
        said = harmless(piece.text)
        if coloured:
            style = " ".join(filter(None, ("bold" * piece.special * piece.learned, LEARNED if piece.learned else "")))
            # The end of a line is learned too, and cannot be seen otherwise.
            said = said.replace("\n", "↵\n") if piece.learned else said
            text.append(said, style=style or (SPECIAL if piece.special else ""))
            continue
        said = said.replace(OPENS, "\\u27e6").replace(CLOSES, "\\u27e7")
        if piece.learned != learned:
            text.append(OPENS if piece.learned else CLOSES)
            learned = piece.learned
        text.append(said)
    if learned:
        text.append(CLOSES)
    return text

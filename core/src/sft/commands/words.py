"""The help of commands in the reader's language: what click shows, from the tables of :mod:`sft.language`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import click

from sft.language import language, package_of, translated

WIDTH = 36
"""Columns of a line of Chinese beside an option: click breaks lines at spaces alone, which Chinese has none of."""
_DEFAULT = re.compile(r"(?P<text>.*?)(?:  \[default: (?P<default>.*)\])?", re.DOTALL)
_CLICKS = {
    "zh": {
        r"^Usage: ": "用法：",
        r"^Options:$": "选项：",
        r"^Commands:$": "命令：",
        r"Show this message and exit\.": "显示本帮助并退出。",
        r"(?<=\[|\s)required\]": "必需]",
        r"\[default: ": "[默认：",
    }
}
"""Words that click writes itself, as expressions."""


def in_readers_language(command: click.Command) -> click.Command:
    """``command`` as its reader is to see it: itself in English, else a copy with other words."""
    if language() == "en":
        return command
    package = package_of(command.callback) or "sft"
    found = copy.copy(command)
    found.help = _paragraphs(command.help, package)
    found.short_help = _first(command.help, package)
    found.params = [_parameter(one, package) for one in command.params]
    if isinstance(found, click.Group):
        found.commands = {name: in_readers_language(one) for name, one in found.commands.items()}
    _with_clicks_words(found)
    return found


def texts(command: click.Command) -> Iterator[str]:
    """All that a command says in its help, as it stands in the tables."""
    yield from (_joined(one) for one in (command.help or "").split("\n\n") if not _is_fixed(one))
    for parameter in command.params:
        text, default = _said(getattr(parameter, "help", None) or "")
        yield text
        if " " in default:  # others are values
            yield default
    for one in getattr(command, "commands", {}).values():
        yield from texts(one)


def _joined(text: str) -> str:
    return " ".join(text.split())


def _paragraphs(text: str | None, package: str) -> str | None:
    if text is None:
        return None
    return "\n\n".join(
        one if _is_fixed(one) else "\b\n" + _lines(translated(_joined(one), package), 78) for one in text.split("\n\n")
    )


def _is_fixed(paragraph: str) -> bool:
    """Whether click keeps its lines as they are, because they are code."""
    return paragraph.lstrip(" \n").startswith("\b")


def _first(text: str | None, package: str) -> str:
    """The first sentence, for a list of commands."""
    whole = translated(_joined((text or "").partition("\n\n")[0]), package)
    return re.split("(?<=。)|(?<=：)", whole)[0].rstrip("：")


def _said(text: str) -> tuple[str, str]:
    """What an option says, and its default."""
    found = _DEFAULT.fullmatch(text)
    return (found["text"], found["default"] or "") if found else (text, "")


def _parameter(parameter: click.Parameter, package: str) -> click.Parameter:
    said = getattr(parameter, "help", None)
    if not said:
        return parameter
    text, default = _said(said)
    found: Any = copy.copy(parameter)
    found.help = of_option(text, package)
    if default:
        found.help += f"  [default: {translated(default, package)}]"
    usual = found.get_help_record

    def get_help_record(context: click.Context) -> tuple[str, str] | None:
        """Put into lines when click has added what it says itself: a default, a range, that it is required."""
        record = usual(context)
        return record and (record[0], "\b\n" + _lines(_with_words(record[1]), WIDTH))

    found.get_help_record = get_help_record
    return found


def of_option(text: str, package: str) -> str:
    """What an option says. One that is a setting of `sft run` says it as a sentence, which no table has."""
    for setting in (text.rstrip("."), text[0].lower() + text[1:].rstrip(".")):
        if translated(setting, package) != setting:
            return translated(setting, package) + "。"
    return translated(text, package)


def _lines(text: str, width: int) -> str:
    """``text`` in lines of at most ``width`` columns; a Chinese character takes two. Breaks come at spaces, or beside
    Chinese characters; none comes before a closing mark or after an opening one, and a default's word stays with it."""
    from rich.cells import cell_len

    lines, line = [], ""
    for piece in re.findall(r"(?:（|\[默认：)*(?:[\u2e80-\uffef]|[^\s\u2e80-\uffef]+)[，。；：、）”\]]*|\s+", text):
        if line and cell_len(line + piece) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece if line else piece.lstrip()
    return "\n".join([*lines, line])


def _with_clicks_words(command: Any) -> None:
    usual = command.get_help
    command.get_help = lambda context: _with_words(usual(context))


def _with_words(text: str) -> str:
    for pattern, word in _CLICKS[language()].items():
        text = re.sub(pattern, word, text, flags=re.MULTILINE)
    return text

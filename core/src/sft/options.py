"""Typed options: how a dataclass field becomes a setting, and how a raw value is checked against it.

The core's argument groups and every plugin's ``Options`` are plain dataclasses whose fields are made by
:func:`option`; this module knows how to read them, nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import types
import typing
from collections.abc import Iterator
from typing import Any

from sft.errors import UsageError
from sft.foreign_text import MASK, is_secret, quoted
from sft.precision import LARGEST, SMALLEST
from sft.small_files import check_path
from sft.written_numbers import read_number

_TRUE = {"true", "1", "yes", "on"}
_FALSE = {"false", "0", "no", "off"}
_NONE = {"none", "null", ""}
_LARGEST_WHOLE = 2**63 - 1
"""What an int64 can be."""


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    aliases: tuple[str, ...] = (),
    none_is_text: bool = False,
    is_path: bool = False,
    hook: str | None = None,
) -> Any:
    """A dataclass field that is a setting.

    ``help`` is one line, with units. ``choices`` lists the accepted strings, also beside numbers (``int | str``);
    ``minimum`` and ``maximum`` are inclusive bounds of numbers, ``above`` and ``below`` exclusive ones. ``aliases`` are
    other names that mean the same. ``none_is_text``: the word none is a value of its own, not another way of leaving
    the setting unset. ``is_path``: the text names a file or folder, and is refused where none can have that name.
    ``hook``, of the core's settings alone: plugins that implement it add words to the ``choices`` (requests
    ``value.X.V``); where the setting is a list, each of its words asks for one of them, and ``all`` for all.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "below": below,
        "aliases": aliases,
        "none_is_text": none_is_text,
        "is_path": is_path,
        "hook": hook,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting as the command line and the documentation see it."""

    name: str
    type: Any
    default: Any
    help: str = ""
    choices: tuple[str, ...] | None = None
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    aliases: tuple[str, ...] = ()
    none_is_text: bool = False
    is_path: bool = False
    hook: str | None = None

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The accepted Python types; ``NoneType`` among them when the setting may be unset."""
        if typing.get_origin(self.type) in (typing.Union, types.UnionType):
            return typing.get_args(self.type)
        return (self.type,)

    @property
    def words(self) -> tuple[str, ...]:
        """The accepted words, where only some are; true and false among them for a switch with more positions."""
        switch = ("true", "false") if self.is_flag or (bool in self.kinds and self.choices) else ()
        return (*switch, *(self.choices or ()))

    @property
    def takes_numbers(self) -> bool:
        return int in self.kinds or float in self.kinds

    @property
    def is_flag(self) -> bool:
        return bool in self.kinds and str not in self.kinds

    @property
    def is_list(self) -> bool:
        return any(typing.get_origin(kind) is list for kind in self.kinds)


_SAID = {field.name for field in dataclasses.fields(Option)} - {"name", "type", "default"}
"""What :func:`option` says of a field; one that it did not make says none of it."""


def options_of(cls: type) -> dict[str, Option]:
    """The settings that a dataclass declares, by name, in order."""
    return dict(_options_of(cls))


@functools.cache
def _options_of(cls: type) -> dict[str, Option]:
    """Evaluating annotations takes time, and a run asks often."""
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        said = {key: value for key, value in field.metadata.items() if key in _SAID}
        found[field.name] = Option(field.name, hints[field.name], default, **said)
    return found


def convert(option: Option, value: Any) -> Any:
    """Check ``value`` (from a file or, as a string, from the command line) and return it in the option's type.

    Raises :class:`UsageError` naming the setting, the value and what is accepted.
    """
    kinds = option.kinds
    got = MASK if is_secret(option.name) else quoted(value)
    if isinstance(value, Bare) and bool not in kinds:
        raise UsageError(f"{option.name}: the value is missing; expected {_describe(option)}.")
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    unset = _NONE - {"none"} if option.none_is_text else _NONE
    if type(None) in kinds and (value is None or (isinstance(value, str) and value.lower() in unset)):
        return None
    for kind in kinds:
        converted = _convert(kind, value)
        if converted is not _REFUSED:
            break
    else:
        raise UsageError(f"{option.name}: expected {_describe(option)}, got {got}.")
    if option.choices and isinstance(converted, str):
        if converted in option.choices:
            return converted
        what = _describe(option) if option.takes_numbers else f"one of {', '.join(option.words)}"
        raise UsageError(f"{option.name}: expected {what}, got {got}.")
    too_low = option.minimum is not None and converted < option.minimum
    too_low = too_low or (option.above is not None and converted <= option.above)
    too_high = option.maximum is not None and converted > option.maximum
    too_high = too_high or (option.below is not None and converted >= option.below)
    if too_low or too_high:
        raise UsageError(f"{option.name}: expected {_describe(option)}, got {got}.")
    if isinstance(converted, int) and abs(converted) > _LARGEST_WHOLE:
        raise UsageError(f"{option.name}: whole numbers here go up to {_LARGEST_WHOLE}, got {got}.")
    if isinstance(converted, float) and converted and not SMALLEST <= abs(converted) <= LARGEST:
        raise UsageError(
            f"{option.name}: numbers here are 0 or from {SMALLEST:.2g} to {LARGEST:.2g} in size, which is what 32 "
            f"bits hold, got {got}."
        )
    if option.is_path and isinstance(converted, str):
        check_path(option.name, converted)
    return converted


class Bare(str):
    """What the command line makes of a setting that stands without a value: true, for switches alone."""


_REFUSED = object()


def _convert(kind: Any, value: Any) -> Any:
    if kind is type(None):
        return _REFUSED
    if typing.get_origin(kind) is list:
        if isinstance(value, str):
            value = items_in(value)
        of_texts = typing.get_args(kind) == (str,)
        is_one = isinstance(value, list) and (not of_texts or all(isinstance(v, str) for v in value))
        return list(value) if is_one else _REFUSED
    if kind is bool:
        if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
            return value.lower() in _TRUE
        return value if isinstance(value, bool) else _REFUSED
    if isinstance(value, bool):
        return _REFUSED
    if kind is str:
        return value if isinstance(value, str) else _REFUSED
    if not isinstance(value, (int, float, str)):
        return _REFUSED
    try:
        number = read_number(value) if isinstance(value, str) else float(value)
    except (ValueError, OverflowError):
        return _REFUSED
    if number != number or number in (float("inf"), float("-inf")):
        return _REFUSED
    if kind is int:
        # An integer that a double cannot hold (a seed, say) must not pass through float.
        exact = int(value) if isinstance(value, str) and value.lstrip("+-").isdigit() else value
        if isinstance(exact, int):
            return exact
        return int(number) if number.is_integer() else _REFUSED
    return number


def items_in(text: str) -> list[Any]:
    """The items of a list that is written as JSON, or with commas between them."""
    if text.lstrip().startswith("["):
        with contextlib.suppress(ValueError):  # a regular expression may begin like a list
            return list(json.loads(text))
    return [part.strip() for part in _parts(text) if part.strip()]


def _parts(text: str) -> Iterator[str]:
    """``text`` divided at its commas, but for those within brackets, braces or parentheses and after a backslash."""
    start, closing, escaped = 0, "", False
    for place, letter in enumerate(text):
        if escaped or letter == "\\":
            escaped = not escaped
        elif letter in _CLOSING and not closing.startswith("]"):  # within [...] the others are letters
            closing = _CLOSING[letter] + closing
        elif closing and letter == closing[0]:
            closing = closing[1:]
        elif letter == "," and not closing:
            yield text[start:place]
            start = place + 1
    yield text[start:]


_CLOSING = {"(": ")", "[": "]", "{": "}"}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _describe(option: Option) -> str:
    words = [
        "a list (JSON, or with commas)" if typing.get_origin(kind) is list else _NAMES.get(kind, "a value")
        for kind in option.kinds
        if kind is not type(None) and not (kind is str and option.choices)
    ]
    text = " or ".join(words)
    if option.minimum is not None:
        text += f" of at least {_bound(option.minimum)}"
    if option.above is not None:
        text += f" above {_bound(option.above)}"
    if option.maximum is not None:
        text += f"{' and' if option.minimum is not None or option.above is not None else ''}"
        text += f" at most {_bound(option.maximum)}"
    if option.below is not None:
        text += f" and below {_bound(option.below)}"
    text += f", or {' or '.join(option.choices)}" if option.choices else ""
    return text + (", or none" if type(None) in option.kinds else "")


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"

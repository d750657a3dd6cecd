"""Settings files: YAML, JSON or TOML. What is wrong with one is said in a sentence, with the line and what to do."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sft.errors import UsageError
from sft.foreign_text import shown
from sft.small_files import read_text, why
from sft.written_numbers import or_tiny, read_number

_INDENTED = re.compile(r"\s+[\w.\"'-]+\s*:(\s|$)")
_CURE = "correct it there"


class _FaultError(ValueError):
    """What is wrong with the text of a file, with its line; ``cure`` is what to do."""

    def __init__(self, text: str, cure: str = _CURE) -> None:
        super().__init__(text)
        self.cure = cure


def read_file(path: Path) -> dict[str, Any]:
    """A settings file: JSON (``.json``), YAML (``.yaml``, ``.yml``) or TOML (``.toml``), with a value for each name.

    In TOML a table is what stands before a dot: ``[a-plugin]`` with ``rank = 4`` is the setting ``a_plugin.rank``.
    Raises :class:`UsageError` for a file that cannot be read, is not valid, or holds something else."""
    readers = {".json": ("JSON", _of_json), ".yaml": ("YAML", _of_yaml), ".yml": ("YAML", _of_yaml)}
    readers[".toml"] = ("TOML", _of_toml)
    if path.suffix not in readers:
        raise UsageError(
            f"Settings file {shown(path)} is none of .yaml, .json and .toml; rename it after what it holds."
        )
    kind, read = readers[path.suffix]
    text = read_text(path, "Settings file ", "give the path of a YAML, JSON or TOML file")
    try:
        values = read(text)
    except (ValueError, RecursionError) as error:
        cure = getattr(error, "cure", _CURE)
        raise UsageError(f"Settings file {shown(path)} is not valid {kind} ({why(error)}); {cure}.") from error
    if not isinstance(values, dict):
        raise UsageError(f"Settings file {shown(path)} must hold one object of names and values.")
    return values


def _of_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_float=read_number)


def _of_toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        values = tomllib.loads(text, parse_float=read_number)
    except tomllib.TOMLDecodeError as error:
        raise _value_and_table(text, str(error)) or error from error
    return _unique(list(_without_tables(values)))


def _without_tables(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _without_tables(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _value_and_table(text: str, said: str) -> _FaultError | None:
    """What to say of a plugin's switch beside the table of its settings (``a = true`` and ``[a]``), which TOML does not
    allow, if ``said``, the library's sentence, may mean that."""
    found = re.search(r"overwrite a value \(at line (\d+)", said)
    lines = text.splitlines()
    if not found or int(found[1]) > len(lines):
        return None
    place = int(found[1])
    name = re.match(r"""\s*\[?\s*["']?([\w-]+)["']?\s*[\].]""", lines[place - 1])
    first = name and next(
        (n for n, line in enumerate(lines, 1) if re.match(rf"""\s*["']?{name[1]}["']?\s*=""", line)), None
    )
    if not name or first is None:
        return None
    return _FaultError(
        f"line {first} gives {name[1]} a value, and line {place} makes a table of it",
        f'to switch a plugin on beside its table, write plugin = ["{name[1]}"] in place of line {first}',
    )


def _of_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:
                # The library lets through the errors of what it makes values with: dates, binary, numbers.
                raise _FaultError(f"line {node.start_mark.line + 1}: {why(error)}") from error

    def number(loader: Any, node: Any) -> float:
        return or_tiny(loader.construct_yaml_float(node), node.value)

    Loader.add_constructor("tag:yaml.org,2002:float", number)
    try:
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        raise _yaml_fault(text, error) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _FaultError(f"line {line}: a character that a text file cannot have, U+{error.character:04X}") from error
    except (yaml.YAMLError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(str(error)) from error


def _yaml_fault(text: str, error: Any) -> _FaultError:
    """The library's ``error`` as a sentence with the line. Where that line is indented, or the nearest setting above it
    where the library expected that to go on, that is what is wrong, for each setting begins where its line does."""
    mark, problem, context = error.problem_mark or error.context_mark, str(error.problem), str(error.context)
    if "quoted" in context and "end of stream" in problem:
        return _FaultError(f"line {error.context_mark.line + 1}: a quotation mark that is not closed")
    if "flow" in context and "expected ','" in problem:
        return _FaultError(f"line {error.context_mark.line + 1}: a bracket that is not closed, or no comma within")
    if "simple key" in context:
        return _FaultError(f"line {error.context_mark.line + 1} has no ': '", "write name: value")
    if "flow" in context:
        return _FaultError(f"line {mark.line + 1}: {problem}")
    lines = text.splitlines()[: mark.line + 1]
    for number in range(len(lines), 0 if "<" in problem else len(lines) - 1, -1):
        if _INDENTED.match(lines[number - 1]):
            return _FaultError(f"line {number} is indented", "begin each setting at the start of its line")
    if "<block" in problem:
        if lines[-1][: mark.column].strip():
            return _FaultError(
                f"line {mark.line + 1} goes on after its value has ended",
                "put all of it in quotes that it does not hold",
            )
        if not mark.column:
            return _FaultError(f"line {mark.line + 1} is not of the form of those above it", "write name: value")
        return _FaultError(f"line {mark.line + 1} is indented otherwise than those above it", "align them")
    if "mapping values" in problem:
        return _FaultError(f"line {mark.line + 1} has a second ': '", "put text that holds one in quotes")
    if "another document" in problem:
        return _FaultError(f"line {mark.line + 1} begins another document", "keep one of them")
    return _FaultError(f"line {mark.line + 1}: {problem}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON and YAML let the last of several equal names win in silence."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"Setting {shown(name)} is given twice; keep one of them.")
    return dict(pairs)


def _refuse_repeated_keys(node: Any) -> None:
    """``node`` is YAML's tree of a whole file."""
    if isinstance(getattr(node, "value", None), list) and getattr(node, "id", "") == "mapping":
        _unique([(str(key.value), None) for key, _ in node.value])

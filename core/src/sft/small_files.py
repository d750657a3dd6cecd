"""Small files that others wrote, read whole: one that is no plain file, is too large or holds something else is
refused before it can hang, fill the memory or break what reads it."""

from __future__ import annotations

import encodings.utf_8_sig  # noqa: F401  (else it is looked for when a text is read, which may be too late for that)
import json
from pathlib import Path
from typing import Any

from sft.errors import UsageError
from sft.foreign_text import quoted, shown
from sft.written_numbers import read_number

LARGEST = 256 * 2**20
"""Bytes. The largest such files that there are, tokenizers and indexes of weights, have some tens of millions."""


def check_plain(path: Path, what: str = "", cure: str = "copy it again") -> int:
    """The size of a file in bytes; :class:`UsageError` for what is none: to open a named pipe would wait for ever.

    A message begins with ``what`` and ends with the ``cure``, here and below.
    """
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise UsageError(f"{what}{shown(path)} cannot be read ({why(error)}); {cure}.") from error
    if not path.is_file():
        raise UsageError(f"{what}{shown(path)} is no file that can be read, but {_kind(path)}; {cure}.")
    return size


def is_there(path: Path) -> bool:
    """Whether there is anything of that name; :class:`UsageError` where this user may not know."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise UsageError(f"{shown(path)} cannot be read ({why(error)}); check the path and its permissions.") from error
    return True


def read_bytes(path: Path, what: str = "", cure: str = "copy it again") -> bytes:
    """All of a file; :class:`UsageError` where that cannot be."""
    size = check_plain(path, what, cure)
    if size > LARGEST:
        raise UsageError(f"{what}{shown(path)} has {size:,} bytes, and at most {LARGEST:,} are read; {cure}.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{what}{shown(path)} cannot be read ({why(error)}); {cure}.") from error


def read_text(path: Path, what: str = "", cure: str = "copy it again") -> str:
    """All of a file as text, without a byte order mark; :class:`UsageError` where that cannot be."""
    try:
        return read_bytes(path, what, cure).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{what}{shown(path)} is not UTF-8 text ({error.reason}); convert it.") from error


def read_json(path: Path, what: str = "", cure: str = "correct or replace it") -> Any:
    """The value that a file of JSON holds; :class:`UsageError` where it holds none."""
    text = read_text(path, what, cure)
    try:
        return json.loads(text, parse_float=read_number)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}{shown(path)} is not valid JSON ({why(error)}); {cure}.") from error


def read_object(path: Path, cure: str = "correct or replace it") -> dict[str, Any]:
    """The JSON object that ``path`` holds; :class:`UsageError`, with the ``cure``, where it holds none."""
    value = read_json(path, "", cure)
    if not isinstance(value, dict):
        raise UsageError(f"{shown(path)} must hold one JSON object, and holds a {type(value).__name__}; {cure}.")
    return value


def check_path(name: str, value: str) -> None:
    """Refuse a path that no file can have, or that leads where this user cannot look, for the setting ``name``."""
    try:
        value.encode()
        Path(value).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # whoever needs it says so
    except UnicodeEncodeError:
        raise UsageError(f"{name}: {quoted(value)} is not UTF-8 text; rename the file or folder.") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{name}: {shown(value)} cannot be used as a path ({why(error)}); give another.") from error


def why(error: Exception) -> str:
    """What an error of reading says, in one line and without the path, which stands beside it."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _kind(path: Path) -> str:
    kinds = {"is_dir": "a folder", "is_fifo": "a named pipe", "is_socket": "a socket"}
    return next((name for test, name in kinds.items() if getattr(path, test)()), "a device")

"""A plugin in one file, without a distribution: ``--plugin ./my_plugin.py``.

The file is a module with one subclass of :class:`sft.Plugin`, or is a plugin itself (``name``, ``api_version``, and
hooks that are functions). It has no metadata, so nothing but its path asks for it.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from sft.errors import SftError, UsageError
from sft.foreign_text import shown
from sft.plugins.discovery import canonical
from sft.plugins.origins import PluginFile, remember
from sft.plugins.registry import Plugin
from sft.small_files import check_path

_PREFIX = "sft_plugin_file_"


def is_file(name: str) -> bool:
    """Whether what is typed after ``--plugin`` is a path: no plugin's name ends like this."""
    return name.strip().endswith(".py") and not name.strip().startswith("no:")


def with_files(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """``values`` (settings by name) with the names of plugins in the place of paths to files, and those plugins."""
    asked = values.get("plugin", [])
    names = asked.split(",") if isinstance(asked, str) else asked
    if not isinstance(names, (list, tuple)) or not any(isinstance(name, str) and is_file(name) for name in names):
        return dict(values), []
    found: list[Any] = []
    left: list[Any] = []
    for name in names:
        if isinstance(name, str) and is_file(name):
            plugin = read_plugin_file(name)
            found += [plugin] if plugin not in found else []
            left.append(name_of(plugin))
        else:
            left.append(name)
    return {**values, "plugin": left}, found


def name_of(plugin: Any) -> str:
    return canonical(str(plugin.name))


def read_plugin_file(typed: str) -> Any:
    """The plugin class, or the module, of a file. It is run once; again where its content has changed since."""
    check_path("plugin", typed)
    path = Path(typed.strip()).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"Plugin file {shown(path)} cannot be read ({error.strerror}); check the path.") from error
    digest = hashlib.sha256(content).hexdigest()
    stem = "".join(letter if letter.isidentifier() or letter.isdigit() else "_" for letter in path.stem)
    where = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    name = f"{_PREFIX}{stem}_{where[:8]}{digest[:8]}"
    if name not in sys.modules:
        _run(name, path, content)
    remember(name, PluginFile(path, digest))
    return _plugin_in(sys.modules[name], path)


def _run(name: str, path: Path, content: bytes) -> None:
    """Make the module ``name`` of ``content``. Python's own loader would keep bytecode, and take an older one for it
    where a file has changed twice in a second."""
    module = ModuleType(name)
    module.__file__ = str(path.absolute())
    sys.modules[name] = module  # dataclasses and annotations look for it there
    try:
        exec(compile(content, str(path), "exec"), vars(module))
    except SftError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f", line {lines[-1]}" if lines else ""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"Plugin file {shown(path)}{line}: {text}; correct it there.") from error


def _plugin_in(module: ModuleType, path: Path) -> Any:
    own = [
        one
        for one in vars(module).values()
        if inspect.isclass(one) and issubclass(one, Plugin) and one.__module__ == module.__name__
    ]
    own = [one for one in dict.fromkeys(own) if not any(one in other.__mro__[1:] for other in own)]
    if not own and isinstance(getattr(module, "name", None), str):
        return module
    if not own:
        raise UsageError(f"Plugin file {shown(path)} holds no plugin: a class that derives from sft.Plugin.")
    if len(own) > 1:
        raise UsageError(
            f"Plugin file {shown(path)} holds {' and '.join(one.__name__ for one in own)}; keep one plugin in a file."
        )
    if not isinstance(getattr(own[0], "name", None), str) or not own[0].name.strip():
        raise UsageError(
            f"Plugin file {shown(path)}: class {own[0].__name__} has no name; set name to the text that messages call "
            "it by."
        )
    return own[0]

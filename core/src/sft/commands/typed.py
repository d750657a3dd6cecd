"""What is typed as ``--name value``: settings that only plugins may know, and the settings file beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft import hookspecs
from sft.errors import UsageError
from sft.options import Bare
from sft.plugins.files import with_files
from sft.plugins.registry import Plugins
from sft.plugins.requests import by_device, choose_plugins, explicit
from sft.settings.arguments import core_options
from sft.settings.files import read_file
from sft.settings.reading import normalise
from sft.settings.words import shared_settings


def named_values(arguments: list[str]) -> tuple[list[str], dict[str, Any], list[str]]:
    """What is typed as ``--name value`` for settings that only plugins know: words without a name, values by name (the
    last one given counts), and the plugins."""
    loose: list[str] = []
    given: dict[str, Any] = {}
    plugins: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            loose.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else Bare("true")
        if name == "plugin" and isinstance(value, Bare):
            raise UsageError("--plugin needs a name; `sft plugins` lists the installed ones.")
        if name == "plugin":
            plugins += value.split(",")
        else:
            given[name.replace("-", "_")] = value
    return loose, given, plugins


def collect(arguments: list[str]) -> dict[str, Any]:
    """The settings file's values overridden by the command line's; the last one given counts, plugins add up. Raises
    :class:`UsageError` for what is no setting, and for a file that cannot be read."""
    loose, given, plugins = named_values(arguments)
    if len(loose) > 1:
        raise UsageError(f"Unexpected {loose[1]!r}; settings are given as --name value.")
    path = loose[0] if loose else None
    values = normalise(read_file(Path(path))) if path is not None else {}
    of_file = values.pop("plugin", [])
    if isinstance(of_file, str):
        of_file = of_file.split(",")
    values.update(given)
    if of_file or plugins:
        values["plugin"] = [*of_file, *plugins] if isinstance(of_file, list) else of_file
    return values


def requested(values: Mapping[str, Any]) -> tuple[Plugins, list[str]]:
    """The plugins that a run with these settings would have, loaded and not started; and the names of those that the
    settings ask for."""
    values, files = with_files(values)
    names, _ = choose_plugins(values, core_options(), shared_settings())
    return Plugins.load(names, hookspecs, files, explicit(values), by_device(values)), names

"""Settings as they are given: read from a YAML, JSON or TOML file, and checked against what the core and the active
plugins declare.

No value is guessed: a name that nobody declares is an error with a suggestion.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sft.errors import UsageError
from sft.foreign_text import listed, shown
from sft.options import convert, options_of
from sft.plugins.discovery import cure, extras, import_plugin
from sft.plugins.registry import Plugins
from sft.settings.arguments import GROUPS, Settings
from sft.settings.names import CORE, Names
from sft.settings.words import with_words, words_of
from sft.small_files import read_text, why
from sft.written_numbers import or_tiny, read_number


def read_file(path: Path) -> dict[str, Any]:
    """A settings file: JSON (``.json``), YAML (``.yaml``, ``.yml``) or TOML (``.toml``), with a value for each name.

    In TOML a table is what stands before a dot: ``[a-plugin]`` with ``rank = 4`` is the setting ``a_plugin.rank``."""
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
        raise UsageError(
            f"Settings file {shown(path)} is not valid {kind} ({why(error)}); correct it there."
        ) from error
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

    return _unique(list(_without_tables(tomllib.loads(text, parse_float=read_number))))


def _without_tables(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _without_tables(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _of_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def number(loader: Any, node: Any) -> float:
        return or_tiny(loader.construct_yaml_float(node), node.value)

    Loader.add_constructor("tag:yaml.org,2002:float", number)
    try:
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.load(text, Loader)
    except (yaml.YAMLError, OverflowError, TypeError, LookupError, AttributeError) as error:
        # Beside its own errors the library lets through those of what it makes values with: dates, binary, numbers.
        raise ValueError(str(error)) from error


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


def normalise(values: Mapping[str, Any]) -> dict[str, Any]:
    """Setting names with underscores, whatever they were written with; a name given twice is an error."""
    normal: dict[str, Any] = {}
    for name, value in values.items():
        key = str(name).replace("-", "_")
        if key in normal:
            raise UsageError(f"Setting {shown(key)} is given twice; keep one of them.")
        normal[key] = value
    return normal


def build(values: Mapping[str, Any], plugins: Plugins) -> Settings:
    """Check ``values`` (names already normalised, plugin requests taken out) against core and active plugins.

    Raises :class:`UsageError` for the first unknown name or wrong value.
    """
    names = Names(plugins)
    parts, unknown = names.divided(values)
    if unknown:
        also = f" Also unknown: {listed(unknown[1:])}." if len(unknown) > 1 else ""
        raise UsageError(unknown_setting(unknown[0], names.near(unknown[0]), plugins) + also)

    decided = words_of(plugins, parts[CORE])

    def fill(cls: type, owner: str) -> Any:
        declared = {name: with_words(setting, plugins) for name, setting in options_of(cls).items()}
        # null is "unset" in a settings file, also where unset is not a value of its own.
        given = {name: parts[owner][name] for name in declared if parts[owner].get(name) is not None}
        words = {name: word for name, word in decided.items() if name in declared and owner == CORE}
        return cls(
            **{name: convert(declared[name], value) for name, value in given.items() if name not in words}, **words
        )

    groups = {key: fill(cls, CORE) for key, cls in GROUPS.items()}
    options = {owner: fill(cls, owner) for owner, cls in names.classes.items()}
    given = {
        names.written(owner, name) for owner, part in parts.items() for name, value in part.items() if value is not None
    }
    return Settings(**groups, plugin=tuple(plugins.names), options=options, given=frozenset(given))


def known_names(plugins: Plugins) -> set[str]:
    """Every name that the core or an active plugin reads."""
    return Names(plugins).all()


def unknown_setting(name: str, known: Iterable[str], plugins: Plugins) -> str:
    """The sentence for a name that nobody declares, with what the user most likely meant."""
    said = shown(name) or "''"
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)
    if close:
        return f"Unknown setting {said}; did you mean {close[0]}?"
    stems = {plugin: plugin.replace("-", "_") for plugin in plugins.inactive()}
    prefixed = [plugin for plugin, stem in stems.items() if name.startswith(f"{stem}.")]
    near = [plugin for plugin, stem in stems.items() if name.startswith(stem.partition("_")[0] + "_")]
    whole = sorted((plugin for plugin, stem in stems.items() if name.startswith(stem + "_")), key=len)
    # The plugins that have it; else the one with the longest name that it begins with, else all whose first part.
    owners = prefixed or [plugin for plugin in near if _declares(plugin, name)] or whole[-1:] or near
    if owners:
        these = f"{', '.join(owners[:-1])} or {owners[-1]}" if len(owners) > 1 else owners[0]
        rival = plugins.rival(owners[0]) if len(owners) == 1 else None
        if rival is not None:
            return (
                f"Unknown setting {said}; if it belongs to plugin {these}, that cannot work together with "
                f"{rival}: leave one of them out."
            )
        added = "NAME" if len(owners) > 1 else owners[0]
        return f"Unknown setting {said}; if it belongs to plugin {these}, add --plugin {added}."
    missing = [one for one in extras() if name.startswith(f"{one.replace('-', '_')}.") or _begins(name, one)]
    if missing:
        plugin = max(missing, key=len)
        return f"Unknown setting {said}; if it belongs to plugin {plugin}, {cure(plugin)}."
    return f"Unknown setting {said}; `sft run --help` lists the settings (with --plugin NAME, the plugin's too)."


def _begins(name: str, plugin: str) -> bool:
    return f"{name}_".startswith(f"{plugin.replace('-', '_')}_")


def _declares(plugin: str, name: str) -> bool:
    """Whether an installed plugin has the setting ``name``; not known, where it cannot be imported."""
    try:
        declared = getattr(import_plugin(plugin), "Options", None)
    except UsageError:
        return False
    return declared is not None and any(
        name in (setting.name, *setting.aliases) for setting in options_of(declared).values()
    )

"""Settings as they are given, checked against what the core and the active plugins declare.

No value is guessed: a name that nobody declares is an error with a suggestion.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from sft.errors import UsageError
from sft.foreign_text import listed, shown
from sft.options import Option, convert, options_of
from sft.plugins.discovery import cure, extras, import_plugin, of_absent_plugin
from sft.plugins.registry import Plugins
from sft.plugins.requests import switches
from sft.settings.arguments import GROUPS, Settings
from sft.settings.names import CORE, Names
from sft.settings.words import with_words, words_of


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
            **{name: _converted(declared[name], value) for name, value in given.items() if name not in words}, **words
        )

    groups = {key: fill(cls, CORE) for key, cls in GROUPS.items()}
    options = {owner: fill(cls, owner) for owner, cls in names.classes.items()}
    given = {
        names.written(owner, name) for owner, part in parts.items() for name, value in part.items() if value is not None
    }
    return Settings(**groups, plugin=tuple(plugins.names), options=options, given=frozenset(given))


def _converted(setting: Option, value: Any) -> Any:
    """``value`` as the setting has it. A word that it does not know may be one that a plugin would bring."""
    try:
        return convert(setting, value)
    except UsageError as error:
        if setting.hook is None or not (absent := of_absent_plugin()):
            raise
        raise UsageError(f"{str(error).rstrip('.')}{absent}.") from None


def known_names(plugins: Plugins) -> set[str]:
    """Every name that the core or an active plugin reads."""
    return Names(plugins).all()


def unknown_setting(name: str, known: Iterable[str], plugins: Plugins) -> str:
    """The sentence for a name that nobody declares, with what the user most likely meant."""
    said = shown(name) or "''"
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)
    # A plugin's switch is shorter than its settings are, which begin alike.
    close = close or difflib.get_close_matches(name, switches(), n=1, cutoff=0.9)
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
    return (
        f"Unknown setting {said}; `sft run --help` lists the settings (with --plugin NAME, the plugin's too)"
        f"{of_absent_plugin()}."
    )


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

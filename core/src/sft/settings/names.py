"""Whose setting a name is: the core's, a plugin's, or, where two plugins have one of that name, ``PLUGIN.NAME``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sft.errors import UsageError
from sft.foreign_text import shown
from sft.options import options_of
from sft.plugins.registry import Plugins
from sft.plugins.requests import switches
from sft.settings.arguments import GROUPS, long_name

CORE = ""
"""Owner of the core's own settings."""


class Names:
    """The names of settings among these plugins. Raises :class:`UsageError` where one is declared that could never get
    a value, or that is the core's."""

    def __init__(self, plugins: Plugins) -> None:
        self.classes: dict[str, type] = {}
        self.owners: dict[str, list[str]] = {name: [CORE] for name in _names_of(GROUPS.values())}
        switch_of = switches()
        for owner, plugin in plugins:
            declared = getattr(plugin, "Options", None)
            if declared is None:
                continue
            self.classes[owner] = declared
            for name in _names_of([declared]):
                if name == owner.replace("-", "_") or name in switch_of:
                    asked = " and ".join(switch_of.get(name, [owner]))
                    raise UsageError(
                        f"{plugins.who(owner)} has an option {name}, which is the switch of plugin {asked}, so it "
                        "would never get a value; upgrade it."
                    )
                if self.owners.get(name) == [CORE]:
                    raise UsageError(
                        f"Setting {name} is declared by both the core and plugin {owner} ({plugins.origin(owner)}); "
                        f"leave {owner} out."
                    )
                self.owners.setdefault(name, []).append(owner)

    def all(self) -> set[str]:
        """Every name that one of them reads, also the long ones."""
        long = {long_name(owner, name) for owner, cls in self.classes.items() for name in _names_of([cls])}
        return {*self.owners, *long}

    def near(self, name: str) -> Iterable[str]:
        """Those that somebody may have meant who typed ``name``."""
        return self.all() if "." in name else self.owners

    def divided(self, values: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """``values`` by owner, under the settings' own names, and the names that nobody knows. Raises
        :class:`UsageError` for a name that two have, and a setting that is given twice."""
        own = {CORE: _own_names(GROUPS.values()), **{owner: _own_names([cls]) for owner, cls in self.classes.items()}}
        prefixes = {long_name(owner, ""): owner for owner in self.classes}
        parts: dict[str, dict[str, Any]] = {owner: {} for owner in own}
        typed: dict[tuple[str, str], str] = {}
        unknown: list[str] = []
        ambiguous: list[str] = []
        for name, value in values.items():
            prefix, _, rest = name.rpartition(".")
            owners, short = self.owners.get(name, []), name
            if prefix and (owner := prefixes.get(f"{prefix}.")) is not None and rest in own[owner]:
                owners, short = [owner], rest
            if len(owners) != 1:
                (ambiguous if owners else unknown).append(name)
                continue
            key = own[owners[0]][short]
            if (before := typed.setdefault((owners[0], key), name)) != name:
                raise UsageError(f"{before} and {name} are one setting, which is given twice; keep one of them.")
            parts[owners[0]][key] = value
        if ambiguous and not unknown:
            name = ambiguous[0]
            owned = " and ".join(f"of plugin {owner}" for owner in self.owners[name])
            long = " or ".join(f"--{long_name(owner, name)}" for owner in self.owners[name])
            raise UsageError(f"Setting {shown(name)} is one {owned}; give {long}.")
        return parts, unknown

    def written(self, owner: str, name: str) -> str:
        """How an owner's setting is written down: by its long name where another plugin has one of that name."""
        return name if owner == CORE or self.owners[name] == [owner] else long_name(owner, name)


def _own_names(classes: Iterable[type]) -> dict[str, str]:
    """Each name and alias of the settings of some classes → the setting's own name."""
    return {name: one.name for cls in classes for one in options_of(cls).values() for name in (one.name, *one.aliases)}


def _names_of(classes: Iterable[type]) -> Iterator[str]:
    yield from _own_names(classes)

"""The project's own plugins, and what each is to the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft.kit.about import excludes
from sft.plugins.discovery import Installed, installed

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def own_plugins() -> dict[str, Any]:
    """The project's plugin classes by name."""
    found = {name: items[0] for name, items in installed().items()}
    return {name: item.entry.load() for name, item in found.items() if (ROOT / "plugins" / folder_of(item)).is_dir()}


def folder_of(item: Installed) -> str:
    """The name of its folder in ``plugins/``."""
    return item.distribution.removeprefix("sft-").replace("-", "_")


def excluded(name: str, plugins: dict[str, Any]) -> list[str]:
    """The plugins that cannot be active together with ``name``, or with what it needs."""
    plugin, found = plugins[name], []
    for other, theirs in plugins.items():
        needs = any(need in theirs.conflicts for need in plugin.requires)
        needs = needs or any(need in plugin.conflicts for need in theirs.requires)
        if other != name and (needs or excludes(plugin, theirs)):
            found.append(other)
    return found

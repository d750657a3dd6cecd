"""From given values to settings and started plugins; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sft.activation import check_numbers, choose, explicit, of_idle_plugins, overruled, switched_off
from sft.compatibility import explain
from sft.plugins import Plugins, entries
from sft.settings import Settings, build, core_options, known_names


def resolve(values: Mapping[str, Any], extra: Iterable[type]) -> tuple[Settings, Plugins, list[tuple[str, str]]]:
    """The settings of a run, its plugins (``extra`` classes among them), started, and the given settings that do
    nothing here, each with the reason. Raises :class:`UsageError` for all that settings alone can get wrong.
    """
    entries.cache_clear()  # what was installed since the last run counts
    names, left = choose(values, core_options())
    check_numbers(values, left)
    active = Plugins.load(names, extra, explicit(values))
    left, idle = of_idle_plugins(left, active, switched_off(values, active.names))
    left, foreign = explain(left, known_names(active))
    settings = build(left, active)
    active.start(settings.options)
    return settings, active, [*foreign, *idle, *overruled(values, core_options())]

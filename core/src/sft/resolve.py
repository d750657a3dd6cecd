"""From given values to settings and started plugins; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sft import hookspecs
from sft.plugins.files import with_files
from sft.plugins.registry import Plugins
from sft.plugins.requests import (
    by_device,
    check_numbers,
    choose_plugins,
    explicit,
    of_idle_plugins,
    overruled,
    switched_off,
)
from sft.settings.arguments import Settings, core_options
from sft.settings.paddlenlp import explain
from sft.settings.reading import build, known_names
from sft.settings.words import shared_settings, without_listeners


def resolve(values: Mapping[str, Any], extra: Iterable[type]) -> tuple[Settings, Plugins, list[tuple[str, str]]]:
    """The settings of a run, its plugins (``extra`` classes among them), started, and the given settings that do
    nothing here, each with the reason. Raises :class:`UsageError` for all that settings alone can get wrong.
    """
    values, files = with_files(values)
    values, unheard = without_listeners(values)
    names, left = choose_plugins(values, core_options(), shared_settings())
    active = Plugins.load(names, hookspecs, [*extra, *files], explicit(values), by_device(values))
    known = known_names(active) - {"plugin"}
    # What asks for one plugin may be another's setting, which that plugin then reads, whatever was asked for.
    left.update({key: value for key, value in values.items() if key in known})
    check_numbers(values, left)
    left, idle = of_idle_plugins(left, active, known, switched_off(values, active.names))
    answered = {name: row for _, plugin in active for name, row in getattr(plugin, "paddlenlp", {}).items()}
    left, foreign = explain(left, known, answered)
    settings = build(left, active)
    active.start(settings.options)
    return settings, active, [*foreign, *unheard, *idle, *overruled(values, known)]

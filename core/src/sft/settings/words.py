"""Settings of the core to whose words plugins add: each says which hook decides (:attr:`sft.options.Option.hook`), and
the plugin that answers it is what the setting is about. Where the setting is a list, each of its words asks for one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sft.errors import UsageError
from sft.foreign_text import shown
from sft.options import Option
from sft.plugins.discovery import ALL_OF_PROJECT
from sft.plugins.marks import implements
from sft.plugins.registry import Plugins
from sft.plugins.requests import ALL, by_words, words_in
from sft.settings.arguments import Settings, core_options

NONE = "none"


def shared_settings() -> dict[str, Option]:
    """Those settings of the core, by name."""
    return {name: option for name, option in core_options().items() if option.hook is not None}


def with_words(option: Option, plugins: Plugins) -> Option:
    """``option`` with the words that installed and active plugins add to its own."""
    if option.hook is None or option.is_list:
        return option
    provider = _provider(option, plugins)
    added = [*sorted(by_words().get(option.name, {})), *([provider] if provider is not None else [])]
    return replace(option, choices=tuple(dict.fromkeys([*(option.choices or ()), *added])))


def words_of(plugins: Plugins, values: Mapping[str, Any]) -> dict[str, str]:
    """Of shared settings, those that an active plugin decides, with its word. Raises :class:`UsageError` where
    ``values`` say something else."""
    found = {}
    for name, option in shared_settings().items():
        if option.is_list:
            _check_listed(name, values.get(name), plugins)
            continue
        provider, words = _provider(option, plugins), by_words().get(name, {})
        given = values.get(name)
        word = str(given).strip().lower()
        if provider is None:
            if given is not None and word in words:
                asked = " or ".join(words[word])
                raise UsageError(f"{name} {word} asks for plugin {asked}, which is switched off; keep one of them.")
            continue
        own = [one for one, names in words.items() if provider in names]
        if given is not None and word not in (*own, provider) and word in with_words(option, plugins).words:
            raise UsageError(
                f"{name} is {word}, and plugin {provider} ({plugins.origin(provider)}) brings another; keep one of "
                "them."
            )
        if given is None or word in (*own, provider):
            found[name] = word if given is not None else own[0] if own else provider
    return found


def _check_listed(name: str, given: Any, plugins: Plugins) -> None:
    """Each word of a setting that is a list asks for a plugin, which must be there."""
    words = by_words().get(name, {})
    for word in words_in(given) if given is not None else ():
        if word in (ALL, NONE):
            continue
        if word not in words:
            close = difflib.get_close_matches(word, words, n=1)
            hint = (
                f"did you mean {close[0]}?" if close else f"pip install the distribution that does ({ALL_OF_PROJECT})."
            )
            raise UsageError(
                f"{name}: no installed plugin brings {shown(word)} (installed: {', '.join(words)}); {hint}"
            )
        if not set(words[word]) & set(plugins.names):
            raise UsageError(
                f"{name} {word} asks for plugin {' or '.join(words[word])}, which is switched off; keep one of them."
            )


def without_listeners(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """``values`` without settings that are lists of plugins' words where no plugin is installed that has one, and those
    with the reason, for files that were written for another program."""
    found = []
    for name, option in shared_settings().items():
        if option.is_list and name in values and not by_words().get(name):
            if {*words_in(values[name])} - {NONE}:
                found.append((f"{name} {values[name]}", f"no plugin is installed that brings it; {ALL_OF_PROJECT}"))
            values = {key: value for key, value in values.items() if key != name}
    return dict(values), found


def without_answer(settings: Settings, name: str) -> None:
    """Give a shared setting its default again, where the plugin that decides about it has said None."""
    option = shared_settings()[name]
    if getattr(settings.training, name) not in (option.choices or ()):
        setattr(settings.training, name, option.default)


def _provider(option: Option, plugins: Plugins) -> str | None:
    return next((name for name, plugin in plugins if implements(plugin, str(option.hook))), None)

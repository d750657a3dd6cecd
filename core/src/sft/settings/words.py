"""Settings of the core to whose words plugins add: each says which hook decides (:attr:`sft.options.Option.hook`), and
the plugin that answers it is what the setting is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sft.errors import UsageError
from sft.options import Option
from sft.plugins.registry import Plugins, implements
from sft.plugins.requests import by_words
from sft.settings.arguments import Settings, core_options


def shared_settings() -> dict[str, Option]:
    """Those settings of the core, by name."""
    return {name: option for name, option in core_options().items() if option.hook is not None}


def with_words(option: Option, plugins: Plugins) -> Option:
    """``option`` with the words that installed and active plugins add to its own."""
    if option.hook is None:
        return option
    provider = _provider(option, plugins)
    added = [*sorted(by_words().get(option.name, {})), *([provider] if provider is not None else [])]
    return replace(option, choices=tuple(dict.fromkeys([*(option.choices or ()), *added])))


def words_of(plugins: Plugins, values: Mapping[str, Any]) -> dict[str, str]:
    """Of shared settings, those that an active plugin decides, with its word. Raises :class:`UsageError` where
    ``values`` say something else."""
    found = {}
    for name, option in shared_settings().items():
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


def without_answer(settings: Settings, name: str) -> None:
    """Give a shared setting its default again, where the plugin that decides about it has said None."""
    option = shared_settings()[name]
    if getattr(settings.training, name) not in (option.choices or ()):
        setattr(settings.training, name, option.default)


def _provider(option: Option, plugins: Plugins) -> str | None:
    return next((name for name, plugin in plugins if implements(plugin, str(option.hook))), None)

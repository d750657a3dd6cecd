"""Distributions of toy plugins: their source, starting them, and what is said when they are refused."""

from __future__ import annotations

from typing import Any

import pytest

import sft
from sft.plugins import Plugins

PLUGIN = """
    import sft

    class Tool(sft.Plugin):
        name = "{name}"
        api_version = 1
        {body}
"""


def plugin(name: str, body: str = "") -> str:
    return PLUGIN.format(name=name, body=body)


def providing(hook: str, given: Any, called: str = "toy") -> type[sft.Plugin]:
    """A plugin whose one hook returns what ``given`` makes of the run."""

    def answer(self: sft.Plugin, run: sft.Run) -> Any:
        return given(run)

    return type("Toy", (sft.Plugin,), {"name": called, "api_version": 1, hook: sft.hookimpl(answer)})


def active(*names: str, extra: tuple[Any, ...] = (), options: dict[str, Any] | None = None) -> Plugins:
    plugins = Plugins.load(names, extra)
    plugins.start(options or {})
    return plugins


def refusal(*names: str, extra: tuple[Any, ...] = ()) -> str:
    with pytest.raises(sft.UsageError) as caught:
        active(*names, extra=extra)
    message = str(caught.value)
    assert "\n" not in message
    return message

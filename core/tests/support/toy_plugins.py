"""Toy plugins: their source as distributions and as classes, starting them, and what is said when they are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import sft
from sft import hookspecs
from sft.plugins.registry import Plugins

PLUGIN = """
    import sft

    class Tool(sft.Plugin):
        name = "{name}"
        api_version = 1
        {body}
"""


def plugin(name: str, body: str = "") -> str:
    return PLUGIN.format(name=name, body=body)


def toy(called: str = "toy", **hooks: Callable[..., Any]) -> type[sft.Plugin]:
    """A plugin of these hooks."""
    marked = {hook: sft.hookimpl(function) for hook, function in hooks.items()}
    return type("Toy", (sft.Plugin,), {"name": called, "api_version": 1, **marked})


def raising(error: BaseException) -> Callable[..., Any]:
    """A hook that does nothing else."""

    def fails(self: Any) -> Any:
        raise error

    return fails


class Publisher(sft.Plugin):
    """Publishes two hooks for its refinements."""

    name = "base"
    api_version = 1

    class hookspecs:  # noqa: N801
        @sft.single
        def base_factor(self, rank: int) -> float:
            """A factor that refinements may change."""

        @sft.hookspec
        def base_seen(self, name: str) -> str:
            """Everybody may answer."""


def providing(hook: str, given: Any, called: str = "toy") -> type[sft.Plugin]:
    """A plugin whose one hook returns what ``given`` makes of the run."""

    def answer(self: sft.Plugin, run: sft.Run) -> Any:
        return given(run)

    return toy(called, **{hook: answer})


def active(*names: str, extra: tuple[Any, ...] = (), options: dict[str, Any] | None = None) -> Plugins:
    plugins = Plugins.load(names, hookspecs, extra)
    plugins.start(options or {})
    return plugins


def refusal(*names: str, extra: tuple[Any, ...] = ()) -> str:
    with pytest.raises(sft.UsageError) as caught:
        active(*names, extra=extra)
    message = str(caught.value)
    assert "\n" not in message
    return message

"""The marks of hooks: those that specifications and implementations get, and what a module or class says by them before
there is an instance of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("sft")
hookimpl = pluggy.HookimplMarker("sft")


def single(function: Any) -> Any:
    """Mark a hook specification that at most one active plugin may implement; its caller gets one result."""
    function.sft_single = True
    return hookspec(firstresult=True)(function)


def hooks_of(specs: Any) -> list[str]:
    """The names of the hooks that a module or class specifies, in its order."""
    if specs is None:
        return []
    names = dict.fromkeys([*vars(specs), *dir(specs)])  # a class may inherit some
    return [name for name in names if hasattr(getattr(specs, name), "sft_spec")]


def single_hooks(specifications: Iterable[Any]) -> list[str]:
    """Those of the hooks that have one place."""
    return [hook for specs in specifications for hook in hooks_of(specs) if hasattr(getattr(specs, hook), "sft_single")]


def implements(plugin: Any, hook: str) -> bool:
    """Whether a plugin class or module implements ``hook``."""
    return hasattr(getattr(plugin, hook, None), "sft_impl")


def provides(plugin: Any, hook: str) -> bool:
    """Whether a plugin class or module answers ``hook`` itself, and does not wrap another's answer alone."""
    return implements(plugin, hook) and not getattr(plugin, hook).sft_impl.get("wrapper")


def needs(plugin: Any, hook: str) -> bool:
    """Whether a plugin implements ``hook`` and does not go without it: one of an optional hook refines nobody."""
    return implements(plugin, hook) and not getattr(plugin, hook).sft_impl.get("optionalhook")

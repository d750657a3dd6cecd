"""What a plugin's class (or module) must declare, checked when it is loaded, before there is an instance."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from sft.errors import UsageError
from sft.options import options_of
from sft.plugins.api import check_version
from sft.plugins.calls import WATCHING


def check_form(plugin: Any, who: str, hooks: list[str]) -> None:
    """Refuse a ``plugin`` that is not well formed; ``who`` names it, ``hooks`` are those that exist in its company. Its
    relations to others have been checked (:func:`check_relations`)."""
    check_version(plugin, who)
    if getattr(plugin, "Options", None) is not None:
        try:
            options_of(plugin.Options)
        except Exception as error:
            cause = f"its Options are no dataclass of settings ({type(error).__name__}: {error})"
            raise UsageError(f"{who} is not well formed: {cause}; upgrade it.") from error
    _check_markers(plugin, who, hooks)
    _check_observer(plugin, who, hooks)


def _check_observer(plugin: Any, who: str, hooks: list[str]) -> None:
    """Who only watches implements events, and nothing that others' answers go through."""
    shaping, observes = getattr(plugin, "shaping", None), getattr(plugin, "observes", False)
    for name, value, words in (("shaping", shaping, (True, False, None)), ("observes", observes, (True, False))):
        if not any(value is word for word in words):
            allowed = ", ".join(map(str, words[:-1])) + f" or {words[-1]}"
            raise UsageError(f"{who} is not well formed: {name} is {value!r}, not {allowed}; upgrade it.")
    if not observes:
        return
    if shaping:
        raise UsageError(f"{who} only watches (observes) and changes what is learned (shaping); take one of them away.")
    for hook in hooks:
        mark = getattr(getattr(plugin, hook, None), "sft_impl", None)
        if mark is None or mark.get("optionalhook"):
            continue
        if hook not in WATCHING or mark.get("wrapper") or mark.get("hookwrapper"):
            what = "wraps others' answers to" if hook in WATCHING else "implements"
            raise UsageError(
                f"{who} only watches (observes = True), and {what} {hook}, which does more; take one of them away."
            )


def check_relations(plugin: Any, who: str) -> None:
    """Refuse a ``plugin`` whose relations to others are of no use; it comes before they are looked at."""
    for key in ("requires", "conflicts", "supersedes", "reads"):
        names = getattr(plugin, key, ())
        is_collection = isinstance(names, (tuple, list, set, frozenset))
        if not is_collection or not all(isinstance(name, str) for name in names):
            raise UsageError(f"{who} is not well formed: {key} is {names!r}, not a tuple of names; upgrade it.")
    order = getattr(plugin, "order", 0)
    if isinstance(order, bool) or not isinstance(order, (int, float)):
        raise UsageError(f"{who} is not well formed: order is {order!r}, not a number; upgrade it.")


def _check_markers(plugin: Any, who: str, hooks: list[str]) -> None:
    """A function that is called like a hook and is not marked as one would never be called."""
    for name in dir(plugin):
        member = getattr(plugin, name, None)
        if not (name.startswith("sft_") or name in hooks) or not inspect.isroutine(member):
            continue
        if hasattr(member, "sft_impl"):
            continue
        if name in hooks:
            raise UsageError(f"{who} has {name} without @sft.hookimpl, so it is never called; put that above it.")
        hint = meant(name, hooks) or "; give it another name."
        raise UsageError(
            f"{who} has {name}, and a name that begins with sft_ is that of a hook, which this is not{hint}"
        )


def meant(name: str, hooks: Iterable[str]) -> str:
    """What to add about a name that is nearly that of a hook."""
    close = difflib.get_close_matches(name, list(hooks), n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else ""


def in_order(classes: dict[str, Any], canonical: Any) -> dict[str, Any]:
    """The plugins in the order in which their hooks are called: each after those that it requires; of those that may
    come next, the one of the lowest ``order``, then the one that was requested first."""
    left = dict(sorted(classes.items(), key=lambda pair: getattr(pair[1], "order", 0)))
    needs = {name: {*map(canonical, getattr(plugin, "requires", ()))} & {*left} for name, plugin in left.items()}
    found: dict[str, Any] = {}
    while left:
        free = next((name for name in left if not needs[name] - {*found}), None)
        if free is None:
            circle = _circle(needs, found)
            if len(circle) == 1:
                raise UsageError(f"Plugin {circle[0]} requires itself; upgrade it.")
            raise UsageError(f"Plugins {' and '.join(circle)} require each other; upgrade them.")
        found[free] = left.pop(free)
    return found


def _circle(needs: dict[str, set[str]], done: Iterable[str]) -> list[str]:
    """Plugins each of which requires the next, and the last the first."""
    name, path = next(name for name in needs if name not in {*done}), []
    while name not in path:
        path.append(name)
        name = min(needs[name] - {*done})
    return path[path.index(name) :]

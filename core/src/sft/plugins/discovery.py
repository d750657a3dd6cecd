"""What is installed: plugins and requests as their distributions declare them, read from metadata alone, and imported
one at a time when they are asked for.

A plugin is an entry point ``NAME = module:object`` in the group ``sft.plugins``; the object is a subclass of
:class:`sft.Plugin`, or a module with the same attributes. ``requests.py`` decides which of them a run requests.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, metadata
from typing import Any

from sft.errors import UsageError
from sft.plugins.declarations import check_relations


@dataclass(frozen=True)
class Installed:
    """An entry point, of a plugin or of a request for one, and the distribution that declares it; nothing has been
    imported."""

    entry: EntryPoint
    distribution: str
    version: str

    @property
    def name(self) -> str:
        """The plugin's name."""
        return canonical(self.entry.name)

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}"


def canonical(name: str) -> str:
    """Plugin names are the same with ``-`` and ``_``, in upper and lower case."""
    return name.strip().replace("_", "-").lower()


@functools.cache
def entries(group: str) -> tuple[Installed, ...]:
    """The entry points of a group. Distributions are searched, and their metadata read, once for a run."""
    found = []
    for entry in entry_points(group=group):
        # Asked for its name, a distribution reads and parses its file each time.
        about = entry.dist.metadata if entry.dist else {"Name": "unknown", "Version": "unknown"}
        found.append(Installed(entry, about["Name"], about["Version"]))
    return tuple(found)


LEFT_OUT = "SFT_DISABLE_PLUGINS"
"""The variable of the environment that names plugins which are to be as if they were not installed; ``*``: all."""


def installed() -> dict[str, list[Installed]]:
    """Every declared plugin by name, without those that the environment leaves out; more than one under a name is a
    conflict, reported when it is requested."""
    out = _named_out()
    return {name: items for name, items in _everything().items() if name not in out and "*" not in out}


def left_out() -> str | None:
    """What the environment leaves out of what is installed, as a clause; None if it names nothing."""
    out = _named_out()
    if not out:
        return None
    there = _everything()
    gone = [name for name in there if "*" in out or name in out]
    unknown = sorted(out - {*there} - {"*"})
    clause = f"{LEFT_OUT} leaves out {', '.join(gone) or 'nothing'}"
    return clause if not unknown else f"{clause}, and names {', '.join(unknown)}, which is not installed"


def _named_out() -> set[str]:
    return {canonical(name) for name in os.environ.get(LEFT_OUT, "").split(",") if name.strip()}


def _everything() -> dict[str, list[Installed]]:
    by_name: dict[str, list[Installed]] = {}
    for item in entries("sft.plugins"):
        same = by_name.setdefault(item.name, [])
        # A path that stands twice in sys.path lists its distributions twice.
        if all((item.origin, item.entry.value) != (other.origin, other.entry.value) for other in same):
            same.append(item)
    return dict(sorted(by_name.items()))


REQUESTS = (
    *("setting", "value", "number", "environment", "adapter", "path", "command", "device", "advice", "source"),
    "export",
)
"""The kinds of request that ``requests.py`` knows, which come before the first dot."""


def dependencies(plugins: Iterable[str]) -> list[str]:
    """What the distributions of the installed ones among ``plugins`` depend on, by name."""
    distributions = [item.entry.dist for name in plugins for item in installed().get(name, ())]
    requirements = [text for one in distributions if one is not None for text in one.requires or ()]
    names = (re.match(r"[\w.-]+", text) for text in requirements if "extra ==" not in text)
    return sorted({name[0] for name in names if name})


def strange_requests() -> dict[str, list[str]]:
    """By distribution, what is wrong with entry points in ``sft.requests`` that can never ask for a plugin."""
    objects = {(item.distribution, item.entry.value) for items in _everything().values() for item in items}
    faults: dict[str, list[str]] = {}
    for request in entries("sft.requests"):
        entry, distribution = request.entry, request.distribution
        kind, _, what = entry.name.partition(".")
        if kind not in REQUESTS:
            close = difflib.get_close_matches(kind, REQUESTS, n=1)
            hint = f"did you mean {close[0]}.{what}?" if close else f"there are {', '.join(REQUESTS)}."
            faults.setdefault(distribution, []).append(f"the request {entry.name!r}, which is of no known kind; {hint}")
        elif not what or (kind == "value" and "." not in what):
            full = "value.X.V" if kind == "value" else f"{kind}.X"
            faults.setdefault(distribution, []).append(f"the request {entry.name!r}, which lacks a part of {full}.")
        elif (distribution, entry.value) not in objects:
            faults.setdefault(distribution, []).append(
                f"the request {entry.name!r} for {entry.value}, which is no plugin of its own; add it to sft.plugins."
            )
    return faults


def import_plugin(name: str) -> Any:
    """The class or module of an installed plugin; :class:`UsageError` if it is missing, broken or doubled."""
    return imported(find(name, installed()))


def with_refined(name: str) -> list[str]:
    """The installed plugin ``name`` after what it ``requires``, and what that requires."""
    ordered: list[str] = []
    waiting = [name]
    while waiting:
        one = waiting.pop()
        if one not in ordered and one in installed():
            ordered.insert(0, one)
            waiting += map(canonical, getattr(import_plugin(one), "requires", ()))
    return ordered


def find(name: str, available: Mapping[str, list[Installed]]) -> Installed:
    items = available.get(name, [])
    if not items and name in _everything() and name not in installed():
        raise UsageError(f"Plugin {name} is left out by {LEFT_OUT}; take it out of that variable of the environment.")
    if not items:
        near = difflib.get_close_matches(name, [*available, *extras()], n=1)
        hint = f"{cure(name)}." if name in extras() or not near else f"did you mean {_near(near[0], available)}?"
        listed = ", ".join(available) or "none"
        raise UsageError(f"Plugin {name} is not installed (installed: {listed}); {hint}")
    if len(items) > 1:
        listed = " and ".join(f"{item.origin} ({item.entry.value})" for item in items)
        raise UsageError(f"Plugin {name} is provided twice, by {listed}; pip uninstall one of them.")
    return items[0]


PROJECT = "paddle-sft"
"""The distribution with an extra for each plugin of the project, by the plugin's name."""

_NO_PLUGINS = ("all", "cpu", "gpu", "test", "dev")

ALL_OF_PROJECT = f"pip install '{PROJECT}[all]' brings those of the project"


def of_absent_plugin() -> str:
    """What to add, as a clause, where a plugin that is not installed would know a name; nothing where all of the
    project's are."""
    there = _everything()
    if extras() and all(name in there for name in extras()):
        return ""
    return f"; if it is that of a plugin which is not installed, {ALL_OF_PROJECT}"


@functools.cache
def extras() -> tuple[str, ...]:
    """The names of the project's plugins, installed or not, as the metadata of its distribution says; none where that
    is not installed, which a core alone is."""
    try:
        named = metadata(PROJECT).get_all("Provides-Extra") or ()
    except PackageNotFoundError:
        return ()
    return tuple(canonical(name) for name in named if name not in _NO_PLUGINS)


def cure(name: str) -> str:
    """How the plugin ``name``, which is not installed, gets there: a clause."""
    installing = f"pip install '{PROJECT}[{name}]'"
    if name in extras():
        return f"{installing} brings it"
    if not extras() and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        return f"{installing} brings it if it is one of the project's; of another, pip install its distribution"
    return "pip install the distribution that provides it"


def _near(name: str, available: Mapping[str, list[Installed]]) -> str:
    return name if name in available else f"{name} ({cure(name)})"


def is_of(item: Installed, plugin: Any) -> bool:
    """Whether ``plugin`` is the installed one itself."""
    try:
        return imported(item) is plugin
    except UsageError:  # broken, which does not matter where it is not used
        return False


def imported(item: Installed) -> Any:
    try:
        plugin = item.entry.load()
    except (Exception, SystemExit) as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(
            f"Plugin {item.name} of {item.origin} cannot be imported ({cause}); "
            f"pip install --upgrade --force-reinstall {item.distribution}, or leave the plugin out."
        ) from error
    declared = getattr(plugin, "name", None)
    if not isinstance(declared, str) or canonical(declared) != item.name:
        raise UsageError(
            f"Plugin {item.name} of {item.origin} names itself {declared!r}; its entry point and its name differ: "
            f"pip install --upgrade {item.distribution}."
        )
    check_relations(plugin, f"Plugin {item.name} ({item.origin})")
    return plugin

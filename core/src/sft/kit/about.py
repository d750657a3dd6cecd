"""What plugins declare, as data: for ``sft plugins``, its JSON, and ``sft plugins info``.

Here a plugin is imported, which must bring no paddle; one that cannot be is a row that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

from sft import hookspecs
from sft.errors import SftError, UsageError
from sft.language import package_of
from sft.options import Option, options_of
from sft.plugins.api import declared_version
from sft.plugins.calls import WATCHING
from sft.plugins.declarations import check_form, check_relations
from sft.plugins.discovery import (
    REQUESTS,
    Installed,
    canonical,
    find,
    import_plugin,
    imported,
    installed,
    strange_requests,
)
from sft.plugins.files import is_file, name_of, read_plugin_file
from sft.plugins.marks import hooks_of, implements, needs, provides, single_hooks
from sft.plugins.origins import origin_of
from sft.plugins.registry import Plugins
from sft.plugins.requests import requests

KINDS = {
    "sft_export_adapter": "adapter",
    "sft_quantizer": "quantizer",
    "sft_attention_backend": "attention",
    "sft_collator": "collator",
    "sft_kernels": "kernels",
    "sft_parallel_strategy": "parallel",
    "sft_model_family": "family",
    "sft_data_source": "source",
    "sft_export": "export",
    "sft_record_format": "format",
    "sft_optimizer": "optimizer",
    "sft_schedule": "schedule",
    "sft_objective": "objective",
    "sft_token_loss": "objective",
    "sft_commands": "command",
}
"""What a plugin is called that implements a hook."""


@dataclass(frozen=True)
class About:
    """One plugin. Where it cannot be loaded, ``fault`` says why, and what it would have declared is empty.

    Attributes:
        kinds: What it is: the seams that it provides, ``refines NAME``, ``observer`` (it only watches: ``observes``),
            ``events`` (it is told what happens, and may ask the run to stop, save or evaluate), or ``change``.
        conflicts: Those that it cannot be active with, whichever of the two says so.
        also_requested_by: Ways of asking for it beside its name, as ``setting X``.
        hooks: The hooks that it implements.
        publishes: Those that it publishes for others.
        package: Where its code is, and the table of its texts in other languages.
        shapes: Whether it changes what is learned.
    """

    name: str
    origin: str
    distribution: str | None = None
    version: str | None = None
    kinds: tuple[str, ...] = ()
    summary: str = ""
    reference: str = ""
    api_version: int | str | None = None
    requires: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    supersedes: tuple[str, ...] = ()
    also_requested_by: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    publishes: tuple[str, ...] = ()
    package: str = ""
    options: tuple[Option, ...] = ()
    shapes: bool | None = None
    fault: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """It as JSON values; of each option its name, default and help."""
        options = [
            {"name": option.name, "default": option.default, "help": option.help, "aliases": list(option.aliases)}
            for option in self.options
        ]
        values = {**asdict(self), "options": options}
        del values["package"]  # which is for this program's own words
        return values


@dataclass(frozen=True)
class Found:
    """A plugin that is installed, or in a file; ``plugin`` is its class or module, None where a ``fault`` keeps it from
    being one."""

    name: str
    origin: str
    item: Installed | None
    plugin: Any
    fault: str | None


def found() -> list[Found]:
    """Every installed plugin, imported; one that two distributions provide is there twice, with that as its fault."""
    rows, strange = [], strange_requests()
    for name, items in installed().items():
        for item in items:
            plugin, fault = _checked(f"Plugin {name} ({item.origin})", partial(_loaded, item, strange))
            if len(items) > 1:
                others = " and ".join(one.origin for one in items if one is not item)
                fault = f"{others} provides a plugin of this name too; pip uninstall one of them."
            rows.append(Found(name, item.origin, item, plugin, fault))
    return rows


def find_plugin(name: str) -> Found:
    """The plugin that is asked for by ``name``, or by the path of its file; :class:`UsageError` if there is none."""
    if is_file(name):
        plugin = read_plugin_file(name)
        checked, fault = _checked(f"Plugin {name_of(plugin)} ({origin_of(plugin)})", lambda: plugin)
        return Found(name_of(plugin), origin_of(plugin), None, checked, fault)
    for row in found():
        if row.name == canonical(name):
            return row
    find(canonical(name), installed())  # which says that it is not there
    raise AssertionError(name)


def load(name: str) -> Any:
    """Import the plugin that is asked for by ``name``, or by the path of its file, and nothing else."""
    return read_plugin_file(name) if is_file(name) else import_plugin(canonical(name))


def _loaded(item: Installed, strange: Mapping[str, list[str]]) -> Any:
    for fault in strange.get(item.distribution, ()):
        raise UsageError(f"{item.distribution} declares {fault}")
    return imported(item)


def _checked(who: str, load: Callable[[], Any]) -> tuple[Any, str | None]:
    """What ``load`` gives, and why it is no plugin, if it is none."""
    try:
        plugin = load()
        check_relations(plugin, who)
        published = {*hooks_of(hookspecs), *hooks_of(getattr(plugin, "hookspecs", None))}
        check_form(plugin, who, sorted(published))
        return plugin, None
    except SftError as error:
        return None, str(error)


def all_plugins(shapes: bool = True) -> list[About]:
    """What every installed plugin declares; without ``shapes``, which takes longest, where nobody asks for it."""
    rows, ways = found(), _ways()
    return [about(row, rows, ways, shapes) for row in rows]


def _ways() -> dict[str, tuple[str, ...]]:
    """By plugin, the ways of asking for it beside its name."""
    asking = [(f"{kind} {what}", names) for kind in REQUESTS for what, names in requests(kind).items()]
    return {name: tuple(way for way, names in asking if name in names) for name in installed()}


def about(
    row: Found, company: Iterable[Found], ways: Mapping[str, tuple[str, ...]] | None = None, shapes: bool = True
) -> About:
    """What a plugin declares; it may implement hooks that those in its ``company`` publish. ``ways`` are those of
    asking for each, where they are known."""
    name, plugin, item = row.name, row.plugin, row.item
    basis = About(
        name,
        row.origin,
        distribution=item.distribution if item is not None else None,
        version=item.version if item is not None else None,
        also_requested_by=(_ways() if ways is None else ways).get(name, ()) if item is not None else (),
        fault=row.fault,
    )
    if plugin is None:
        return basis
    others = {one.name: one.plugin for one in company if one.plugin is not None and one.name != name}
    published = {other: hooks_of(getattr(one, "hookspecs", None)) for other, one in others.items()}
    own = [hook for hook in hooks_of(hookspecs) if implements(plugin, hook)]
    of_others = [(other, hook) for other, hooks in published.items() for hook in hooks if implements(plugin, hook)]
    declared = getattr(plugin, "Options", None)
    requires = _names(plugin, "requires")
    refined = [*requires, *(other for other, hook in of_others if needs(plugin, hook))]
    return replace(
        basis,
        kinds=_kinds(plugin, own, list(dict.fromkeys(refined))),
        summary=str(getattr(plugin, "summary", "")),
        reference=str(getattr(plugin, "reference", "")),
        api_version=declared_version(plugin),
        requires=requires,
        conflicts=tuple(other for other, one in others.items() if excludes(plugin, one)),
        supersedes=_names(plugin, "supersedes"),
        hooks=(*own, *dict.fromkeys(hook for _, hook in of_others)),
        publishes=tuple(hooks_of(getattr(plugin, "hookspecs", None))),
        package=package_of(plugin),
        options=tuple(options_of(declared).values()) if declared is not None else (),
        shapes=_shapes(name, plugin, requires, others) if shapes else None,
    )


def _kinds(plugin: Any, hooks: Sequence[str], refined: Sequence[str]) -> tuple[str, ...]:
    kinds = list(dict.fromkeys(kind for hook, kind in KINDS.items() if hook in hooks))
    kinds += [f"refines {name}" for name in refined]
    if not kinds and hooks and set(WATCHING).issuperset(hooks):
        kinds = ["observer" if getattr(plugin, "observes", False) else "events"]
    return tuple(kinds or ["change"])


def _shapes(name: str, plugin: Any, requires: Iterable[str], company: Mapping[str, Any]) -> bool | None:
    """Whether a run counts it among what decides what is learned; None where it cannot be active here."""
    needed = [company[other] for other in requires if other in company]
    try:
        return canonical(name) in Plugins.load([], hookspecs, [plugin, *needed]).shaping()
    except SftError:
        return None


def excludes(plugin: Any, other: Any) -> bool:
    """Whether two plugins cannot be active together: one of them says so, or both provide what has one place."""
    declared = canonical(other.name) in _names(plugin, "conflicts") or canonical(plugin.name) in _names(
        other, "conflicts"
    )
    return declared or any(provides(plugin, hook) and provides(other, hook) for hook in _places())


@cache
def _places() -> list[str]:
    """The core's hooks that one active plugin may implement."""
    return single_hooks([hookspecs])


def ties(rows: Iterable[About]) -> list[str]:
    """Sentences on adapters that several plugins read alike, so that the user has to choose."""
    claims: dict[str, list[str]] = {}
    for row in rows:
        for way in row.also_requested_by:
            kind, _, what = way.partition(" ")
            if kind == "adapter" and row.name not in claims.setdefault(what, []):
                claims[what].append(row.name)
    return [
        f"adapters of {what} are read by {' and by '.join(names)}; choose with --plugin NAME or --plugin no:NAME"
        for what, names in claims.items()
        if len(names) > 1
    ]


def _names(plugin: Any, key: str) -> tuple[str, ...]:
    return tuple(canonical(name) for name in getattr(plugin, key, ()))

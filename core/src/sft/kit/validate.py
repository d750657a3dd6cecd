"""``sft plugins validate``: whether what a plugin declares holds, beside everything else that is installed.

Each check is a function that yields what it finds: a fault is what a user would run into, a note is what an author
would want to know.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sft import hookspecs
from sft.errors import SftError, UsageError
from sft.kit.about import Found, excludes, find_plugin, found
from sft.options import options_of
from sft.plugins.calls import annotations_of
from sft.plugins.discovery import canonical, installed
from sft.plugins.marks import hooks_of, implements
from sft.plugins.registry import Plugins
from sft.plugins.requests import requests, switches
from sft.plugins.trial import no_records, trial_of
from sft.settings.arguments import core_options, long_name

SLOWEST = 0.5
"""Seconds of the processor that an import may take: `--help` and listings wait for it."""
HEAVY = ("paddle", "paddlenlp", "torch", "transformers", "datasets")
"""Packages that nobody imports just to see what there is."""


@dataclass
class Findings:
    """What was found of one plugin; pairs of the check's name and a sentence."""

    name: str
    origin: str
    faults: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """It as JSON values."""
        rows = {
            kind: [{"check": check, "text": text} for check, text in found]
            for kind, found in (("faults", self.faults), ("notes", self.notes))
        }
        return {"name": self.name, "origin": self.origin, "valid": not self.faults, **rows}


def validated(name: str) -> list[Findings]:
    """What is found of the plugin that is asked for by ``name`` or by a file's path; two rows where it is there twice.
    :class:`UsageError` if it is not there."""
    company = found()
    rows = [row for row in company if row.name == canonical(name)] or [find_plugin(name)]
    return [_findings(row, name, company) for row in rows]


def _findings(row: Found, asked: str, company: list[Found]) -> Findings:
    findings = Findings(row.name, row.origin)
    if row.fault is not None:
        findings.faults.append(("declaration", row.fault))
    if row.plugin is None:
        return findings
    others = {one.name: one.plugin for one in company if one.plugin is not None and one.name != row.name}
    for check, texts in (
        ("import", _import(asked)),
        ("hooks", _hooks(row, others)),
        ("arguments", _arguments(row.plugin, others.values())),
        ("settings", _options(row, others)),
        ("words", _words(row.plugin)),
        ("certify", _trial(row.plugin)),
    ):
        findings.faults += [(check, text) for text in texts]
    for check, texts in (
        ("settings", _shared(row, others)),
        ("relations", _relations(row)),
        ("words", _more(row)),
        ("certify", _untried(row.plugin)),
    ):
        findings.notes += [(check, text) for text in texts]
    return findings


# --- faults -------------------------------------------------------------------------------------------------

_IMPORT = """
import json, sys, time
sys.path[:] = json.loads(sys.argv[2])
import sft, sft.kit.about
before, began = set(sys.modules), time.process_time()
sft.kit.about.load(sys.argv[1])
took = time.process_time() - began
print(json.dumps([took, sorted({name.partition(".")[0] for name in set(sys.modules) - before})]))
"""


def _import(asked: str) -> Iterator[str]:
    """How long it takes in a process of its own, and what else that brings."""
    line = [sys.executable, "-c", _IMPORT, asked, json.dumps(sys.path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield f"a process that imports it alone ends with: {last}"
        return
    took, modules = json.loads(done.stdout.splitlines()[-1])
    heavy = [name for name in HEAVY if name in modules]
    if heavy:
        yield f"importing it imports {', '.join(heavy)}; import that inside hooks, so that listings stay instant."
    elif took > SLOWEST:
        yield f"importing it takes {took:.1f} s, and {SLOWEST} s are allowed; import what is slow inside hooks."


def _hooks(row: Found, others: dict[str, Any]) -> Iterator[str]:
    """Whether it can be active together with what it requires, with its defaults."""
    options = getattr(row.plugin, "Options", None)
    try:
        defaults = options() if options is not None else None
    except Exception as error:
        yield f"its Options refuse their own defaults ({type(error).__name__}: {error})."
        return
    try:
        needed = [others[name] for name in _needed(row.plugin, others)]
        active = Plugins.load([], hookspecs, [row.plugin, *needed])
        active.start({row.name: defaults, **{name: _defaults(others[name]) for name in active.names if name in others}})
    except SftError as error:
        yield str(error)


def _needed(plugin: Any, others: dict[str, Any]) -> list[str]:
    """What a plugin requires, and what that requires, of what is there."""
    names: list[str] = []
    waiting = [canonical(name) for name in getattr(plugin, "requires", ())]
    while waiting:
        name = waiting.pop()
        if name in others and name not in names:
            names.append(name)
            waiting += map(canonical, getattr(others[name], "requires", ()))
    return names


def _defaults(plugin: Any) -> Any:
    options = getattr(plugin, "Options", None)
    return options() if options is not None else None


def _arguments(plugin: Any, others: Iterable[Any]) -> Iterator[str]:
    """Whether the types that a hook's arguments are annotated with are those that they have."""
    for specs in (hookspecs, *(getattr(one, "hookspecs", None) for one in others), getattr(plugin, "hookspecs", None)):
        for hook in hooks_of(specs):
            if not implements(plugin, hook):
                continue
            theirs, ours = annotations_of(getattr(plugin, hook)), annotations_of(getattr(specs, hook))
            for name in [name for name in theirs if name in ours]:
                if _differ(theirs[name], ours[name]):
                    what = "returns" if name == "return" else f"takes {name} as"
                    yield f"{hook} {what} {_called(theirs[name])}, and the hook says {_called(ours[name])}."


def _differ(one: Any, other: Any) -> bool:
    """Whether two annotations are classes that have nothing to do with each other."""
    if not (inspect.isclass(one) and inspect.isclass(other)) or {one, other} & {object, Any}:
        return False
    try:
        return not (issubclass(one, other) or issubclass(other, one))
    except TypeError:  # a protocol with attributes: any class may keep it
        return False


def _called(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def _options(row: Found, others: dict[str, Any]) -> Iterator[str]:
    """Names of settings that the core or a switch has, settings without help, and defaults that are no values."""
    core = {name for one in core_options().values() for name in (one.name, *one.aliases)}
    asking = {name for name, names in switches().items() if names != [row.name]}
    for name in _settings(row.plugin):
        if name in core:
            yield f"{name} is a setting of the core; give it a name of its own, such as {_prefixed(row, name)}."
        elif name == row.name.replace("-", "_") or name in asking:
            yield f"{name} switches a plugin on, so it would never get a value; call it {_prefixed(row, name)}."
    for other in _needed(row.plugin, others):
        for name in sorted(_settings(row.plugin) & _settings(others[other])):
            yield f"{name} is a setting of plugin {other}, which it requires; call it {_prefixed(row, name)}."
    declared = getattr(row.plugin, "Options", None)
    for option in options_of(declared).values() if declared is not None else ():
        if not option.help:
            yield f"{option.name} has no help; make it with sft.option(default, help)."


def _prefixed(row: Found, name: str) -> str:
    return f"{row.name.replace('-', '_')}_{name}"


def _settings(plugin: Any) -> set[str]:
    declared = getattr(plugin, "Options", None)
    options = options_of(declared).values() if declared is not None else ()
    return {name for one in options for name in (one.name, *one.aliases)}


def _words(plugin: Any) -> Iterator[str]:
    """What listings show."""
    summary = getattr(plugin, "summary", "")
    if not isinstance(summary, str) or not summary.strip():
        yield "it has no summary; set summary to one line for listings."
    elif "\n" in summary or len(summary) > 120:
        yield "its summary is longer than a line of 120 characters; shorten it."


def _trial(plugin: Any) -> Iterator[str]:
    """What sft certify would refuse."""
    try:
        trial = trial_of(plugin)
    except UsageError as error:
        yield str(error)
        return
    for name in trial.options:
        if name not in _settings(plugin):
            yield f"certify has a value for option {name}, which the plugin has not; take it out."


# --- notes --------------------------------------------------------------------------------------------------


def _shared(row: Found, others: dict[str, Any]) -> Iterator[str]:
    """Settings that another plugin has too, with which it could be active."""
    own = _settings(row.plugin)
    for name, plugin in others.items():
        shared = sorted(own & _settings(plugin))
        if shared and name not in _needed(row.plugin, others) and not excludes(row.plugin, plugin):
            yield (
                f"plugin {name} has {', '.join(shared)} too, so with it users must write "
                f"{long_name(row.name, shared[0])}; names that begin with the plugin's own do not meet."
            )


def _relations(row: Found) -> Iterator[str]:
    known = installed()
    for key in ("requires", "conflicts", "supersedes"):
        for name in map(canonical, getattr(row.plugin, key, ())):
            if name not in known:
                yield f"{key} names {name}, which is not installed here, so nothing of that was checked."


def _more(row: Found) -> Iterator[str]:
    if not str(getattr(row.plugin, "reference", "")).strip():
        yield "it has no reference; where a paper or page defines the technique, name it."
    if not (vars(row.plugin).get("__doc__") or "").strip():
        yield "it has no docstring; say in one sentence what it does."
    if row.item is not None and row.item.entry.dist is not None and not row.item.entry.dist.metadata["Summary"]:
        yield "its distribution has no description; add one to its pyproject.toml."
    claims = {what: names for what, names in requests("adapter").items() if row.name in names and len(names) > 1}
    for what, names in claims.items() if row.item is not None else ():
        also = " and ".join(name for name in names if name != row.name)
        yield f"adapters of {what} are read by {also} too, so users must choose; a claim adapter.TYPE.K says more."


def _untried(plugin: Any) -> Iterator[str]:
    try:
        said = no_records(plugin)
    except UsageError:
        return  # a fault, which is said
    if said is not None:
        yield f"sft certify cannot try it, for {said}"

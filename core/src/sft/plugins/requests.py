"""Which plugins a run, an adapter folder or a typed command requests, decided from metadata alone.

Beside ``--plugin NAME`` and the setting ``name: true``, a distribution may declare other ways of asking for a
plugin, as entry points in the group ``sft.requests`` that name the same object as the plugin's own:

=====================  ======================================================================================
``setting.X``          setting X is true (a switch of another name; nobody else reads X)
``value.X.V``          setting X is V, or V is among its words; X belongs to the plugin's options, or is a setting of
                       the core that is open to plugins (``optim``, ``lr_scheduler_type``, ``report_to``)
``number.X``           setting X is a number other than -1, 0 and 1 (a degree, a factor); likewise
``environment.X``      the process's environment has X, a number above 1 (a launcher started several)
``source.SCHEME``      ``dataset_name_or_path`` names a place that begins with ``SCHEME://``
``adapter.TYPE``       an adapter folder of that ``peft_type`` is opened
``adapter.TYPE.K``     likewise, and K is true in its ``adapter_config.json``
``adapter.TYPE.K.V``   likewise, and K is V there
``device.KIND``        a model is computed on a device of that kind (``cpu`` or ``gpu``); only a wish: the plugin
                       stays out beside one that the user asks for and that it does not go together with
``path.X``             ``--X FOLDER`` gives an adapter folder of any type to a command, as ``--adapter_path`` does
``advice.memory``      a run is about to begin, or has run out of memory (``sft_memory_need``, ``sft_memory_advice``)
``export.FORM``        ``sft export --to FORM`` is typed
``command.X``          ``sft X`` is typed (``command.demo``: ``sft demo`` shows this plugin)
=====================  ======================================================================================

One plugin reads an adapter folder: of the claims that match, one that says more than the type goes before one of the
type alone, and among equals the user decides (``--plugin NAME`` or ``--plugin no:NAME``).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sft.dataset_names import schemes
from sft.errors import UsageError
from sft.options import Option, convert, items_in, options_of
from sft.plugins.discovery import ALL_OF_PROJECT, canonical, entries, import_plugin, installed
from sft.plugins.registry import Plugins
from sft.runtime import likely_device

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_NOTHING = ("", "none", "null", *_FALSE)
_NONE_SHARED: Mapping[str, Option] = MappingProxyType({})


def requests(kind: str) -> dict[str, list[str]]:
    """Of one kind of request, what is asked for → names of the plugins that answer."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, items in installed().items():
        for item in items:
            names.setdefault((item.distribution, item.entry.value), []).append(name)
    answering: dict[str, list[str]] = {}
    for request in entries("sft.requests"):
        head, _, what = request.entry.name.partition(".")
        if head == kind:
            for name in names.get((request.distribution, request.entry.value), []):
                if name not in answering.setdefault(what, []):
                    answering[what].append(name)
    return answering


def choose_plugins(
    values: Mapping[str, Any], known: Iterable[str], shared: Mapping[str, Option] = _NONE_SHARED
) -> tuple[list[str], dict[str, Any]]:
    """Which plugins ``values`` request, in order, and the values that are left for the settings.

    ``known`` holds names of the core's settings, which are never taken for a plugin's switch; of these, ``shared`` are
    open to words of plugins.
    """
    left = dict(values)
    named, off = by_name(left.pop("plugin", []))
    switch_of, numbers, cases = switches(), requests("number"), by_words()
    by_setting = _by_settings(left, known, shared)
    wanted = [name for names in by_setting.values() for name in names]
    switched_off: set[str] = set()
    for key in [key for key in left if key in switch_of and key not in set(known)]:
        del left[key]
        if not by_setting[key]:
            switched_off.update(switch_of[key])
    for name in sorted(off - set(installed())):
        raise UsageError(f"Plugin {name}, which no:{name} switches off, is not installed{_close(name)}")
    for key, names in requests("environment").items():
        if os.environ.get(key, "").isdecimal() and int(os.environ[key]) > 1:
            wanted += names
    opening = requests("source")
    for scheme in schemes(left.get("dataset_name_or_path")) if opening else ():
        wanted += opening.get(scheme, [])
    wanted += named
    chosen = [name for name in dict.fromkeys(wanted) if name not in off]
    for name in switched_off.intersection(chosen):
        raise UsageError(f"Plugin {name} is requested and its switch is false; keep one of them.")
    for key in {*numbers, *cases} - set(known):
        # A value that requests nothing belongs to nobody who is there to read it.
        readers = [*numbers.get(key, []), *(name for names in cases.get(key, {}).values() for name in names)]
        if not any(name in chosen for name in readers):
            left.pop(key, None)
    return chosen, left


def by_device(values: Mapping[str, Any]) -> list[str]:
    """The plugins that wish to be active on the device that ``values`` name, or else on the one that paddle would
    choose; without those that are switched off."""
    _, off = by_name(values.get("plugin", []))
    off |= {*switched_off(values, ())}
    kind = str(values.get("device") or likely_device()).partition(":")[0]
    return [name for name in requests("device").get(kind, []) if name not in off]


def overruled(values: Mapping[str, Any], known: Iterable[str]) -> list[tuple[str, str]]:
    """Given settings that ask for a plugin and do nothing, since ``no:NAME`` switches it off, with that reason."""
    (_, off), pairs = by_name(values.get("plugin", [])), []
    for key, names in _by_settings(values, known).items():
        if names and off.issuperset(names):
            pairs.append((f"{key} {values[key]}", " and ".join(f"no:{name} switches that off" for name in names)))
    return pairs


def check_numbers(values: Mapping[str, Any], left: Mapping[str, Any]) -> None:
    """Refuse a number that :func:`choose_plugins` took away because it asks for no plugin, if no plugin would accept it
    either."""
    for key, names in requests("number").items():
        if key in left or values.get(key) is None:
            continue
        for name in names:
            try:
                declared = options_of(import_plugin(name).Options)
            except Exception:
                continue  # of a plugin that nobody asks for
            for option in declared.values():
                if key in (option.name, *option.aliases) and str(values[key]).lower() not in ("", "none", "null"):
                    convert(option, values[key])


def choose_reader(folder: Path, config: Mapping[str, Any], requested: Iterable[str]) -> str:
    """The plugin that reads the adapter in ``folder``, whose ``adapter_config.json`` is ``config``; ``requested`` are
    the names, and ``no:`` names, that the user gives. :class:`UsageError` where there is none, or not one alone."""
    claims: dict[str, int] = {}
    refused: dict[str, list[str]] = {}
    for claim, names in requests("adapter").items():
        matches = _claims(claim, config)
        for name in names:
            if matches:
                claims[name] = max(claims.get(name, 0), 1 + ("." in claim))
            else:
                refused.setdefault(name, []).append(claim)
    named, off = by_name(list(requested))
    kind = config["peft_type"]
    for name in named:
        if name in refused and name not in claims:
            raise UsageError(
                f"Plugin {name} does not read {folder}, a {kind} adapter (it reads {', '.join(refused[name])}); leave "
                "it out."
            )
    left = {name: rank for name, rank in claims.items() if name not in off}
    if not left:
        if claims:
            raise UsageError(
                f"{folder} is a {kind} adapter, and what reads it is left out; take away "
                f"{' or '.join(f'--plugin no:{name}' for name in claims)}."
            )
        known = ", ".join(requests("adapter")) or "none"
        raise UsageError(
            f"{folder} is a {kind} adapter, which no installed plugin reads (installed: {known}); {ALL_OF_PROJECT}."
        )
    chosen = {name: rank for name, rank in left.items() if name in named} or left
    best = sorted(name for name, rank in chosen.items() if rank == max(chosen.values()))
    if len(best) > 1:
        raise UsageError(
            f"{folder} is a {kind} adapter, which {origins(best)} read; choose with "
            f"{' or '.join(f'--plugin {name}' for name in best)}, or leave others out with --plugin no:NAME."
        )
    return best[0]


def _claims(claim: str, config: Mapping[str, Any]) -> bool:
    """Whether ``TYPE``, ``TYPE.K`` or ``TYPE.K.V`` says what stands in an adapter's config."""
    kind, _, rest = claim.partition(".")
    key, _, value = rest.partition(".")
    if kind != str(config["peft_type"]):
        return False
    return not key or str(config.get(key)).lower() == (value.lower() or "true")


def origins(names: Iterable[str]) -> str:
    """Installed plugins as a list in a sentence, with their distributions and versions."""
    return " and ".join(f"{name} ({installed()[name][0].origin})" for name in names)


def switched_off(values: Mapping[str, Any], chosen: Iterable[str]) -> list[str]:
    """Plugins that a given setting could have requested and did not: ``name: false``, or another value of X."""
    ways = {**switches(), **requests("number")}
    for key, cases in by_words().items():
        ways[key] = [*ways.get(key, []), *(name for names in cases.values() for name in names)]
    askable = [name for key, names in ways.items() if key in values for name in names]
    return [name for name in dict.fromkeys(askable) if name not in chosen]


def of_idle_plugins(
    values: Mapping[str, Any], active: Plugins, known: set[str], off: Iterable[str]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """``values`` without options of plugins that are not active, and those options with the reason; ``known`` are the
    names that the core and the active plugins read.

    Of the plugins in ``off``, which a setting switches off, that is any option; of the others, one that has its default
    (PaddleNLP's files are full of them). Another value asks for a plugin, and is left for the error that says so.
    """
    idle = {}
    unknown = [key for key in values if key not in known]
    # Only what a name points to is imported.
    stems = {name: name.replace("-", "_") for name in active.inactive()}
    named = [name for name, stem in stems.items() if any(key.startswith((f"{stem}_", f"{stem}.")) for key in unknown)]
    for name in dict.fromkeys([*off, *named]):
        try:
            declared = getattr(import_plugin(name), "Options", None)
        except UsageError:
            continue  # it is broken and not asked for: a setting of its own will be unknown, which names it
        for option in options_of(declared).values() if declared is not None else ():
            names = (option.name, *option.aliases)
            for key in (*names, *(f"{name.replace('-', '_')}.{one}" for one in names)):
                if key not in values or key in known:
                    continue
                if name in off:
                    idle[key] = f"plugin {name} is switched off"
                elif convert(option, values[key]) == option.default:
                    idle[key] = f"it is the default of plugin {name}, which is not asked for"
    pairs = [(f"{key} {values[key]}", idle[key]) for key in values if key in idle]
    return {key: value for key, value in values.items() if key not in idle}, pairs


def explicit(values: Mapping[str, Any]) -> set[str]:
    """The plugins that ``values`` request by name."""
    return set(by_name(values.get("plugin", []))[0])


def _by_settings(
    values: Mapping[str, Any], known: Iterable[str], shared: Mapping[str, Option] = _NONE_SHARED
) -> dict[str, list[str]]:
    """Of the settings that can request plugins, those that are given, with the plugins that each requests now."""
    core, asked_for = set(known), {}
    for key, names in switches().items():
        if key in values and key not in core:
            asked_for[key] = list(names) if _switch(key, values[key], names) else []
    numbers, cases = requests("number"), by_words()
    for key in values:
        if key in core and key not in shared:
            continue
        if key in core:  # whose own words the core knows
            words = cases.get(key, {})
            given = words_in(values[key])
            asked = [*words] if ALL in given and shared[key].is_list else given
            asked_for[key] = [name for word in asked for name in words.get(word, [])]
        elif key not in asked_for and (key in numbers or key in cases):
            asked_for[key] = _by_value(key, values[key], numbers.get(key, []), cases.get(key, {}))
    return asked_for


def by_name(value: Any) -> tuple[list[str], set[str]]:
    """The plugins that ``value``, a name or a list of names, asks for, and those that its ``no:NAME`` leaves out."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"plugin: expected a name or a list of names, got {value!r}.")
    named = [canonical(name) for name in names if name.strip()]
    off = {name for name in named if name.startswith("no:")}
    return [name for name in named if name not in off], {canonical(name.removeprefix("no:")) for name in off}


def switches() -> dict[str, list[str]]:
    """Setting → plugins: each plugin's own name, and its ``setting.X``."""
    by_setting = {name.replace("-", "_"): [name] for name in installed()}
    for key, names in requests("setting").items():
        by_setting[key] = list(dict.fromkeys([*by_setting.get(key, []), *names]))
    return by_setting


def by_words() -> dict[str, dict[str, list[str]]]:
    """Setting → word → the plugins that it asks for (``value.X.V``)."""
    by_value: dict[str, dict[str, list[str]]] = {}
    for what, names in requests("value").items():
        key, _, needed = what.partition(".")
        by_value.setdefault(key, {}).setdefault(needed.lower(), []).extend(names)
    return by_value


ALL = "all"
"""A word of a setting that is a list: every plugin that there is for it."""


def words_in(value: Any) -> list[str]:
    """The words of a setting that is a word, or a list of words."""
    parts = value if isinstance(value, (list, tuple)) else items_in(str(value))
    return [word for part in parts if (word := str(part).strip().lower())]


def _switch(key: str, value: Any, names: list[str]) -> bool:
    text = str(value).lower()
    if value is None:
        return False
    if not isinstance(value, (bool, int, str)) or text not in (*_TRUE, *_FALSE):
        raise UsageError(f"{key}: expected true or false (it switches plugin {', '.join(names)}), got {value!r}.")
    return text in _TRUE


def _by_value(key: str, value: Any, by_number: list[str], cases: dict[str, list[str]]) -> list[str]:
    text = str(value).strip().lower()
    if by_number:
        try:
            return by_number if float(text) not in (-1.0, 0.0, 1.0) else []
        except ValueError:
            if not cases and text not in _NOTHING:
                raise UsageError(f"{key}: expected a number, got {value!r}.") from None
    words = [word for word in text.replace(",", " ").split() if word in cases]  # "stage2 offload": a word may ask
    if words:
        return [name for word in words for name in cases[word]]
    if text not in _NOTHING:
        known = ", ".join(sorted(cases))
        raise UsageError(
            f"{key}: expected {f'a number, or {known}' if by_number else f'one of {known}'}, got {value!r}."
        )
    return []


def _close(name: str) -> str:
    close = difflib.get_close_matches(name, installed(), n=1)
    return f"; did you mean no:{close[0]}?" if close else "."

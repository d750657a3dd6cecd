"""docs/reference/: what there is, read from the code."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from making.chinese import Say, as_it_is
from making.project import ROOT, own_plugins
from sft import hookspecs
from sft.commands.cli import COMMANDS
from sft.context import members
from sft.language import package_of
from sft.options import Option, options_of
from sft.plugins.discovery import installed
from sft.plugins.requests import requests
from sft.settings.arguments import GROUPS, core_options
from sft.settings.paddlenlp import FOREIGN, Foreign

PUBLIC = ("sft", "sft.parallel", "sft.testing")
EXAMPLES = {
    "docs/*.md": "../{name}",
    "examples/*/src/**/*.py": "../../examples/{folder}",
    "core/src/sft/kit/templates/*/plugin.py.template": "../kit.md#a-package",
}
"""Where hooks are shown to authors, and where the reference links to for that. Each is run by a test: blocks of pages
by what tests/test_code_blocks.py names, examples and templates by tests of their own."""


def settings_page(say: Say = as_it_is) -> str:
    lines = [f"# {say('Settings')}", "", say("Made by `make docs` from the code."), ""]
    for group, cls in GROUPS.items():
        heading = say(f"{group.capitalize()} arguments")
        lines += [f"## {heading}", "", say((cls.__doc__ or "").strip()), "", *_table(cls, say, "sft")]
    for plugin in own_plugins().values():
        if plugin.Options is not None:
            package = package_of(plugin)
            lines += [f"## {say('Plugin')} `{plugin.name}`", "", say(plugin.summary, package), ""]
            lines += _table(plugin.Options, say, package)
    return "\n".join(lines)


def _table(cls: type, say: Say, package: str) -> list[str]:
    rows = [
        f"| `{o.name}` | {_default(o, say)} | {say(o.help, package).replace('|', chr(92) + '|')} |"
        for o in options_of(cls).values()
    ]
    return [f"| {say('setting')} | {say('default')} | {say('meaning')} |", "|---|---|---|", *rows, ""]


def _cell(text: str) -> str:
    """``text`` on one line, in Markdown's spelling, for a table."""
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


def _default(option: Option, say: Say) -> str:
    return say("unset") if option.default in (None, []) else f"`{option.default}`"


def hooks_page() -> str:
    lines = ["# Hooks", "", "In the order in which a run calls them. Made by `make docs` from `hookspecs.py`.", ""]
    lines += ["## What `run` has", ""]
    lines += [
        "`run` is `sft.Run`. Each member exists from one hook on, and in all that are called later; reading it in an "
        "earlier one raises `sft.TooEarlyError`, which names that hook.",
        "",
    ]
    lines += ["| member | from which hook on | what it is |", "|---|---|---|"]
    lines += [f"| `run.{name}` | `{hook}` | {_cell(meaning)} |" for name, (hook, meaning) in members().items()]
    lines += [""]
    lines += _hooks(hookspecs, "##", _members_by_hook())
    for name, plugin in own_plugins().items():
        if plugin.hookspecs is None:
            continue
        lines += [f"## Published by plugin `{name}`", ""]
        lines += ["Its refinements implement them; each is called where that plugin needs the answer.", ""]
        lines += _hooks(plugin.hookspecs, "###")
    return "\n".join(lines)


def _members_by_hook() -> dict[str, str]:
    """For each hook of the core that is given ``run``, which of its members exist by then."""
    known: list[str] = []
    sentences = {}
    for hook, function in vars(hookspecs).items():
        if not hasattr(function, "sft_spec"):
            continue
        known += [name for name, (since, _) in members().items() if since == hook]
        if "run" in inspect.signature(function).parameters:
            names = ", ".join(f"`{name}`" for name in known)
            sentences[hook] = "all its members" if len(known) == len(members()) else names
    sentences["sft_run_failed"] = "those members that it had when the run failed"
    return sentences


def _hooks(specs: Any, heading: str, members_by: Mapping[str, str] | None = None) -> list[str]:
    lines = []
    for name, function in vars(specs).items():
        if not hasattr(function, "sft_spec"):
            continue
        kind = "one plugin at most" if getattr(function, "sft_single", False) else "all active plugins"
        if kind.startswith("all") and function.sft_spec["firstresult"]:
            kind = "all active plugins, until one does not say None"
        signature = str(inspect.signature(function)).replace("'", "")
        lines += [f"{heading} `{name}`", "", f"`{name}{signature}`", "", f"Answered by: {kind}.", ""]
        if members_by and name in members_by:
            lines += [f"`run` has by then: {members_by[name]}.", ""]
        lines += [inspect.getdoc(function) or "", ""]
        lines += [f"Shown in {', '.join(examples_of(name))}.", ""]
    return lines


def examples_of(hook: str) -> list[str]:
    """A link to each page, example and kind of new plugin that implements ``hook``."""
    found: dict[str, None] = {}
    for pattern, target in EXAMPLES.items():
        for path in sorted(ROOT.glob(pattern)):
            if f"def {hook}(" in path.read_text(encoding="utf-8"):
                folder = path.relative_to(ROOT).parts[1]
                name = {"docs": path.name, "examples": f"examples/{folder}"}.get(path.relative_to(ROOT).parts[0])
                shown = name or f"`sft plugins new --kind {path.parent.name}`"
                found[f"[{shown}]({target.format(name=path.name, folder=folder)})"] = None
    return list(found)


def commands_page(say: Say = as_it_is) -> str:
    lines = [f"# {say('Commands')}", "", say("Made by `make docs` from the code."), ""]
    lines += [f"| {say('command')} | {say('what it does')} |", "|---|---|"]
    lines += [f"| `sft {name}` | {say(text)} |" for name, text in COMMANDS.items()]
    return "\n".join([*lines, ""])


def paddlenlp_page(say: Say = as_it_is) -> str:
    sys.path.insert(0, str(ROOT / "tests"))
    from effects import EFFECTS, ELSEWHERE

    lines = [
        "# " + say("PaddleNLP's settings"),
        "",
        say("Made by `make docs` from tests/effects.py and the code."),
        say("A settings file of `run_finetune.py` runs as it is: `sft run lora_argument.json`."),
        "",
        say("Two defaults differ: `do_train` is true, and `do_eval` unset: dev data is measured where there is some."),
        "",
        f"## {say('Honoured')}",
        "",
        say("Each has a test that sees its effect: where none is named, `tests/test_each_setting.py`."),
        "",
        _row(map(say, ("setting", "effect", "read by", "test"))),
        "|---|---|---|---|",
    ]
    for name in sorted({*EFFECTS, *ELSEWHERE}):
        text = EFFECTS[name].text if name in EFFECTS else ELSEWHERE[name][0]
        test = f"`{ELSEWHERE[name][1].partition('::')[2]}`" if name in ELSEWHERE else ""
        lines.append(f"| `{name}` | {say(text)} | {_reader(name, say)} | {test} |")
    lines += [
        "",
        f"## {say('Without effect')}",
        "",
        say("Named in one list when a run begins. Any other value than those given is an error."),
        "",
        _row(map(say, ("setting", "values", "why"))),
        "|---|---|---|",
    ]
    hidden = ("", "null", "none", "no", "off", "yes", "on")
    said = [(name, replace(foreign, reason=say(foreign.reason))) for name, foreign in FOREIGN.items()]
    for name, foreign in sorted([*said, *_answered(say)], key=lambda row: row[0]):
        if name in {*EFFECTS, *ELSEWHERE}:  # a plugin reads it
            continue
        shown = ", ".join(value for value in foreign.harmless or () if value not in hidden)
        lines.append(f"| `{name}` | {shown if foreign.harmless is not None else say('any')} | {foreign.reason} |")
    return "\n".join([*lines, ""])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _answered(say: Say) -> list[tuple[str, Foreign]]:
    """The rows of plugins, each with the names of those that have it."""
    whose: dict[tuple[str, Foreign], list[str]] = {}
    for plugin, cls in own_plugins().items():
        for row in getattr(cls, "paddlenlp", {}).items():
            whose.setdefault(row, []).append(f"`{plugin}`")
    return [
        (name, replace(row, reason=f"{say('with')} {say(' or ').join(plugins)}{say(': ')}{say(row.reason)}"))
        for (name, row), plugins in whose.items()
    ]


def _reader(name: str, say: Say) -> str:
    """Who reads a setting: the core, or the plugins that it switches on or that declare it."""
    if name in core_options():
        return say("the core")
    found = list(requests("setting").get(name, []))
    for plugin, items in installed().items():
        declared = getattr(items[0].entry.load(), "Options", None)
        if plugin.replace("-", "_") == name or (declared is not None and name in options_of(declared)):
            found.append(plugin)
    return ", ".join(f"`{plugin}`" for plugin in dict.fromkeys(found))


def public_page() -> str:
    """Every name of the public modules, with the first sentence of what it says of itself."""
    lines = [
        "# Public names",
        "",
        "Made by `make docs` from the code: what plugins may import. `help(sft.NAME)` says all.",
    ]
    for name in PUBLIC:
        module = importlib.import_module(name)
        lines += ["", f"## `{name}`", "", _first(module, "\n\n"), "", "| name | what it is |", "|---|---|"]
        lines += [
            f"| `{name}.{one}` | {_first(getattr(module, one))} |" for one in sorted(module.__all__, key=str.lower)
        ]
    return "\n".join([*lines, ""])


def _first(value: Any, end: str = ". ") -> str:
    """The first sentence (or another beginning) of a docstring; of a plain value, the value."""
    if isinstance(value, (int, str)):
        return f"`{value}`"
    text = (inspect.getdoc(value) or "").partition("\n\n")[0]
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", " ".join(text.split())).replace("``", "`").replace("|", "\\|")
    return text.partition(end)[0].rstrip(".:")

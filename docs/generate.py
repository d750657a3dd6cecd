"""Write docs/reference/, what is generated in docs/zh, and the READMEs' tables; ``--check`` says whether they are
current."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft import hookspecs
from sft.certify.certify import CHECKS
from sft.commands.cli import COMMANDS
from sft.context import members
from sft.kit.about import all_plugins, excludes
from sft.language import package_of, table
from sft.options import Option, options_of
from sft.plugins.discovery import Installed, installed
from sft.plugins.requests import requests
from sft.settings.arguments import GROUPS, core_options
from sft.settings.paddlenlp import FOREIGN, Foreign

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "reference"
PUBLIC = ("sft", "sft.parallel", "sft.testing")
CHINESE_PAGES = ROOT / "docs" / "zh"
WORDS = json.loads((CHINESE_PAGES / "words.json").read_text(encoding="utf-8"))
"""What tables say in both languages; the help of settings and commands is in the tables of :mod:`sft.language`."""

Say = Callable[..., str]
"""A text of a package (by default the core's) in the language of a page."""


def as_it_is(text: str, package: str = "sft") -> str:
    return text


def in_chinese(text: str, package: str = "sft") -> str:
    return str(WORDS.get(text) or table(package, "zh").get(text) or table("sft", "zh").get(text, text))


def own_plugins() -> dict[str, Any]:
    """The project's plugin classes by name."""
    found = {name: items[0] for name, items in installed().items()}
    return {name: item.entry.load() for name, item in found.items() if (ROOT / "plugins" / _folder(item)).is_dir()}


def _folder(item: Installed) -> str:
    return item.distribution.removeprefix("sft-").replace("-", "_")


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
    return lines


def commands_page(say: Say = as_it_is) -> str:
    lines = [f"# {say('Commands')}", "", say("Made by `make docs` from the code."), ""]
    lines += [f"| {say('command')} | {say('what it does')} |", "|---|---|"]
    lines += [f"| `sft {name}` | {say(text)} |" for name, text in COMMANDS.items()]
    return "\n".join([*lines, ""])


CHINESE = {
    **{"adapter": "适配器", "quantizer": "量化器", "attention": "注意力", "collator": "数据整理", "kernels": "算子"},
    **{"parallel": "并行策略", "family": "模型族", "source": "数据来源", "export": "导出", "format": "数据格式"},
    **{"optimizer": "优化器", "schedule": "学习率", "objective": "优化目标", "command": "命令"},
    **{"observer": "观察", "events": "事件", "change": "改动", "refines": "改进"},
}
"""The kinds of `sft plugins`."""


def plugin_table(chinese: bool) -> str:
    """What each plugin is, needs, excludes and replaces: read from its declarations."""
    plugins, rows_of = own_plugins(), {row.name: row for row in all_plugins(shapes=False)}
    heads = ("插件", "发行包", "类别", "需要", "不能同时使用", "取代") if chinese else (
        "plugin", "distribution", "kind", "needs", "not with", "replaces",
    )  # fmt: skip
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, plugin in plugins.items():
        item = installed()[name][0]
        link = f"[{item.distribution}](plugins/{_folder(item)})"
        kinds = ", ".join(rows_of[name].kinds)
        if chinese:  # "refines NAME" is of two words
            each = (kind.partition(" ") for kind in rows_of[name].kinds)
            kinds = "、".join(f"{CHINESE[kind]}{space}{of}" for kind, space, of in each)
        cells = (_names(plugin.requires), _names(excluded(name, plugins)), _names(plugin.supersedes))
        rows.append(f"| `{name}` | {link} | {kinds} | {' | '.join(cells)} |")
    return "\n".join(rows)


CERTIFIED = ROOT / "docs" / "certified"
BESIDE = "works beside"
_CELLS = {"holds": "+", "refused": "–", "not tried": "○", "fails": "✗"}


def reports() -> dict[str, dict[str, Any]]:
    """What `sft certify` found of the project's plugins (`make certify`), by name."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(CERTIFIED.glob("*.json")))
    return {report["plugin"]: report for report in found}


def matrix() -> str:
    """Which plugins work together, as it was measured: a row and a column each."""
    plugins, measured = own_plugins(), reports()
    rows = ["| | " + " | ".join(f"`{name}`" for name in plugins) + " |", "|---|" + ":-:|" * len(plugins)]
    for name in plugins:
        cells = [
            "" if other == name else "needs" if other in plugins[name].requires else together(name, other, measured)
            for other in plugins
        ]
        never = excluded(name, plugins)
        cells = ["–" if one == "○" and o in never else one for one, o in zip(cells, plugins, strict=True)]
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def together(name: str, other: str, measured: Mapping[str, dict[str, Any]]) -> str:
    """What the reports of two plugins say of each other: one that fails goes first, then one that
    holds: what one of them needs, such as an adapter, may be beside in one report alone."""
    found = {_beside(measured.get(one), of) for one, of in ((name, other), (other, name))}
    return next((sign for sign in ("✗", "+", "–") if sign in found), "○")


def _beside(report: dict[str, Any] | None, other: str) -> str:
    if report is None:
        return "○"
    if other in report["company"]:
        return "+" if report["holds"] else "○"
    return next((_CELLS[r["status"]] for r in report["rows"] if r["check"] == BESIDE and r["case"] == other), "○")


def certify_page() -> str:
    """docs/certify.md with its tables made anew: of the checks, and of the faults."""
    path = ROOT / "docs" / "certify.md"
    checks = ["| check | what must hold |", "|---|---|"]
    checks += [f"| {one.name} | {one.sentence} |" for one in CHECKS]
    faults = json.loads((ROOT / "docs" / "certify.json").read_text(encoding="utf-8"))
    general = {one.name for one in CHECKS}
    caught = [one for one in faults.values() if one["caught"]]
    own = sum(one["caught"]["check"] not in general for one in caught)
    said = [
        f"**{len(caught)} of {len(faults)} are caught** ({len(caught) / len(faults):.0%}), {len(caught) - own} of them "
        f"by the checks above and {own} by the plugin's own formula.",
        "",
        "| fault | plugin | what is wrong | caught by |",
        "|---|---|---|---|",
    ]
    for name, fault in faults.items():
        found = fault["caught"]
        by = "**missed**"
        if found:
            case = f" ({found['case']})" if found["case"] else ""
            by = f"{found['check']}{case}" if found["check"] in general else f"its own formula: {found['check']}"
        said.append(f"| {name} | `{fault['plugin']}` | {fault['wrong']} | {by} |")
    text = path.read_text(encoding="utf-8")
    for key, lines in (("checks", checks), ("faults", said)):
        text = re.sub(rf"(<!-- {key} -->\n).*?(<!-- end -->)", rf"\1{_escaped(lines)}\n\2", text, flags=re.DOTALL)
    return text


REGION = re.compile(r"<!-- (?!en |end )([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)


def chinese_page(path: Path, english: str) -> str:
    """A page of docs/zh with what is generated in the English one: its figures as they are, its words in Chinese."""
    found = iter(REGION.findall(english))

    def filled(match: re.Match[str]) -> str:
        name, text = next(found, (match[1], match[2]))
        return f"<!-- {name} -->\n{''.join(map(_in_chinese, text.splitlines(keepends=True)))}<!-- end -->"

    return REGION.sub(filled, path.read_text(encoding="utf-8"))


_CAUGHT = re.compile(
    r"\*\*(.*) of (.*) are caught\*\* \((.*)\), (.*) of them by the checks above and (.*) by the plugin's own formula\."
)


def _in_chinese(line: str) -> str:
    """A line of what is generated. A link leads from a folder below."""
    line = line.replace("](../", "](../../")
    line = re.sub(r"^Not measured yet: (`.*`) does it\.$", r"尚未测量：用 \1 测量。", line)
    line = _CAUGHT.sub(r"**\2 个中发现了 \1 个**（\3），其中 \4 个由上面的检查发现，\5 个由插件自己的公式发现。", line)
    if not line.startswith("| "):
        return line
    cells = line.rstrip("\n").split("|")
    return "|".join(f" {in_chinese(cell.strip())} " if cell.strip() else cell for cell in cells) + "\n"


def influence_page() -> str:
    """docs/influence.md with what scripts/leave_one_out.py has measured."""
    text = (ROOT / "docs" / "influence.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "docs" / "influence.json").read_text(encoding="utf-8"))
    out, planted = found["left out"], found["planted"]
    rows = {
        name: out[key] for name, key in (("`tracin`", "tracin"), ("`adam`", "adam"), ("another seed", "other seed"))
    }
    tables = {
        "left-out": [
            "| runs | records | answers | score | rank correlation | 95 % interval |",
            "|---|---|---|---|---|---|",
            *(
                f"| {out['runs']} | {out['records']} | {out['answers']} | {name} | {one['mean']:.2f} "
                f"| {one['low']:.2f} – {one['high']:.2f} |"
                for name, one in rows.items()
            ),
        ],
        "planted": [
            "| facts | records of each | other records | passes | `tracin` | `adam` |",
            "|---|---|---|---|---|---|",
            f"| {planted['facts']} | {planted['records each']} | {planted['others']} | {planted['passes']:,} "
            f"| {planted['tracin']:.0%} | {planted['adam']:.0%} |",
        ],
    }
    for key, lines in tables.items():
        text = re.sub(rf"(<!-- {key} -->\n).*?(<!-- end -->)", rf"\1{_escaped(lines)}\n\2", text, flags=re.DOTALL)
    return text


def _escaped(lines: list[str]) -> str:
    return "\n".join(lines).replace("\\", r"\\")


def excluded(name: str, plugins: dict[str, Any]) -> list[str]:
    """The plugins that cannot be active together with ``name``, or with what it needs."""
    plugin, found = plugins[name], []
    for other, theirs in plugins.items():
        needs = any(need in theirs.conflicts for need in plugin.requires)
        needs = needs or any(need in plugin.conflicts for need in theirs.requires)
        if other != name and (needs or excludes(plugin, theirs)):
            found.append(other)
    return found


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def with_table(readme: str) -> str:
    """The README with its plugin table made anew."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    table = plugin_table(chinese=readme.endswith("_zh.md"))
    text = re.sub(r"(<!-- plugins -->\n).*?(\n<!-- end -->)", rf"\1{table}\2", text, flags=re.DOTALL)
    return re.sub(r"(<!-- matrix -->\n).*?(\n<!-- end -->)", rf"\1{matrix()}\2", text, flags=re.DOTALL)


def paddlenlp_page() -> str:
    sys.path.insert(0, str(ROOT / "tests"))
    from effects import EFFECTS, ELSEWHERE

    lines = [
        "# PaddleNLP's settings",
        "",
        "Made by `make docs` from tests/effects.py and the code. A settings file of `run_finetune.py` runs as it is:",
        "`sft run lora_argument.json`.",
        "",
        "Two defaults differ: `do_train` is true, and `do_eval` unset: dev data is measured where there is some.",
        "",
        "## Honoured",
        "",
        "Each has a test that sees its effect: where none is named, `tests/test_each_setting.py`.",
        "",
        "| setting | effect | read by | test |",
        "|---|---|---|---|",
    ]
    for name in sorted({*EFFECTS, *ELSEWHERE}):
        text = EFFECTS[name].text if name in EFFECTS else ELSEWHERE[name][0]
        test = f"`{ELSEWHERE[name][1].partition('::')[2]}`" if name in ELSEWHERE else ""
        lines.append(f"| `{name}` | {text} | {_reader(name)} | {test} |")
    lines += [
        "",
        "## Without effect",
        "",
        "Named in one list when a run begins. Any other value than those given is an error.",
        "",
        "| setting | values | why |",
        "|---|---|---|",
    ]
    hidden = ("", "null", "none", "no", "off", "yes", "on")
    for name, foreign in sorted([*FOREIGN.items(), *_answered()], key=lambda row: row[0]):
        if name in {*EFFECTS, *ELSEWHERE}:  # a plugin reads it
            continue
        shown = ", ".join(value for value in foreign.harmless or () if value not in hidden)
        lines.append(f"| `{name}` | {shown if foreign.harmless is not None else 'any'} | {foreign.reason} |")
    return "\n".join([*lines, ""])


def _answered() -> list[tuple[str, Foreign]]:
    """The rows of plugins, each with the names of those that have it."""
    whose: dict[tuple[str, Foreign], list[str]] = {}
    for plugin, cls in own_plugins().items():
        for row in getattr(cls, "paddlenlp", {}).items():
            whose.setdefault(row, []).append(f"`{plugin}`")
    return [
        (name, replace(row, reason=f"with {' or '.join(plugins)}: {row.reason}"))
        for (name, row), plugins in whose.items()
    ]


def _reader(name: str) -> str:
    """Who reads a setting: the core, or the plugins that it switches on or that declare it."""
    if name in core_options():
        return "the core"
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


PAGES = {
    "public.md": public_page,
    "settings.md": settings_page,
    "paddlenlp.md": paddlenlp_page,
    "hooks.md": hooks_page,
    "commands.md": commands_page,
}


def main(check: bool) -> int:
    for folder in (FOLDER, CHINESE_PAGES / "reference"):
        folder.mkdir(exist_ok=True)
    pages = {FOLDER / name: page() for name, page in PAGES.items()}
    pages[ROOT / "docs" / "certify.md"] = certify_page()
    pages[ROOT / "docs" / "influence.md"] = influence_page()
    pages[CHINESE_PAGES / "reference" / "settings.md"] = settings_page(in_chinese)
    pages[CHINESE_PAGES / "reference" / "commands.md"] = commands_page(in_chinese)
    for path in CHINESE_PAGES.glob("*.md"):
        english = ROOT / "docs" / path.name
        pages[path] = chinese_page(path, pages.get(english) or english.read_text(encoding="utf-8"))
    pages.update({ROOT / readme: with_table(readme) for readme in ("README.md", "README_zh.md")})
    stale = [path for path, text in pages.items() if not _same(path, text)]
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    if check:
        print(f"stale: {names}; run make docs" if stale else "all pages are current")
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages[path].rstrip() + "\n", encoding="utf-8")
    print(f"wrote {names or 'nothing, all pages are current'}")
    return 0


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8").rstrip() == text.rstrip()


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))

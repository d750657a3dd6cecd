"""The tables of README.md and README_zh.md: the plugins, and which of them work together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from making.chinese import Say
from making.project import DOCS, ROOT, excluded, folder_of, own_plugins
from making.regions import filled
from sft.kit.about import all_plugins
from sft.plugins.discovery import installed

CERTIFIED = DOCS / "certified"
BESIDE = "works beside"
IN_COMPANY = ("learns", "resumes", "reloads", "merges")
"""What a plugin is tried for beside another one, of which each is also a check of its own."""
_CELLS = {"holds": "+", "refused": "–", "not tried": "○", "fails": "✗"}
_HEADS = ("plugin", "distribution", "kind", "needs", "not with", "replaces")


def with_tables(readme: str, say: Say) -> str:
    """The README with its tables made anew."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    return filled(text, {"plugins": plugin_table(say), "matrix": matrix()})


def plugin_table(say: Say) -> list[str]:
    """What each plugin is, needs, excludes and replaces: read from its declarations."""
    plugins, rows_of = own_plugins(), {row.name: row for row in all_plugins(shapes=False)}
    rows = ["| " + " | ".join(map(say, _HEADS)) + " |", "|" + "---|" * len(_HEADS)]
    for name, plugin in plugins.items():
        item = installed()[name][0]
        link = f"[{item.distribution}](plugins/{folder_of(item)})"
        words = (kind.partition(" ") for kind in rows_of[name].kinds)  # "refines NAME" is of two
        kinds = say(", ").join(f"{say(kind)}{space}{of}" for kind, space, of in words)
        cells = (_names(plugin.requires), _names(excluded(name, plugins)), _names(plugin.supersedes))
        rows.append(f"| `{name}` | {link} | {kinds} | {' | '.join(cells)} |")
    return rows


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def reports() -> dict[str, dict[str, Any]]:
    """What `sft certify` found of the project's plugins (`make certify`), by name."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(CERTIFIED.glob("*.json")))
    return {report["plugin"]: report for report in found}


def matrix() -> list[str]:
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
    return rows


def together(name: str, other: str, measured: Mapping[str, dict[str, Any]]) -> str:
    """What the reports of two plugins say of each other: one that fails goes first, then one that holds: what one of
    them needs, such as an adapter, may be beside in one report alone."""
    found = {_beside(measured.get(one), of) for one, of in ((name, other), (other, name))}
    return next((sign for sign in ("✗", "+", "–") if sign in found), "○")


def _beside(report: dict[str, Any] | None, other: str) -> str:
    if report is None:
        return "○"
    if other in report["company"]:  # all its runs have it, so its own checks are of both
        held = {row["check"] for row in report["rows"] if row["status"] == "holds"}
        return "✗" if not report["holds"] else "+" if held >= {*IN_COMPANY} else "○"
    return next((_CELLS[r["status"]] for r in report["rows"] if r["check"] == BESIDE and r["case"] == other), "○")

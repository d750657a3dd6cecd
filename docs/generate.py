"""Write docs/reference/ from the code: settings, hooks and commands. ``--check`` says whether they are current."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from sft import hookspecs
from sft.commands import COMMANDS
from sft.options import Option, options_of
from sft.plugins import Plugins, installed
from sft.settings import GROUPS

FOLDER = Path(__file__).parent / "reference"


def settings_page() -> str:
    lines = ["# Settings", "", "Made by `make docs` from the code.", ""]
    for group, cls in GROUPS.items():
        lines += [f"## {group.capitalize()} arguments", "", (cls.__doc__ or "").strip(), "", *_table(cls)]
    own = [name for name, items in installed().items() if items[0].distribution.startswith("sft-")]
    for _, plugin in Plugins.load(own):
        if plugin.Options is not None:
            lines += [f"## Plugin `{plugin.name}`", "", plugin.summary, "", *_table(plugin.Options)]
    return "\n".join(lines)


def _table(cls: type) -> list[str]:
    rows = [f"| `{o.name}` | {_default(o)} | {o.help.replace('|', chr(92) + '|')} |" for o in options_of(cls).values()]
    return ["| setting | default | meaning |", "|---|---|---|", *rows, ""]


def _default(option: Option) -> str:
    return "unset" if option.default in (None, []) else f"`{option.default}`"


def hooks_page() -> str:
    lines = ["# Hooks", "", "In the order in which a run calls them. Made by `make docs` from `hookspecs.py`.", ""]
    for name, function in vars(hookspecs).items():
        if not name.startswith("sft_"):
            continue
        kind = "one plugin at most" if getattr(function, "sft_single", False) else "all active plugins"
        if kind.startswith("all") and function.sft_spec["firstresult"]:
            kind = "all active plugins, until one does not say None"
        signature = str(inspect.signature(function)).replace("'", "")
        lines += [
            f"## `{name}`",
            "",
            f"`{name}{signature}`",
            "",
            f"Answered by: {kind}.",
            "",
            inspect.getdoc(function) or "",
            "",
        ]
    return "\n".join(lines)


def commands_page() -> str:
    lines = ["# Commands", "", "Made by `make docs` from the code.", "", "| command | what it does |", "|---|---|"]
    lines += [f"| `sft {name}` | {text} |" for name, text in COMMANDS.items()]
    return "\n".join([*lines, ""])


PAGES = {"settings.md": settings_page, "hooks.md": hooks_page, "commands.md": commands_page}


def main(check: bool) -> int:
    FOLDER.mkdir(exist_ok=True)
    stale = [name for name, page in PAGES.items() if not _same(FOLDER / name, page())]
    if check:
        print(f"stale: {', '.join(stale)}; run make docs" if stale else "docs/reference is current")
        return 1 if stale else 0
    for name in stale:
        (FOLDER / name).write_text(PAGES[name]().rstrip() + "\n", encoding="utf-8")
    print(f"wrote {', '.join(stale) or 'nothing, all current'} in {FOLDER}")
    return 0


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8").rstrip() == text.rstrip()


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))

"""Draw what `sft data` shows in a terminal and in a page, as pictures for docs/data.md; ``--check`` says whether they
are current.

The near duplicates in them need datasketch, which the extra `test` brings.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import MONOKAI

from sft.data_report.gather import Wanted, data_report
from sft.data_report.page import page
from sft.data_report.terminal import write_figures, write_records
from sft.data_report.value import DataReport

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "core" / "src" / "sft" / "demo"
TEMPLATE = ROOT / "core" / "tests" / "fixtures" / "templates" / "qwen3_tools.jinja"
FOLDER = ROOT / "docs" / "images"
WIDTH = 118
PAGE = (1000, 1130)
"""Pixels of the picture of a page, which is cut there."""

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
RECORD = {
    "tools": [TOOL],
    "messages": [
        {"role": "user", "content": "Do I need a coat in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": '{"degrees": 3, "rain": true}'},
        {"role": "assistant", "content": "Yes, it rains, and has 3 degrees."},
    ],
}


def figures(records: int = 0, data: str = "data") -> DataReport:
    """The demo's data, of which some does not fit, with so many of its records."""
    return _report(records, dataset_name_or_path=data, max_length=64, plugin="greedy-zero-padding")


def record() -> DataReport:
    """A record with a tool call."""
    Path("calls.jsonl").write_text(json.dumps(RECORD) + "\n", encoding="utf-8")
    return _report(1, dataset_name_or_path="calls.jsonl", chat_template="qwen3.jinja", max_length=1024)


def _report(number: int, **settings: Any) -> DataReport:
    return data_report({"model_name_or_path": "model", **settings}, Wanted(number), lambda text: None)


def drawn(report: DataReport, wrote: Callable[[DataReport, Console], None]) -> str:
    """The picture of what ``wrote`` writes of a report."""
    console = Console(
        file=io.StringIO(),
        record=True,
        width=WIDTH,
        force_terminal=True,
        color_system="truecolor",
        no_color=False,
        highlight=False,
    )
    wrote(report, console)
    picture = console.export_svg(title="sft data", theme=MONOKAI, unique_id="sft-data")
    return re.sub(r"@font-face {.*?}\s*", "", picture, flags=re.DOTALL)  # fonts of another site


def framed(html: str) -> str:
    """The picture of a page: its own style and body, in a frame of SVG, drawn as a browser draws it."""
    style = re.sub(r"@media .*?}\s*}", "", html[html.index("<style>") + 7 : html.index("</style>")], flags=re.DOTALL)
    body = html[html.index("<main>") + 6 : html.index("</main>")]
    body = re.sub(r"<(br|input[^>]*)>", r"<\1/>", body).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
    wide, high = PAGE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}">\n'
        f"<style>{style}</style>\n"
        f'<rect width="{wide}" height="{high}" fill="#fff"/>\n'
        f'<foreignObject width="{wide}" height="{high}">\n'
        f'<body xmlns="http://www.w3.org/1999/xhtml">{body}</body>\n</foreignObject>\n</svg>\n'
    )


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        shutil.copytree(DEMO / "model", "model")
        shutil.copytree(DEMO / "data", "data")
        shutil.copy(TEMPLATE, "qwen3.jinja")
        pictures = {
            "data-report.svg": drawn(figures(), write_figures),
            "data-record.svg": drawn(record(), write_records),
            "data-page.svg": framed(page(figures(2, "data/train.json"))),
        }
    FOLDER.mkdir(exist_ok=True)
    old = [name for name, text in pictures.items() if not _is(FOLDER / name, text)]
    if "--check" in sys.argv:
        if old:
            print(f"{', '.join(old)}: not current; run python docs/screenshots.py")
        return int(bool(old))
    for name in old:
        (FOLDER / name).write_text(pictures[name], encoding="utf-8")
        print(f"drew docs/images/{name}")
    return 0


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())

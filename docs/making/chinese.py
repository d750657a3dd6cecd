"""Generated pages and parts of pages in Chinese; the rest of docs/zh is translated by hand (docs/chinese_pages.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from making.project import DOCS
from making.regions import REGION, region
from sft.language import table

CHINESE_PAGES = DOCS / "zh"
WORDS = json.loads((CHINESE_PAGES / "words.json").read_text(encoding="utf-8"))
"""What tables say in both languages; the help of settings and commands is in the tables of :mod:`sft.language`."""

Say = Callable[..., str]
"""A text of a package (by default the core's) in the language of a page."""


def as_it_is(text: str, package: str = "sft") -> str:
    return text


def in_chinese(text: str, package: str = "sft") -> str:
    return str(WORDS.get(text) or table(package, "zh").get(text) or table("sft", "zh").get(text, text))


def chinese_page(path: Path, english: str) -> str:
    """A page of docs/zh with what is generated in the English one: its figures as they are, its words in Chinese."""
    found = iter(REGION.findall(english))

    def filled(match: re.Match[str]) -> str:
        name, text = next(found, (match[1], match[2]))
        return region(name, "".join(map(_in_chinese, text.splitlines(keepends=True))))

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

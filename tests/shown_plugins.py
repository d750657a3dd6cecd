"""The plugins that pages of docs/ show whole."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


SHOWN = {
    name: code
    for page in sorted((ROOT / "docs").glob("*.md"))
    for code in blocks(str(page.relative_to(ROOT)), "python")
    for name in re.findall(r'^class \w+\(sft\.Plugin\):.*?^    name = "(.+?)"', code, re.DOTALL | re.MULTILINE)
}
"""The file of each, by its name."""

"""Write docs/reference/, what is generated in docs/zh, and the READMEs' tables; ``--check`` says whether they are
current."""

from __future__ import annotations

import sys
from pathlib import Path

from making.chinese import CHINESE_PAGES, as_it_is, chinese_page, in_chinese
from making.measured import certify_page, influence_page
from making.project import DOCS, ROOT
from making.readme import with_tables
from making.reference import commands_page, hooks_page, paddlenlp_page, public_page, settings_page

FOLDER = DOCS / "reference"
IN_CHINESE = {"settings.md": settings_page, "paddlenlp.md": paddlenlp_page, "commands.md": commands_page}
"""Those that are written in both languages; docs/chinese_pages.py says why the others are not."""
PAGES = {**IN_CHINESE, "public.md": public_page, "hooks.md": hooks_page}


def main(check: bool) -> int:
    for folder in (FOLDER, CHINESE_PAGES / "reference"):
        folder.mkdir(exist_ok=True)
    pages = {FOLDER / name: page() for name, page in PAGES.items()}
    pages[DOCS / "certify.md"] = certify_page()
    pages[DOCS / "influence.md"] = influence_page()
    for name, page in IN_CHINESE.items():
        pages[CHINESE_PAGES / "reference" / name] = page(in_chinese)
    for path in CHINESE_PAGES.glob("*.md"):
        english = DOCS / path.name
        pages[path] = chinese_page(path, pages.get(english) or english.read_text(encoding="utf-8"))
    for readme, say in (("README.md", as_it_is), ("README_zh.md", in_chinese)):
        pages[ROOT / readme] = with_tables(readme, say)
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

"""Whether docs/zh says what docs says: ``python docs/chinese_pages.py`` names each section to be translated again.

Below each heading of a Chinese page stands ``<!-- en HASH -->``, a hash of the English section that it translates. Who
has translated sections again writes the new ones: ``docs/chinese_pages.py --translated docs/zh/PAGE.md [HEADING …]``.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from making.regions import REGION
from markdown_it import MarkdownIt

DOCS = Path(__file__).parent
CHINESE = DOCS / "zh"
ENGLISH_ALONE = {
    "architecture.md": "for the project's own developers",
    "index.md": "the site's front page, which has one of its own in each language",
    "reference/hooks.md": "docstrings of the code, for authors of plugins, who have them beside the code in English",
    "reference/public.md": "the first sentences of docstrings, likewise",
}
"""The pages of docs/ and docs/reference/ that have no Chinese one, and why. docs/decisions/ is for the project's own
developers as a whole, and READMEs of plugins are those of their packages, which an index shows in one language."""
STAMP = re.compile(r"^<!-- en ([0-9a-f]{8}) -->\n", re.MULTILINE)


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it, down to the next one.

    Attributes:
        level: 1 for the title of the page.
        heading: Its text.
        start: Number of its first line, from 0.
        text: The lines of Markdown, the heading's included.
        code: Its code blocks, each as the language and the text.
        stamp: Of a Chinese section: the hash of the English one that it translates; empty where there is none.
    """

    level: int
    heading: str
    start: int
    text: str
    code: tuple[tuple[str, str], ...]
    stamp: str

    @property
    def hash(self) -> str:
        """Of what has to be translated: without what is generated; breaks of lines count as spaces."""
        words = " ".join(REGION.sub("", self.text).split())
        return hashlib.sha256(words.encode()).hexdigest()[:8]


def sections(page: str) -> list[Section]:
    """The sections of a page of Markdown, in order. What stands before the first heading belongs to none."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    lines = page.splitlines(keepends=True)
    heads = [
        (token.map[0], int(token.tag[1:]), tokens[place + 1].content)
        for place, token in enumerate(tokens)
        if token.type == "heading_open" and token.level == 0 and token.map
    ]
    code = [(token.map[0], (token.info, token.content)) for token in tokens if token.type in _CODE and token.map]
    ends = [start for start, _, _ in heads[1:]] + [len(lines)]
    found = []
    for (start, level, heading), end in zip(heads, ends, strict=True):
        text = "".join(lines[start:end])
        stamp = STAMP.search(text)
        blocks = tuple(block for line, block in code if start <= line < end)
        found.append(Section(level, heading, start, text, blocks, stamp[1] if stamp else ""))
    return found


_CODE = ("fence", "code_block")


def pages() -> Iterator[tuple[Path, Path]]:
    """Each page of docs/ for users and its Chinese one, which may be missing."""
    for english in sorted(DOCS.glob("*.md")):
        if english.name not in ENGLISH_ALONE:
            yield english, CHINESE / english.name


def faults(english: str, chinese: str) -> list[str]:
    """What keeps a Chinese page from saying what the English one says, a sentence each; empty if nothing does."""
    ours, theirs = sections(english), sections(chinese)
    if [section.level for section in ours] != [section.level for section in theirs]:
        return [
            "the headings do not correspond: "
            + "; ".join(f"{'#' * one.level} {one.heading}" for one in ours)
            + " is translated as "
            + "; ".join(f"{'#' * one.level} {one.heading}" for one in theirs)
        ]
    found = []
    for one, other in zip(ours, theirs, strict=True):
        if other.stamp != one.hash:
            since = "has changed since it was translated" if other.stamp else "has no hash in its translation"
            found.append(f"{one.heading!r} ({other.heading}) {since}")
        if one.code != other.code:
            found.append(f"{one.heading!r} ({other.heading}): the code blocks are not equal")
    return found


def stamped(english: str, chinese: str, only: tuple[str, ...] = ()) -> str:
    """A Chinese page with the hashes of the English sections, or of those with the headings ``only``."""
    lines = chinese.splitlines(keepends=True)
    pairs = list(zip(sections(english), sections(chinese), strict=True))
    for one, other in reversed(pairs):
        if only and not {one.heading, other.heading} & set(only):
            continue
        below = other.start + 1
        if STAMP.match(lines[below]) if below < len(lines) else False:
            del lines[below]
        lines.insert(below, f"<!-- en {one.hash} -->\n")
    return "".join(lines)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--translated"]:
        chinese = CHINESE / Path(arguments[1]).name
        text = stamped(_text(DOCS / chinese.name), _text(chinese), tuple(arguments[2:]))
        chinese.write_text(text, encoding="utf-8")
        return 0
    code = 0
    for english, chinese in pages():
        found = faults(_text(english), _text(chinese)) if chinese.is_file() else ["there is no Chinese page"]
        for fault in found:
            print(f"docs/{english.name}: {fault}")
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

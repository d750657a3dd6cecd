"""docs/zh says what docs says: the same sections, of the English ones as they are now, with the same code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from chinese_pages import CHINESE, ENGLISH_ALONE, faults, pages, sections, stamped

PAGES = list(pages())
ENGLISH = """\
# Title

First.

```bash
# no heading
ls
```

## More

- a list

  ```toml
  a = 1
  ```

<!-- figures -->
| 1 |
<!-- end -->
"""
WORDS = {"Title": "标题", "First.": "第一。", "More": "更多", "a list": "列表"}
TRANSLATED = re.sub("|".join(WORDS), lambda word: WORDS[word[0]], ENGLISH)


@pytest.mark.parametrize(("english", "chinese"), PAGES, ids=[english.stem for english, _ in PAGES])
def test_each_page_is_translated(english: Path, chinese: Path) -> None:
    assert chinese.is_file(), f"translate docs/{english.name}, or say in docs/chinese_pages.py why nobody needs it"
    found = faults(english.read_text(encoding="utf-8"), chinese.read_text(encoding="utf-8"))
    assert found == [], (
        "translate these sections, then run python docs/chinese_pages.py --translated "
        f"docs/zh/{chinese.name} with their headings"
    )


def test_no_chinese_page_is_left_over() -> None:
    assert sorted(path.name for path in CHINESE.glob("*.md")) == sorted([*(e.name for e, _ in PAGES), "index.md"])
    assert not set(ENGLISH_ALONE) & {english.name for english, _ in PAGES}


def test_each_page_of_the_reference_is_made_in_chinese_too_or_says_why_not() -> None:
    made = [f"reference/{path.name}" for path in (CHINESE / "reference").glob("*.md")]
    alone = [name for name in ENGLISH_ALONE if name.startswith("reference/")]
    english = sorted(f"reference/{path.name}" for path in (CHINESE.parent / "reference").glob("*.md"))
    assert sorted([*made, *alone]) == english, "docs/generate.py writes them; ENGLISH_ALONE says why one is not written"


def test_sections_have_their_code() -> None:
    first, second = sections(ENGLISH)
    assert (first.level, first.heading, first.code) == (1, "Title", (("bash", "# no heading\nls\n"),))
    assert (second.level, second.heading, second.code) == (2, "More", (("toml", "a = 1\n"),))


def test_a_translation_holds_until_its_section_changes() -> None:
    assert [fault.partition(" has ")[2] for fault in faults(ENGLISH, TRANSLATED)] == ["no hash in its translation"] * 2
    chinese = stamped(ENGLISH, TRANSLATED)
    assert faults(ENGLISH, chinese) == []
    assert stamped(ENGLISH, chinese) == chinese
    assert re.sub(r"<!-- en .*\n", "", chinese) == TRANSLATED
    assert faults(ENGLISH.replace("| 1 |", "| 2 |").replace("- a list", "- a\n  list"), chinese) == []
    changed = ENGLISH.replace("a list", "two lists")
    assert faults(changed, chinese) == ["'More' (更多) has changed since it was translated"]
    assert faults(changed, stamped(changed, chinese, ("Title",))) == faults(changed, chinese)
    assert faults(changed, stamped(changed, chinese, ("更多",))) == []


def test_code_and_headings_correspond() -> None:
    chinese = stamped(ENGLISH, TRANSLATED)
    assert faults(ENGLISH, chinese.replace("ls\n", "ls -l\n")) == ["'Title' (标题): the code blocks are not equal"]
    (fault,) = faults(ENGLISH, chinese.replace("## 更多", "### 更多"))
    assert fault.startswith("the headings do not correspond: # Title; ## More is translated as # 标题; ### 更多")

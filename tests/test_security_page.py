"""SECURITY.md fits a page, and each promise in it names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_promises_have_tests() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    promises = text.partition("## What must never happen")[2].partition("\n## ")[0].split("\n- ")[1:]
    assert len(promises) >= 6
    for promise in promises:
        named = re.findall(r"`([\w/]+\.py)`", promise)
        assert named, promise
        folders = [Path(name).parent for name in named if "/" in name]
        for name in named:
            assert any((ROOT / folder / Path(name).name).is_file() for folder in folders), name

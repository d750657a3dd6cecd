"""Regions of pages that are made: from a line ``<!-- NAME -->`` to ``<!-- end -->``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

REGION = re.compile(r"<!-- (?!en |end )([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)
"""One of them: its name, and the lines within."""


def region(name: str, text: str) -> str:
    return f"<!-- {name} -->\n{text}<!-- end -->"


def filled(page: str, made: Mapping[str, Iterable[str]]) -> str:
    """``page`` with the lines that are ``made``, by the names of regions, each of which it must have."""
    found = {match[1] for match in REGION.finditer(page)}
    assert found >= set(made), f"there is no region {', '.join(set(made) - found)}"
    return REGION.sub(lambda match: region(match[1], _lines(made[match[1]]) if match[1] in made else match[2]), page)


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)

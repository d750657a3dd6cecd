"""Lines of a run without what differs from one run to the next."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


def timeless(lines: Iterable[str], folder: Path) -> list[str]:
    """Lines of a run in ``folder`` without its name, times, speeds and memory."""
    changes = [(re.escape(str(folder)), "OUT"), (r"[\d,]+ tokens/s.*", ""), (r" in [\d.]+ s$", ""), (r"[\d,]+ MiB", "")]
    found = list(lines)
    for pattern, instead in changes:
        found = [re.sub(pattern, instead, line, flags=re.MULTILINE) for line in found]
    return found

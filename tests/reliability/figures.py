"""docs/reliability.md, from docs/reliability.json: ``python tests/reliability/figures.py`` writes the page anew, and
``--check`` says whether it is what the figures say.

A test that tries something many times ends with ``record("kills", "LoRA, packed", kills=158, lost=0, seconds=...)``.
In the whole form, :data:`WHOLE`, that replaces what stood there; in the short form it keeps nothing.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "reliability.md"
FIGURES = ROOT / "docs" / "reliability.json"
WHOLE = os.environ.get("SFT_RELIABILITY") == "whole"
"""Whether everything is tried, as ``make test-reliability`` does, which takes hours; else a sample of each kind."""
SECTIONS = {
    "kills": "Killed with `kill -9`, resumed with `auto` until done, compared with a run that nobody stopped",
    "signals": "SIGTERM, SIGINT and SIGHUP",
    "exits": "Finished runs of several processes under load",
    "same": "Equivalent ways, one curve",
    "faults": "Faults of the machine",
    "inputs": "Broken input",
    "fuzzing": "Inputs by chance",
    "trust": "Hostile files",
    "load": "Load",
}
"""What the figures are of, in the page's order: the first argument of :func:`record`, and its words in the table."""
HEAD = """\
# Reliability

What was tried on runs of sft to make them lose something, and how often. This page is made from `reliability.json`,
which the tests in `tests/reliability/` write as they measure, so each row says what its last run found, on its date.
A row that says how it was tried comes from a shorter form; `make test-reliability` writes the whole one in its place.
What `sft` exits with, and what a signal does, is in [exit-codes.md](exit-codes.md).

    make test-reliability                          # everything: hours
    make test-reliability ARGS="-k kills"          # one area
    make test-slow ARGS="tests/reliability"        # a sample of each kind, as CI does; keeps no figures

"""


def record(section: str, case: str, **figures: float | str) -> None:
    """Keep the ``figures`` of a ``case`` of one of :data:`SECTIONS`, with today's date, in place of its older ones.

    ``seconds`` has a column of its own; the other names become words: ``kills=158`` is "158 kills", and what is not an
    integer stands behind its name, as in "mean drift 2.1e-07". Several processes may do so at once.
    """
    if section not in SECTIONS:
        raise ValueError(f"{section} is not one of {', '.join(SECTIONS)}")
    if not WHOLE:
        return
    with FIGURES.open("a+", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        found = json.loads(stream.read() or "{}")
        found.setdefault(section, {})[case] = {"date": datetime.date.today().isoformat(), **figures}
        stream.truncate(0)
        stream.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def page(figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The text of docs/reliability.md."""
    lines = ["| what | case | figures | seconds | date |", "|---|---|---|---|---|"]
    for section, title in SECTIONS.items():
        for position, (case, values) in enumerate(figures.get(section, {}).items()):
            rest = {name: value for name, value in values.items() if name not in ("date", "seconds")}
            words = ", ".join(_words(name.replace("_", " "), value) for name, value in rest.items())
            seconds = f"{values['seconds']:,.0f}" if "seconds" in values else ""
            row = ["" if position else title, case, words, seconds, values["date"]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join([HEAD + "<!-- figures -->", *lines, "<!-- end -->", ""])


def _words(name: str, value: float | str) -> str:
    if isinstance(value, int):
        return f"{value:,} {name}"
    return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"


def written() -> dict[str, dict[str, dict[str, Any]]]:
    """All figures so far."""
    return dict(json.loads(FIGURES.read_text(encoding="utf-8"))) if FIGURES.exists() else {}


def is_current() -> bool:
    return PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page(written())


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(written()), encoding="utf-8")
    elif not is_current():
        sys.exit("docs/reliability.md is not what docs/reliability.json says; make docs writes it anew")

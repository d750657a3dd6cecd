"""docs/reliability.md, from docs/reliability.json: ``python tests/reliability/figures.py`` writes the page anew, and
``--check`` says whether it is what the figures say.

A test that tries something many times ends with ``record("kills", "LoRA, packed", kills=158, lost=0, seconds=...)``,
and is marked ``row("kills", "LoRA, packed")``, by which ``conftest.py`` knows that it has a row to fill. In the whole
form, :data:`WHOLE`, that replaces what stood there; in the short form it keeps nothing. A row whose test has not run to
the figures says so instead, and no page is made while there is one.
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
FILES = {name: f"test_{name}" for name in SECTIONS} | {
    "signals": "test_signal",
    "faults": "test_faults or test_held_elsewhere",
    "fuzzing": "test_fuzz",
    "trust": "test_held_elsewhere",
}
"""What stands behind ``-k`` to measure the rows of a section again."""
RECORDED: set[tuple[str, str]] = set()
"""The rows that this process has filled."""
HEAD = """\
# Reliability

What was tried on runs of sft to make them lose something, and how often. This page is made from `reliability.json`,
which the tests in `tests/reliability/` write as they measure, so each row says what its last run found, on its date.
A row whose test was skipped, or failed before it had figures, is an error there, and keeps no older figures. What is
below `-k` measures the rows of a section again.
Only adapters have dropout ([models.md](models.md)): what a run of all weights draws is NEFTune's noise.
What `sft` exits with, and what a signal does, is in [exit-codes.md](exit-codes.md).

    make test-reliability                          # everything: hours
    make test-reliability ARGS="-k test_kills"     # one section
    make test-slow ARGS="tests/reliability"        # a sample of each kind, as CI does; keeps no figures

"""


def record(section: str, case: str, **figures: float | str) -> None:
    """Keep the ``figures`` of a ``case`` of one of :data:`SECTIONS`, with today's date, in place of its older ones.

    ``seconds`` has a column of its own; the other names become words: ``kills=158`` is "158 kills", and what is not an
    integer stands behind its name, as in "mean drift 2.1e-07". Several processes may do so at once.
    """
    if section not in SECTIONS:
        raise ValueError(f"{section} is not one of {', '.join(SECTIONS)}")
    if not figures:
        raise ValueError(f"{section}, {case}: there are no figures")
    RECORDED.add((section, case))
    if WHOLE:
        _replace(section, case, figures)


def did_not_run(section: str, case: str, why: str) -> None:
    """In place of a row's figures: the test that measures them was skipped, or failed before it had any."""
    if WHOLE:
        _replace(section, case, {"did_not_run": why})


def _replace(section: str, case: str, values: dict[str, Any]) -> None:
    with FIGURES.open("a+", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        found = json.loads(stream.read() or "{}")
        found.setdefault(section, {})[case] = {"date": datetime.date.today().isoformat(), **values}
        stream.truncate(0)
        stream.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def page(figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The text of docs/reliability.md. Raises :class:`ValueError` where a row has no figures, and names it."""
    if without := missing(figures):
        raise ValueError("; ".join(without))
    lines = ["| what | `-k` | case | figures | seconds | date |", "|---|---|---|---|---|---|"]
    for section, title in SECTIONS.items():
        for position, (case, values) in enumerate(figures.get(section, {}).items()):
            rest = {name: value for name, value in values.items() if name not in ("date", "seconds")}
            words = ", ".join(_words(name.replace("_", " "), value) for name, value in rest.items())
            seconds = f"{values['seconds']:,.0f}" if "seconds" in values else ""
            first = ["", ""] if position else [title, f"`{FILES[section]}`"]
            row = [*first, case, words, seconds, values["date"]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join([HEAD + "<!-- figures -->", *lines, "<!-- end -->", ""])


def missing(figures: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """The rows that have no figures: a clause for each, with the command that measures it."""
    found = [f"{name} is no section of the page" for name in figures if name not in SECTIONS]
    for section in SECTIONS:
        again = f"make test-reliability ARGS='-k \"{FILES[section]}\"' measures it"
        if not figures.get(section):
            found.append(f"{section} has no row; {again}")
        for case, values in figures.get(section, {}).items():
            if "did_not_run" in values:
                found.append(f"{section}, {case}: not measured on {values['date']} ({values['did_not_run']}); {again}")
            elif not set(values) - {"date", "seconds"}:
                found.append(f"{section}, {case}: there are no figures; {again}")
    return found


def _words(name: str, value: float | str) -> str:
    if isinstance(value, int):
        return f"{value:,} {name}"
    return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"


def written() -> dict[str, dict[str, dict[str, Any]]]:
    """All figures so far."""
    return dict(json.loads(FIGURES.read_text(encoding="utf-8"))) if FIGURES.exists() else {}


def is_current() -> bool:
    return not missing(written()) and PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page(written())


if __name__ == "__main__":
    if without := missing(written()):
        sys.exit("\n".join(["docs/reliability.md is not made, for rows of it have no figures:", *without]))
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(written()), encoding="utf-8")
    elif not is_current():
        sys.exit("docs/reliability.md is not what docs/reliability.json says; make docs writes it anew")

"""What was tried of a plugin and what came of it: as JSON, as a page, and in lines."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sft.pages import document, text

MADE_BY = "sft certify"
DIGITS = 12
"""Of a digest, which are enough to tell two states of the code apart."""
HELD, FAILED, REFUSED, NOT_TRIED = "holds", "fails", "refused", "not tried"


@dataclass(frozen=True)
class Row:
    """One case of one check. ``status``: holds, fails, refused (in one sentence, as it should be), or not tried."""

    check: str
    case: str
    status: str
    said: str
    seconds: float


@dataclass
class Report:
    """All that was tried of one plugin.

    Attributes:
        company: The plugins that all its runs have, because it cannot be without them.
        versions: Of what took part, by distribution.
        code: Of each distribution of the project or of a plugin, and of a plugin's file, a digest of what ran.
        sentences: What must hold, by check that was asked for.
        whole: Whether every check was asked for.
        beside: The plugins beside which it was asked to be tried; None: all others.
    """

    plugin: str
    distribution: str
    company: list[str]
    versions: dict[str, str]
    code: dict[str, str] = field(default_factory=dict)
    sentences: dict[str, str] = field(default_factory=dict)
    whole: bool = True
    beside: list[str] | None = None
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.status == FAILED]

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        values = asdict(self)
        values["holds"] = not self.failures
        return values

    def as_json(self) -> str:
        """The same as text, a line for each case."""
        values = self.as_dict()
        rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in values.pop("rows"))
        head = json.dumps(values, indent=1, ensure_ascii=False)
        return f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'

    def summary(self) -> str:
        """One line: how many cases, and what came of them."""
        counts = Counter(row.status for row in self.rows)
        parts = [f"{counts[status]} {status}" for status in (HELD, REFUSED, NOT_TRIED, FAILED) if counts[status]]
        return f"{self.plugin}: {len(self.rows)} cases in {self.seconds:.0f} s: {', '.join(parts)}"


def line(row: Row) -> str:
    """A case in one line, for the terminal."""
    case = f" ({row.case})" if row.case else ""
    said = f": {row.said}" if row.said and row.status != HELD else ""
    return f"{row.status:9}  {row.check}{case}{said}"


def versions(names: Mapping[str, str]) -> dict[str, str]:
    """Versions of Python, paddle, numpy, the core and the distributions of plugins."""
    found = {"python": platform.python_version()}
    for name in ("sft-core", "paddlepaddle", "paddlepaddle-gpu", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, **dict(sorted(names.items()))}


def code(modules: Mapping[str, str]) -> dict[str, str]:
    """A digest of the Python files of each module's package: distributions have one version for many states of their
    code."""
    return {name: _digest(module.partition(".")[0]) for name, module in sorted(modules.items())}


def _digest(package: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return "unknown"
    path = Path(spec.origin)
    digest = hashlib.sha256()
    for file in sorted(path.parent.rglob("*.py")) if spec.submodule_search_locations else [path]:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(path.parent)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:DIGITS]


_STYLE = """
h2 { font-size: 1.05rem; margin: 1.5rem 0 .3rem } .fails { color: var(--bad) } .holds { color: var(--good) }
td:first-child { white-space: nowrap }
"""


def _asked(report: Report) -> str:
    """What was to be tried."""
    checks = "Every check" if report.whole else f"These checks alone: {', '.join(report.sentences)}"
    others = "all other plugins" if report.beside is None else ", ".join(report.beside) or "no other plugin"
    return f"{checks}; beside {others}."


def page(report: Report) -> str:
    """The report as one HTML page that needs nothing else."""
    verdict = f"{len(report.failures)} cases fail" if report.failures else "all that was tried holds"
    told = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    digests = ", ".join(f"{name} {digest}" for name, digest in report.code.items())
    body = [
        f"<h1>{text(report.plugin)}: {verdict}</h1>",
        *(f"<p>{text(one)}</p>" for one in (report.summary(), _asked(report), told, f"Code: {digests}.")),
    ]
    if report.company:
        body.append(f"<p>Tried beside {text(', '.join(report.company))}.</p>")
    for name, sentence in report.sentences.items():
        rows = [row for row in report.rows if row.check == name]
        if not rows:
            continue
        body.append(f"<h2>{text(name)}</h2>\n<p>{text(sentence)}</p>\n<table>")
        for row in rows:
            kind = row.status if row.status in (HELD, FAILED) else ""
            body.append(
                f'<tr><td class="{kind}">{row.status}</td><td>{text(row.case)}</td><td>{text(row.said)}</td></tr>'
            )
        body.append("</table>")
    return document(MADE_BY, f"{MADE_BY} {report.plugin}", body, style=_STYLE)

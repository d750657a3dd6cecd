"""What draws charts: uPlot as it was published (``assets/uplot``, with its licence), and what builds a run's charts
with it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from sft.pages import COLOURS

_ASSETS = Path(__file__).parent / "assets"
UPLOT = "1.6.32"
"""The version of uPlot."""


def chart_library() -> tuple[str, str]:
    """A script and a style for a page that draws charts of runs: ``sftCharts(place).show(runs)`` fills the element
    ``place``; ``show`` called again, with more, goes on where the reader is.

    Each of ``runs`` is an object with ``name``, ``moments`` and ``curves`` as :meth:`sft.RunReport.as_json` has them.
    The style declares colours for light, dark and paper by name: ``--ink``, ``--soft``, ``--line``, ``--ground``,
    ``--card``, ``--accent``, ``--good``, ``--bad``. Neither needs anything of another file, or a policy that allows
    more than their own hashes.
    """
    script, style = charts()
    return script, COLOURS + style


def charts() -> tuple[str, str]:
    """The same for a page that has the colours already."""
    script = f"{_asset('uplot/uPlot.iife.min.js')}\n{_asset('charts.js')}"
    return script, _asset("uplot/uPlot.min.css") + _asset("charts.css")


def report_page() -> tuple[str, str]:
    """The script and the style of a report's page, beside those of the charts."""
    return _asset("page.js"), _asset("page.css")


@cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")

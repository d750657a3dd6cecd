"""A report as one page that needs nothing else: no network, no other file."""

from __future__ import annotations

from sft.data_report import words
from sft.data_report.value import DataReport, Piece, ShownRecord, Split
from sft.pages import document, table, text

MADE_BY = "sft data"
_STYLE = """
.bar { fill: var(--bar); width: 100%; height: .8rem; display: block } .over { fill: var(--bad) }
.bars td { padding: 0 .8rem 0 0; white-space: nowrap; vertical-align: middle } .bars td:nth-child(2) { width: 32rem }
article { border: 1px solid var(--line); border-radius: .4rem; margin: 1rem 0; padding: .6rem 1rem }
article h3 { font-size: .9rem; margin: 0 0 .5rem; color: var(--soft); font-weight: 600 }
mark { background: var(--learned); color: inherit } .special { color: var(--special) }
input { font: inherit; padding: .3rem .6rem; width: 24rem; max-width: 100% }
"""
_SCRIPT = """
const field = document.getElementById("search"), said = document.getElementById("said");
const records = [...document.querySelectorAll("article")].map(one => [one, one.textContent.toLowerCase()]);
field.addEventListener("input", () => {
  const wanted = field.value.toLowerCase();
  let left = 0;
  for (const [one, text] of records) { one.hidden = !text.includes(wanted); left += !one.hidden; }
  said.textContent = left + " of " + records.length;
});
"""


def page(report: DataReport) -> str:
    """The page, as HTML."""
    max_length = report.settings["max_length"]
    body = ["<h1>What the model will see</h1>", table(words.heading(report))]
    for name, split in report.splits.items():
        told, below = table(words.of_split(split, max_length)), table(words.below_lengths(report, name))
        body += [f"<h2>{text(name)} data</h2>", told, _histogram(split, max_length), below]
    body += [f"<p>note: {text(note)}</p>" for note in report.notes]
    body += ["<h2>Records</h2>", _legend(report), *map(_record, report.records)]
    return document(MADE_BY, MADE_BY, body, style=_STYLE, scripts=[_SCRIPT])


def _legend(report: DataReport) -> str:
    search = words.of_search(report)
    said = f"<p>{text(search)}</p>\n" if search is not None else ""
    return (
        f'{said}<p><mark>learned</mark>, <span class="special">special token</span></p>\n'
        '<p><label>Search in these records: <input id="search" type="search" autocomplete="off"></label> '
        f'<span id="said">{len(report.records)} of {len(report.records)}</span></p>'
    )


def _histogram(split: Split, max_length: int) -> str:
    if split.lengths is None:
        return ""
    most = max(bar.records for bar in split.lengths.bars)
    rows = (
        f"<tr><td>{bar.first:,} to {bar.last:,}</td><td>"
        f'<svg class="bar{" over" * (bar.first > max_length)}" aria-hidden="true">'
        f'<rect width="{100 * bar.records / most:.1f}%" height="100%"/></svg></td><td>{bar.records:,}</td></tr>'
        for bar in split.lengths.bars
    )
    return f'<table class="bars">{"".join(rows)}</table>'


def _record(record: ShownRecord) -> str:
    rows = (f"<pre>{''.join(map(_piece, row))}</pre>" for row in record.rows)
    return f"<article><h3>{text(words.of_record(record))}</h3>{''.join(rows)}</article>"


def _piece(piece: Piece) -> str:
    shown = text(piece.text)
    shown = f'<span class="special">{shown}</span>' if piece.special else shown
    return f"<mark>{shown}</mark>" if piece.learned else shown

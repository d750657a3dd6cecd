"""A report as one page that needs nothing else: no network, no other file. What the data holds is text in it and no
more: it is escaped, and the page's own policy lets no script run but the one below."""

from __future__ import annotations

import base64
import hashlib
import os
from html import escape
from pathlib import Path

from sft.data_report import words
from sft.data_report.value import DataReport, Piece, ShownRecord, Split
from sft.errors import UsageError
from sft.foreign_text import harmless

BEGINS = "<!doctype html>\n<!-- made by sft data -->\n"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1c1c1c;
  background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
table { border-collapse: collapse } td, th { text-align: left; vertical-align: top; padding: .1rem 1rem .1rem 0 }
th { font-weight: 600; color: #555; min-width: 6rem } td { overflow-wrap: anywhere }
.bar { background: #4c9a5b; height: .8rem; min-width: 1px } .over { background: #c0392b }
.bars td { padding: 0 .8rem 0 0; white-space: nowrap } .bars td:nth-child(2) { width: 32rem }
article { border: 1px solid #ddd; border-radius: .4rem; margin: 1rem 0; padding: .6rem 1rem }
article h3 { font-size: .9rem; margin: 0 0 .5rem; color: #555; font-weight: 600 }
pre { font: 13px/1.5 ui-monospace, monospace; margin: 0 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere }
mark { background: #b9e6c2; color: inherit } .special { color: #8e24aa }
input { font: inherit; padding: .3rem .6rem; width: 24rem; max-width: 100% }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #e4e4e4 } th, article h3 { color: #aaa } article { border-color: #444 }
  mark { background: #1f5c33 } .special { color: #d98cf0 }
}
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


def check_place(path: Path) -> None:
    """Refuse a place for a page where something else would be lost, or nothing can be written."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        why = "is a folder" if path.is_dir() else "is in no folder that can be written to"
        raise UsageError(f"html: {path} {why}; give the file that the page is to be.")
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            is_ours = path.is_file() and file.read(len(BEGINS)) == BEGINS.encode()
    except OSError as error:
        raise UsageError(f"html: {path} cannot be read ({error.strerror}); give another name.") from error
    if not is_ours:
        raise UsageError(f"html: {path} is there, and is no page of sft data; give another name.")


def page(report: DataReport) -> str:
    """The page, as HTML."""
    max_length = report.settings["max_length"]
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = ["<h1>What the model will see</h1>", _table(words.heading(report))]
    for name, split in report.splits.items():
        told, below = _table(words.of_split(split, max_length)), _table(words.below_lengths(report, name))
        body += [f"<h2>{_text(name)} data</h2>", told, _histogram(split, max_length), below]
    body += [f"<p>note: {_text(note)}</p>" for note in report.notes]
    body += ["<h2>Records</h2>", _legend(report), *map(_record, report.records)]
    return (
        f'{BEGINS}<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width">\n<title>sft data</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + f"\n<script>{_SCRIPT}</script>\n"
        "</body>\n</html>\n"
    )


def _legend(report: DataReport) -> str:
    search = words.of_search(report)
    said = f"<p>{_text(search)}</p>\n" if search is not None else ""
    return (
        f'{said}<p><mark>learned</mark>, <span class="special">special token</span></p>\n'
        '<p><label>Search in these records: <input id="search" type="search" autocomplete="off"></label> '
        f'<span id="said">{len(report.records)} of {len(report.records)}</span></p>'
    )


def _table(facts: list[words.Fact]) -> str:
    rows = (
        f"<tr><th>{_text(label)}</th><td>{'<br>'.join(_text(line) for line in lines)}</td></tr>"
        for label, lines in facts
    )
    return f"<table>{''.join(rows)}</table>"


def _histogram(split: Split, max_length: int) -> str:
    if split.lengths is None:
        return ""
    most = max(bar.records for bar in split.lengths.bars)
    rows = (
        f'<tr><td>{bar.first:,} to {bar.last:,}</td><td><div class="bar{" over" * (bar.first > max_length)}" '
        f'style="width: {100 * bar.records / most:.1f}%"></div></td><td>{bar.records:,}</td></tr>'
        for bar in split.lengths.bars
    )
    return f'<table class="bars">{"".join(rows)}</table>'


def _record(record: ShownRecord) -> str:
    rows = (f"<pre>{''.join(map(_piece, row))}</pre>" for row in record.rows)
    return f"<article><h3>{_text(words.of_record(record))}</h3>{''.join(rows)}</article>"


def _piece(piece: Piece) -> str:
    text = _text(piece.text)
    text = f'<span class="special">{text}</span>' if piece.special else text
    return f"<mark>{text}</mark>" if piece.learned else text


def _text(text: str) -> str:
    return escape(harmless(text))

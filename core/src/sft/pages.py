"""Pages that need nothing else: one file of HTML each, without network and without other files. What comes from data,
models and settings is text in them and no more: it is escaped, and a page's own policy lets nothing run and nothing be
drawn but by the scripts and the style that it was written with."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sft.errors import UsageError
from sft.facts import Fact
from sft.foreign_text import harmless

COLOURS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d5dae0; --ground: #fff; --card: #f6f8fa;
  --accent: #0b5cad; --good: #1a6e3c; --bad: #b3261e; --learned: #b9e6c2; --special: #8e24aa; --bar: #4c9a5b }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #a3adb8; --line: #353d47;
  --ground: #14181d; --card: #1c2229; --accent: #7db8f5; --good: #7bc47f; --bad: #ff8a80; --learned: #1f5c33;
  --special: #ecc2fb; --bar: #5aa869 } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #ccc; --card: #fff } }
"""
"""Colours by name, each with a value for light, dark and paper."""
STYLE = (
    COLOURS
    + """
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
  margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: var(--ink); background: var(--ground) }
h1 { font-size: 1.4rem; line-height: 1.25; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
table { border-collapse: collapse } td, th { text-align: left; vertical-align: top; padding: .1rem 1rem .1rem 0 }
th { font-weight: 600; color: var(--soft); min-width: 6rem } td { overflow-wrap: anywhere }
pre { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", "Noto Sans Mono CJK SC", monospace; margin: 0 0 .5rem;
  white-space: pre-wrap; overflow-wrap: anywhere }
a { color: var(--accent) } :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
"""
)
"""What all pages look like."""


def begins(made_by: str) -> str:
    """How a page begins that the program ``made_by`` (``sft data``) has made."""
    return f"<!doctype html>\n<!-- made by {made_by} -->\n"


def check_place(path: Path, made_by: str) -> None:
    """Refuse a place for a page where something else would be lost, or nothing can be written."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        why = "is a folder" if path.is_dir() else "is in no folder that can be written to"
        raise UsageError(f"html: {path} {why}; give the file that the page is to be.")
    if not path.exists():
        return
    start = begins(made_by).encode()
    try:
        with path.open("rb") as file:
            is_ours = path.is_file() and file.read(len(start)) == start
    except OSError as error:
        raise UsageError(f"html: {path} cannot be read ({error.strerror}); give another name.") from error
    if not is_ours:
        raise UsageError(f"html: {path} is there, and is no page of {made_by}; give another name.")


def document(
    made_by: str,
    title: str,
    body: Iterable[str],
    *,
    above: str = "",
    below: str = "",
    style: str = "",
    scripts: Sequence[str] = (),
    data: Any = None,
) -> str:
    """A whole page: pieces of HTML one after the other, with what is ``above`` them (a header) and ``below`` (a
    footer), with the common style and more, with ``scripts`` that run when all is there, and with ``data`` (JSON) for
    them in the element ``data``. HTML in it has no ``style`` attributes and no handlers, for the policy forbids them.
    """
    styles = STYLE + style
    policy = (
        f"default-src 'none'; style-src {_digest(styles)}; "
        f"script-src {' '.join(map(_digest, scripts)) or repr('none')}; base-uri 'none'; form-action 'none'"
    )
    held = "" if data is None else f'<script type="application/json" id="data">{_json(data)}</script>\n'
    run = "".join(f"<script>{script}</script>\n" for script in scripts)
    return (
        f'{begins(made_by)}<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{text(title)}</title>\n'
        f"<style>{styles}</style>\n</head>\n<body>\n{above}<main>\n" + "\n".join(body) + "\n</main>\n"
        f"{below}{held}{run}</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Anything as text of a page, or of an attribute within double quotes."""
    return escape(harmless(str(value)))


def table(facts: Iterable[Fact]) -> str:
    """Facts, one a row."""
    rows = (
        f'<tr><th scope="row">{text(label)}</th><td>{"<br>".join(text(line) for line in lines)}</td></tr>'
        for label, lines in facts
    )
    return f"<table>{''.join(rows)}</table>"


def _json(value: Any) -> str:
    """JSON that no HTML parser takes for the end of its script, or for a comment in it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _digest(piece: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(piece.encode()).digest()).decode()}'"

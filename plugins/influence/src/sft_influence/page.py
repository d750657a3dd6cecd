"""An account as one page that needs nothing else: no network, no script. What data holds is text in it, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import sft
from sft import UsageError
from sft_influence.account import Account, Explained, Record

BEGINS = "<!doctype html>\n<!-- made by sft why -->\n"
_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
table { border-collapse: collapse } th, td { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0 }
td { overflow-wrap: anywhere } td:first-child { white-space: nowrap; font-variant-numeric: tabular-nums }
.text { white-space: pre-wrap }
@media (max-width: 40rem) { tr, td, th { display: block } tr { margin-bottom: .8rem } }
"""


def check_place(path: Path) -> None:
    """Refuse a place for a page where something else would be lost, or that is in no folder."""
    if path.is_dir() or not path.parent.is_dir():
        why = "is a folder" if path.is_dir() else "is in no folder that is there"
        raise UsageError(f"html: {path} {why}; give the file that the page is to be.")
    if path.exists() and not _is_ours(path):
        raise UsageError(f"html: {path} is there, and is no page of sft why; give another name.")


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(BEGINS)) == BEGINS.encode()
    except OSError:
        return False


def page(account: Account) -> str:
    """The page, as HTML."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    few = f" of {account.of:,}" if account.records < account.of else ""
    told = (
        f"{_text(account.run)}: {account.records:,}{few} records, {account.passes:,} passes at the checkpoints of step "
        f"{', '.join(map(str, account.checkpoints))}, method {_text(account.method)}. A record's score is what its "
        "steps took off the loss of the answer, to first order: above 0 it helped, below 0 it harmed."
    )
    body = [f"<h1>Which records taught this</h1>\n<p>{told}</p>"]
    body += [_answer(account, one) for one in account.answers]
    return (
        f'{BEGINS}<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width">\n<title>sft why</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def _answer(account: Account, one: Explained) -> str:
    losses = ", ".join(f"{loss:.4f} after step {at}" for at, loss in zip(account.checkpoints, one.losses, strict=True))
    whose = ", the model's own" if one.is_own else ""
    return (
        f"<section>\n<h2>{_text(one.prompt)}</h2>\n"
        f'<p class="text">{_text(one.answer)}</p>\n'
        f"<p>{one.tokens:,} tokens{whose}; its loss: {losses} (nats a token)</p>\n"
        f"{_table('Helpful', one.helpful)}\n{_table('Harmful', one.harmful)}\n</section>"
    )


def _table(title: str, records: Sequence[Record]) -> str:
    if not records:
        return f"<h3>{title}</h3>\n<p>none</p>"
    rows = "\n".join(
        f'<tr><td>{record.score:+.2e}</td><td>{_text(record.place)}</td><td class="text">{_text(record.text)}</td></tr>'
        for record in records
    )
    head = '<tr><th scope="col">score</th><th scope="col">record</th><th scope="col">what the model reads</th></tr>'
    return f"<h3>{title}</h3>\n<table>\n{head}\n{rows}\n</table>"


def _text(text: str) -> str:
    return escape(sft.safe(text))

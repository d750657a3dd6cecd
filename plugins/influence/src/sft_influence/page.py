"""An account as one page that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import sft
from sft_influence.account import Account, Explained, Record, named_checkpoints

MADE_BY = "sft why"
_STYLE = """
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem } td:first-child { white-space: nowrap }
td, th { padding: .2rem 1rem .2rem 0 } .text { white-space: pre-wrap; overflow-wrap: anywhere }
@media (max-width: 40rem) { tr, td { display: block } tr { margin-bottom: .8rem } th { display: none } }
"""


def page(account: Account) -> str:
    """The page, as HTML."""
    few = f" of {account.of:,}" if account.records < account.of else ""
    told = (
        f"{account.run}: {account.records:,}{few} records, {account.passes:,} passes at the "
        f"{named_checkpoints(account.checkpoints)}, method {account.method}. A record's score is what its steps took "
        "off the loss of the answer, to first order: above 0 it helped, below 0 it harmed."
    )
    sections = chain.from_iterable(_answer(account, one) for one in account.answers)
    body = ["<h1>Which records taught this</h1>", f"<p>{sft.html_text(told)}</p>", *sections]
    return sft.html_page(MADE_BY, MADE_BY, body, style=_STYLE)


def _answer(account: Account, one: Explained) -> Sequence[str]:
    losses = ", ".join(f"{loss:.4f} after step {at}" for at, loss in zip(account.checkpoints, one.losses, strict=True))
    whose = ", the model's own" if one.is_own else ""
    told = f"{one.tokens:,} token{'s' * (one.tokens != 1)}{whose}; its loss: {losses} (nats a token)"
    return [
        f"<section>\n<h2>{sft.html_text(one.prompt)}</h2>",
        f'<p class="text">{sft.html_text(one.answer)}</p>\n<p>{sft.html_text(told)}</p>',
        f"{_table('Helpful', one.helpful)}\n{_table('Harmful', one.harmful)}\n</section>",
    ]


def _table(title: str, records: Sequence[Record]) -> str:
    if not records:
        return f"<h3>{title}</h3>\n<p>none</p>"
    rows = "\n".join(
        f"<tr><td>{record.score:+.2e}</td><td>{sft.html_text(record.place)}</td>"
        f'<td class="text">{sft.html_text(record.text)}</td></tr>'
        for record in records
    )
    head = '<tr><th scope="col">score</th><th scope="col">record</th><th scope="col">what the model reads</th></tr>'
    return f"<h3>{title}</h3>\n<table>\n{head}\n{rows}\n</table>"

"""An account in the terminal, and in what reads its lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import sft
from sft_influence.account import Account, Explained, Record

_TEXT = 100
"""Characters of a record that a line shows."""


def lines(account: Account) -> Iterator[str]:
    """What is printed, line by line. Texts of data stay on one line, and move no cursor."""
    for number, answer in enumerate(account.answers):
        if number:
            yield ""
        yield from _explained(account, answer)


def _explained(account: Account, one: Explained) -> Iterator[str]:
    yield f"prompt: {sft.shown(one.prompt)}"
    whose = ", the model's own" if one.is_own else ""
    yield f"answer: {sft.shown(one.answer)} ({one.tokens:,} token{'s' * (one.tokens != 1)}{whose})"
    losses = (f"{loss:.4f} after step {step}" for step, loss in zip(account.checkpoints, one.losses, strict=True))
    yield f"its loss: {', '.join(losses)} (nats a token)"
    for what, records in (("helpful", one.helpful), ("harmful", one.harmful)):
        yield f"{what}:" if records else f"{what}: none"
        yield from _table(records)


def _table(records: Sequence[Record]) -> Iterator[str]:
    places = [sft.shown(record.place) for record in records]
    width = max(map(len, places), default=0)
    for place, record in zip(places, records, strict=True):
        yield f"  {record.score:+.2e}  {place:<{width}}  {sft.shown(record.text, _TEXT)}"

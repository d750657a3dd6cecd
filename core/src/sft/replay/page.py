"""Steps that were computed again as one page: each record with its tokens coloured by their loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sft.data.encoded import IGNORED
from sft.data_report.records import Writer
from sft.pages import document, table, text
from sft.replay import words
from sft.replay.blame import Blame
from sft.replay.value import Replay, ReplayedRecord, ReplayedRow, ReplayedStep

BOUNDS = (0.5, 1.0, 2.0, 3.0, 4.5, 6.0, 8.0)
"""Nats at which a colour begins; below the first one a token has none."""
_SHADES = len(BOUNDS)
_STYLE = (
    """
article { border: 1px solid var(--line); border-radius: .4rem; margin: 1rem 0; padding: .6rem 1rem }
h3 { font-size: .9rem; margin: 0 0 .5rem; color: var(--soft); font-weight: 600; overflow-wrap: anywhere }
.given { color: var(--soft) } .learned { border-bottom: 1px dotted var(--soft) } .scale .shade { padding: 0 .4rem }
"""
    + "".join(f".s{n} {{ background: rgb(214 69 36 / {n / _SHADES * 0.62:.2f}) }}\n" for n in range(1, _SHADES + 1))
    + "@media print { * { print-color-adjust: exact } }\n"
)


def page_of_replay(replay: Replay) -> str:
    """The page, as HTML: all records of each step, those with the highest loss first."""
    body = [f"<h1>Steps of {text(replay.folder)}, computed again</h1>", _legend(), *_notes(replay)]
    writer = _writer(replay)
    for step in replay.steps:
        body += [f"<h2>{text(words.heading(step))}</h2>", table((label, [said]) for label, said in words.figures(step))]
        body += [_article(f"loss {words.number(one.loss)}", one, step, writer) for one in step.by_loss]
    return document("sft replay", f"sft replay {replay.folder}", body, style=_STYLE)


def page_of_blame(blame: Blame) -> str:
    """The page, as HTML: each spike with the records that made it."""
    body = [f"<h1>What made {text(blame.replay.folder)} jump</h1>", f"<p>{text(words.summary(blame))}</p>", _legend()]
    body += _notes(blame.replay)
    writer = _writer(blame.replay)
    for one in blame.blamed:
        body.append(f"<h2>{text(words.stands_out(one.spike))}</h2>")
        body += [
            _article(
                f"{each.share:.0%} of the spike, loss {words.number(each.record.loss)}", each.record, one.step, writer
            )
            for each in one.suspects
        ]
    return document("sft blame", f"sft blame {blame.replay.folder}", body, style=_STYLE)


def _writer(replay: Replay) -> Any:
    """None where there is nothing to write."""
    return None if replay.tokenizer is None else Writer(replay.tokenizer)


def _notes(replay: Replay) -> list[str]:
    return [f"<p>note: {text(note)}</p>" for note in words.notes(replay)]


def _legend() -> str:
    shades = "".join(f'<span class="shade s{at}">{bound:g}</span>' for at, bound in enumerate(BOUNDS, start=1))
    return (
        f'<p class="scale">Learned tokens are <span class="learned">underlined</span> and coloured by their loss, in '
        f'nats from: {shades} The rest is <span class="given">what the model only reads</span>.</p>'
    )


def _article(cost: str, record: ReplayedRecord, step: ReplayedStep, writer: Writer) -> str:
    heading = f"{record.place}: {cost}, {words.learned(record)}"
    row = step.rows[record.span.row]
    documents = "".join(f"<pre>{''.join(_tokens(row, *each, writer))}</pre>" for each in _documents(row, record))
    return f"<article><h3>{text(heading)}</h3>{documents}</article>"


def _documents(row: ReplayedRow, record: ReplayedRecord) -> Iterator[tuple[int, int]]:
    """Where each document of a record begins and ends in its row."""
    start = 0
    for length in row.lengths:
        if record.span.start <= start < record.span.end:
            yield start, start + length
        start += length


def _tokens(row: ReplayedRow, start: int, end: int, writer: Writer) -> Iterator[str]:
    """The texts of a document's tokens. What is predicted at a position is the token after it, so the losses of a token
    stand one place before it; the last one is only predicted."""
    labels, losses = row.labels[start:end], row.losses[start:end]
    ids = row.input_ids[start:end]
    if len(labels) and labels[-1] != IGNORED:
        ids = np.append(ids, labels[-1])
    at = 0
    for piece, count in writer.each(ids):
        before = range(max(at - 1, 0), at + count - 1)
        learned = [float(losses[place]) for place in before if labels[place] != IGNORED]
        yield _piece(piece, learned)
        at += count


def _piece(piece: str, losses: Sequence[float]) -> str:
    """A token; of several that are one character together, the highest loss counts."""
    if not losses:
        return f'<span class="given">{text(piece)}</span>'
    shade = int(np.searchsorted(BOUNDS, max(losses), side="right"))
    told = ", ".join(f"{loss:.3f}" for loss in losses)
    return f'<span class="learned{f" s{shade}" if shade else ""}" title="{told}">{text(piece)}</span>'

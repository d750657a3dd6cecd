"""``sft plan … --html FILE``: the time of a step, a rank of each stage, as a page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import sft
from sft_parallel_4d.machines import Machine, taken
from sft_parallel_4d.memory import Calculator
from sft_parallel_4d.plans import Plan
from sft_parallel_4d.ranking import Answer
from sft_parallel_4d.timeline import Span, schedule
from sft_parallel_4d.timing import Load, loads

MADE_BY = "sft plan"
DRAWN = 3
"""Plans of which the time is drawn."""
_KINDS = {
    "forward": "forward",
    "backward": "backward",
    "waited": "sent, and waited for",
    "hidden": "sent behind computation",
    "step": "the optimizer",
    "idle": "waiting for other stages",
}
_STYLE = """
.wide { overflow-x: auto } td.n { white-space: nowrap; font-variant-numeric: tabular-nums }
svg.time { width: 100%; min-width: 40rem; display: block } svg.time text { font-size: 11px; fill: var(--ink) }
.forward { fill: #4a8fd6 } .backward { fill: #2b5f9e } .waited { fill: #d1495b } .hidden { fill: #e0a458 }
.step { fill: #6a994e } .idle { fill: var(--line) } svg.time line { stroke: var(--soft); stroke-width: 1 }
@media screen and (prefers-color-scheme: dark) { .forward { fill: #7fb3ea } .backward { fill: #4d86c6 }
  .waited { fill: #ef7f8d } .hidden { fill: #f0be7c } .step { fill: #93bd77 } }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; margin: .5rem 0 }
ul.legend svg { width: 1em; height: 1em; vertical-align: -.1em } details { margin: .5rem 0 1.5rem }
"""
_LEFT, _WIDTH, _ROW, _BAR = 90, 1000, 34, 13


def write_page(
    path: Path, answers: Sequence[Answer], calculator: Calculator, machine: Machine, name: str, about: str
) -> None:
    """Write the page of ``answers``, best first; ``about`` says what is planned. Raises :class:`sft.UsageError` for a
    place where something else would be lost."""
    sft.check_html(path, MADE_BY)
    speeds = taken(machine, calculator.precision.products)
    said = f"Reckoned, not measured: {name}, {machine.devices} devices a node; of a device {speeds}."
    body = [f"<h1>{sft.html_text(about)}</h1>", f"<p>{sft.html_text(said)}</p>", _legend()]
    for number, answer in enumerate(answers[:DRAWN], start=1):
        body += _section(number, answer, loads(calculator, answer.plan, machine))
    body += ["<h2>All that were shown</h2>", _table(answers)]
    path.write_text(sft.html_page(MADE_BY, "Plans of a run", body, style=_STYLE), encoding="utf-8")


def _legend() -> str:
    items = (
        f'<li><svg aria-hidden="true" viewBox="0 0 1 1"><rect class="{kind}" width="1" height="1"/></svg> {said}</li>'
        for kind, said in _KINDS.items()
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _section(number: int, answer: Answer, of: list[Load]) -> Iterator[str]:
    plan = answer.plan
    micro = min(plan.accumulation, max(4, 2 * plan.pipeline))
    drawn = schedule(plan, of, micro)
    yield f"<h2>{number}. {sft.html_text(plan)}: {_seconds(answer.seconds)} a step</h2>"
    if micro < plan.accumulation:
        yield f"<p>Drawn with {micro} of {plan.accumulation} micro-batches; the others go as those in the middle.</p>"
    yield f'<div class="wide">{picture(plan, drawn)}</div>'
    yield "<details open><summary>Seconds of a step on one rank of each stage</summary>"
    yield f'<div class="wide">{_stages(plan, of)}</div></details>'


def picture(plan: Plan, drawn: list[list[Span]]) -> str:
    """A row for each stage: what its ranks compute, and below what they send."""
    end = max((span.end for spans in drawn for span in spans), default=0.0) or 1.0
    scale, height = (_WIDTH - _LEFT) / end, _ROW * len(drawn) + 20
    said = f"time of a step: {len(drawn)} stage{'s' * (len(drawn) > 1)}, {_seconds(end)}"
    pieces = [f'<svg class="time" role="img" viewBox="0 0 {_WIDTH} {height}" aria-label="{said}">']
    for stage, spans in enumerate(drawn):
        top = _ROW * stage
        pieces.append(f'<text x="0" y="{top + 12}">{sft.html_text(_ranks(plan, stage))}</text>')
        pieces.append(f'<rect class="idle" x="{_LEFT}" y="{top}" width="{_WIDTH - _LEFT}" height="{_BAR}"/>')
        for span in spans:
            y = top if span.kind in ("forward", "backward", "step") else top + _BAR + 1
            if span.kind == "waited":  # nothing is computed meanwhile
                y = top
            pieces.append(
                f'<rect class="{span.kind}" x="{_LEFT + span.begin * scale:.2f}" y="{y}" '
                f'width="{max(0.3, (span.end - span.begin) * scale):.2f}" height="{_BAR}"><title>'
                f"{sft.html_text(_of_span(span))}</title></rect>"
            )
    axis = _ROW * len(drawn)
    pieces.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{axis}" y2="{axis}"/>')
    for part in range(5):
        anchor = ("start", "middle", "middle", "middle", "end")[part]
        x = _LEFT + (_WIDTH - _LEFT) * part / 4
        pieces.append(f'<text x="{x:.0f}" y="{axis + 14}" text-anchor="{anchor}">{_seconds(end * part / 4)}</text>')
    return "".join([*pieces, "</svg>"])


def _ranks(plan: Plan, stage: int) -> str:
    """Which ranks a stage has: alike, but for what they read."""
    inner = plan.devices // (plan.pipeline * plan.data)
    first = stage * inner
    shown = f"{first}" if inner == 1 else f"{first}-{first + inner - 1}"
    return f"ranks {shown}{' …' if plan.data > 1 else ''}"


def _of_span(span: Span) -> str:
    of = "" if span.micro is None else f" of micro-batch {span.micro + 1}"
    axis = f" ({span.axis})" if span.axis else ""
    return f"{_KINDS[span.kind]}{axis}{of}: {_seconds(span.end - span.begin)}, from {_seconds(span.begin)}"


def _stages(plan: Plan, of: list[Load]) -> str:
    axes = list(dict.fromkeys(axis for load in of for axis in load.inline_forward))
    head = ["ranks", "forward", "backward", *(f"waits for {axis}" for axis in axes), "for weights", "gradients sent"]
    rows = []
    for stage, load in enumerate(of):
        micro = plan.accumulation
        inline = [micro * (load.inline_forward.get(axis, 0) + load.inline_backward.get(axis, 0)) for axis in axes]
        sent = load.bucket_seconds * (micro if load.each else 1) + micro * load.blocks * load.scatter
        cells = [
            micro * load.forward,
            micro * load.backward,
            *inline,
            micro * (load.waits_forward + load.waits_backward),
        ]
        on = [sum(lane.total for lane in load.buckets.lanes[1:]), (load.tails or [0.0])[-1]]
        cells += [sent, *on, load.step, *([load.host] if plan.offload else []), load.spread]
        rows.append([_ranks(plan, stage), *map(_seconds, cells)])
    head += ["… and on", "of these not hidden", "optimizer", *(["from the host"] if plan.offload else [])]
    return _html_table([*head, "new values"], rows)


def _table(answers: Sequence[Answer]) -> str:
    rows = []
    for number, answer in enumerate(answers, start=1):
        time = answer.time
        cells = (time.total, time.compute, sum(time.exposed.values()), sum(time.hidden.values()), time.idle, time.step)
        peak = f"{answer.memory.peak / 2**30:.2f} GiB{'' if answer.fits else ', does not fit'}"
        rows.append([str(number), str(answer.plan), *map(_seconds, cells), peak])
    head = ["", "plan", "a step", "computing", "sent, waited for", "sent behind it", "idle", "optimizer", "peak memory"]
    return f'<div class="wide">{_html_table(head, rows)}</div>'


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = "".join(f'<th scope="col">{sft.html_text(title)}</th>' for title in head)
    lines = "".join(
        "<tr>" + "".join(f'<td class="n">{sft.html_text(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 or not seconds else f"{1e6 * seconds:.3g} µs"

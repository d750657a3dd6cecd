"""What is said of steps that were computed again: the lines of the terminal, of which pages use some."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sft.foreign_text import shown
from sft.replay.blame import Blame
from sft.replay.spikes import AROUND, LEAST, Spike
from sft.replay.value import Replay, ReplayedRecord, ReplayedStep, is_same


def of_replay(replay: Replay, show: int) -> Iterator[str]:
    """Lines on steps, with so many of the records of each: those with the highest loss first."""
    for step in replay.steps:
        yield heading(step)
        yield from (f"  {label:<12} {text}" for label, text in figures(step))
        yield from records(step, show)
        yield ""
    yield computed(replay)
    yield from (f"note: {note}" for note in notes(replay))


def of_blame(blame: Blame) -> Iterator[str]:
    """Lines on spikes, those that stand out most first, each with the records that made it."""
    for one in blame.blamed:
        yield stands_out(one.spike)
        for each in one.suspects:
            loss, place = number(each.record.loss), shown(each.record.place)
            yield f"  {each.share:>5.0%}  loss {loss:>8}  {learned(each.record)}  {place}"
        if one.step.is_same is False:
            these = "; ".join(f"{label} {said}" for label, _, said in compared(one.step))
            yield f"  note: computed again, {these}"
        yield ""
    yield summary(blame)
    yield from (f"note: {note}" for note in notes(blame.replay))


# --- pieces -------------------------------------------------------------------------------------------------


def heading(step: ReplayedStep) -> str:
    return f"step {step.step} (epoch {step.epoch:.2f}){', which was skipped' if step.skipped else ''}"


def figures(step: ReplayedStep) -> list[tuple[str, str]]:
    """Loss and gradient norm beside what the run has recorded; and the rows."""
    targets = sum(one.targets for one in step.records)
    tokens = sum(row.tokens for row in step.rows)
    padding = sum(len(row.input_ids) for row in step.rows) - tokens
    rows, count = len(step.rows), len(step.records)
    more = "s" * (count != 1)
    return [
        *((label, f"{value!r}, {said}") for label, value, said in compared(step)),
        ("rows", f"{rows:,} with {count:,} record{more}: {tokens:,} tokens, {targets:,} learned, {padding:,} padding"),
    ]


def compared(step: ReplayedStep) -> list[tuple[str, float, str]]:
    """Loss and gradient norm, each with how it compares with what the run has recorded."""
    loss, norm = step.recorded or (None, None)
    figures = (("loss", step.loss, loss), ("grad norm", step.grad_norm, norm))
    return [(label, value, difference(value, then)) for label, value, then in figures]


def difference(value: float, recorded: float | None) -> str:
    """How a figure compares with the recorded one."""
    if recorded is None:
        return "which the run did not record"
    if is_same(value, recorded):
        return "as recorded, to the last bit"
    return f"recorded {recorded!r}, differs by {value - recorded:+.3g}"


def records(step: ReplayedStep, show: int) -> Iterator[str]:
    """The records of a step, those with the highest loss first."""
    if show:
        yield f"  {'loss':>8} {'learned':>8} {'row':>4}  record"
    for one in step.by_loss[:show]:
        yield f"  {number(one.loss):>8} {one.targets:>8,} {one.span.row + 1:>4}  {shown(one.place)}"
    if 0 < show < len(step.records):
        yield f"  and {len(step.records) - show:,} more (--show N)"


def number(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def learned(record: ReplayedRecord) -> str:
    return f"{record.targets:,} of {record.tokens:,} tokens learned"


def stands_out(spike: Spike) -> str:
    """A spike as a sentence."""
    loss = f"loss {spike.loss:.4f}, usual {spike.usual_loss:.4f} ({spike.loss_score:+.1f})"
    norm = f"grad norm {spike.grad_norm:.4g}, usual {spike.usual_grad_norm:.4g} ({spike.norm_score:+.1f})"
    if math.isinf(spike.score):
        return f"step {spike.step}: skipped, with loss {spike.loss} and gradient norm {spike.grad_norm}"
    return f"step {spike.step}: {loss}; {norm}"


def computed(replay: Replay) -> str:
    """What was done for it."""
    begun = ", ".join(
        "the beginning" if start == 0 else f"checkpoint-{start}" for start in dict.fromkeys(replay.starts)
    )
    return f"{replay.computed:,} step{'s' * (replay.computed != 1)} computed, from {begun}"


def notes(replay: Replay) -> Iterator[str]:
    """What is to be known beside the figures."""
    if replay.differences:
        these = "; ".join(replay.differences)
        yield f"not all is as it was when the run computed this ({these}), so figures may differ"
    if replay.minimises:
        yield (
            f"the run minimises what {' and '.join(replay.minimises)} makes of the loss; the losses of records and "
            "tokens are cross-entropies"
        )


def summary(blame: Blame) -> str:
    """How many spikes, and at what price; what the numbers in parentheses are."""
    if not blame.blamed:
        return f"no spike in {blame.steps:,} steps: none is {LEAST:g} robust standard deviations from those around it"
    count = len(blame.blamed)
    spikes = f"{count} of {blame.steps:,} steps stand{'s' * (count == 1)} out by {LEAST:g} robust standard deviations"
    return f"{spikes} or more (in parentheses) from the {2 * AROUND} around them; {computed(blame.replay)}"

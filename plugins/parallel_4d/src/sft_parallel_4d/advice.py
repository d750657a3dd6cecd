"""What a run needs, and what would fit where it has run out of memory: the changes that cost least, by the formulas of
the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sft
from sft_parallel_4d.checks import plan_of
from sft_parallel_4d.environment import processes
from sft_parallel_4d.paper import NAME, PaperRun, outline
from sft_parallel_4d.reckoning import accepted_plans, calculator_of, wanted

ROOM = 0.9
"""The share of a device's memory that a plan may fill: paddle and the system need some themselves."""
_SHORTEST = 128


@dataclass(frozen=True)
class Way:
    """Settings of a run that its memory depends on."""

    batch: int
    accumulation: int
    recompute: bool
    length: int

    def typed(self, now: Way) -> str:
        """What to add to the command line, where the settings are ``now``."""
        options = []
        if self.batch != now.batch:
            options.append(
                f"--per_device_train_batch_size {self.batch} --gradient_accumulation_steps {self.accumulation}"
            )
        if self.recompute != now.recompute:
            options.append("--recompute true")
        if self.length != now.length:
            options.append(f"--max_length {self.length}")
        return " ".join(options)


def advice(values: Mapping[str, Any], device: str, memory: int) -> str | None:
    """A clause: what a run with these settings needs of the ``memory`` bytes of its ``device``, and what would need
    less. Only ``config.json`` is read."""
    paper, now = _set(values)
    of_gpu = memory if device == "gpu" else None
    need = peak(paper, now, of_gpu)
    if need is None:
        return None
    found = [(way, size) for way in _smaller(now) if (size := peak(paper, way, of_gpu)) is not None and size < need]
    text = f"by the formulas of sft plan it needs {_gib(need)} of the {_gib(memory)} here"
    limit = min(ROOM * memory, need)
    way, size = next(((way, size) for way, size in found if size <= limit), (None, 0))
    if need <= ROOM * memory:
        text += ", so look what else has memory"
    if way is not None:
        same = "" if way.length < now.length else ", and learns the same"
        return f"{text}; with {way.typed(now)} it needs {_gib(size)}{same}"
    if not found:
        return f"{text}, and nothing that a setting changes needs less: take a smaller model, or more devices"
    way, size = min(found, key=lambda pair: pair[1])
    return f"{text}, and {_gib(size)} even with {way.typed(now)}: take a smaller model, an adapter, or more devices"


def need(values: Mapping[str, Any], device: str, memory: int) -> int | None:
    """Bytes that the fullest process of a run with these settings needs of the ``memory`` of its ``device``; None where
    a plugin does not say on paper what it does."""
    paper, way = _set(values)
    if any(note.startswith("note: ") for note in paper.notes):
        return None
    settings, options = paper.run.settings, paper.run.settings.options[NAME]
    plan = plan_of(settings, options, processes(options, settings.training.device))
    of_gpu = memory if device == "gpu" else None
    return calculator_of(paper, way.batch, way.length, of_gpu).fullest(plan).peak


def _set(values: Mapping[str, Any]) -> tuple[PaperRun, Way]:
    paper = outline(values)
    training = paper.run.settings.training
    length = min(paper.run.settings.data.max_length, paper.outline.positions)
    accumulation = training.gradient_accumulation_steps
    return paper, Way(training.per_device_train_batch_size, accumulation, training.recompute, length)


def peak(paper: PaperRun, way: Way, of_gpu: int | None) -> int | None:
    """Bytes that the fullest process needs (``of_gpu``: those that its GPU has); None where there is no such plan."""
    settings = paper.run.settings
    world = processes(settings.options[NAME], settings.training.device)
    rows = way.batch * way.accumulation * world
    chosen = replace(wanted(settings), recompute=way.recompute)
    try:
        plans = accepted_plans(paper, world, rows, way.batch, chosen)
    except sft.UsageError:
        return None
    calculator = calculator_of(paper, way.batch, way.length, of_gpu)
    return min((calculator.fullest(plan).peak for plan in plans), default=None)


def _smaller(now: Way) -> Iterator[Way]:
    """What costs least first: the same steps in smaller pieces, then computing blocks twice, then shorter records."""
    pieces = [now]
    while pieces[-1].batch % 2 == 0:
        last = pieces[-1]
        pieces.append(replace(last, batch=last.batch // 2, accumulation=last.accumulation * 2))
    if pieces[-1].batch > 1:
        last = pieces[-1]
        pieces.append(replace(last, batch=1, accumulation=last.accumulation * last.batch))
    yield from pieces[1:]
    if not now.recompute:
        yield from (replace(way, recompute=True) for way in pieces)
    length = now.length // 2
    while length >= _SHORTEST:
        yield replace(pieces[-1], recompute=True, length=length)
        length //= 2


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"

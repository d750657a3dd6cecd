"""Which records made the loss or the gradients of a run jump: its spikes, computed again and taken apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from sft.replay.opened import OpenedRun
from sft.replay.replay import replay
from sft.replay.spikes import Spike, spikes
from sft.replay.value import Replay, ReplayedRecord, ReplayedStep, written

ENOUGH = 0.1
"""Of what makes a spike, the share with which a record is named. Whatever it is, the first one is."""
NAMED = 3
"""The most that are named of a step."""


@dataclass(frozen=True)
class Suspect:
    """A record in a spike.

    Attributes:
        excess: By how much it raised the summed loss of the step (lowered it, below 0): Σ w · (loss - what is usual)
            over its targets, in nats. The sum over all records, divided by the targets' weight, is exactly by how much
            the step's cross-entropy differs from what is usual.
        share: Its part of all that went in the direction of the spike, 0 to 1.
    """

    record: ReplayedRecord
    excess: float
    share: float


@dataclass(frozen=True)
class Blamed:
    """A spike, with its step computed again; ``suspects`` are the records that are named, those first that did most."""

    spike: Spike
    step: ReplayedStep
    suspects: list[Suspect]


@dataclass(frozen=True)
class Blame:
    """What came of looking for spikes in a run of so many ``steps``."""

    steps: int
    blamed: list[Blamed]
    replay: Replay

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "run": self.replay.folder,
            "steps": self.steps,
            "computed_steps": self.replay.computed,
            "differences": self.replay.differences,
            "minimises": self.replay.minimises,
            "spikes": [
                {
                    **{name: written(value) for name, value in asdict(one.spike).items()},
                    "is_same": one.step.is_same,
                    "records": [
                        {"place": each.record.place, "targets": each.record.targets, "share": each.share}
                        | {"loss": written(each.record.loss), "excess": written(each.excess)}
                        for each in one.suspects
                    ],
                }
                for one in self.blamed
            ],
        }


def blame(opened: OpenedRun, most: int, say: Callable[[str], None]) -> Blame:
    """Compute the ``most`` most conspicuous steps again. Raises :class:`UsageError` for what :func:`replay` does, and
    for a run that has not written down the figures of its steps."""
    figures = opened.required_figures()
    if opened.cut is not None:
        say(f"note: {opened.cut}, so later spikes are not found")
    found = {one.step: one for one in spikes(figures, most)}
    again = replay(opened, found, say)
    plain = not again.minimises
    blamed = [Blamed(found[step.step], step, suspects(step, found[step.step], plain)) for step in again.steps]
    return Blame(len(figures), sorted(blamed, key=lambda one: (-one.spike.score, one.step.step)), again)


def suspects(step: ReplayedStep, spike: Spike, plain: bool) -> list[Suspect]:
    """The records of a step that made it stand out, those first that did most. Where the run minimises something else
    than cross-entropy, not ``plain``, they are compared with the step's own mean."""
    usual = spike.usual_loss if plain else step.mean_loss
    direction = spike.direction if plain else 0
    known = [(one, one.loss) for one in step.records if one.loss is not None]
    each = [(one.weight * (loss - usual), one) for one, loss in known]
    pulls = [abs(excess) if direction == 0 else max(0.0, direction * excess) for excess, _ in each]
    broken = [float(not math.isfinite(loss)) for _, loss in known]
    pulls = broken if any(broken) else pulls  # these made the step what it is
    total = sum(pulls) or 1.0
    found = [Suspect(one, excess, pull / total) for pull, (excess, one) in zip(pulls, each, strict=True)]
    ordered = sorted(found, key=lambda one: -one.share)
    return [one for at, one in enumerate(ordered[:NAMED]) if at == 0 or one.share >= ENOUGH]

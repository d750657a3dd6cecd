"""What is known of steps that have been computed again: :class:`Replay`, which ``sft replay --json`` prints."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sft.data.encoded import IGNORED
from sft.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Span:
    """Where a record stands in a row: tokens ``start`` to ``end``, which are ``documents`` documents."""

    row: int
    start: int
    end: int
    documents: int = 1


@dataclass(frozen=True)
class ReplayedRecord:
    """A record in a step.

    Attributes:
        place: Its file and line. Of several that a collator has put into a row where nobody can tell them apart, all.
        loss: The mean cross-entropy of its targets, each of which counts what it weighs, in nats; None where it has no
            target there.
        weight: What its targets weigh together: their number, unless records or messages have weights.
    """

    place: str
    span: Span
    tokens: int
    targets: int
    weight: float
    loss: float | None


@dataclass(frozen=True)
class ReplayedRow:
    """A row as the model read it, padding included.

    Attributes:
        input_ids: int64 [S].
        labels: int64 [S], already shifted, -100 where nothing is learned.
        position_ids: int64 [S].
        ends: int32 [S], the mask: query tokens from that one on do not see this key (and none before it does).
        lengths: Tokens of its documents; what follows is padding.
        losses: float64 [S], the cross-entropy of each label in nats, 0 where there is none.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    ends: np.ndarray
    lengths: tuple[int, ...]
    losses: np.ndarray

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(self.lengths)

    def as_dict(self) -> dict[str, Any]:
        return {
            "lengths": list(self.lengths),
            **{name: getattr(self, name).tolist() for name in ("input_ids", "labels", "position_ids", "ends")},
            "losses": [
                float(loss) if label != IGNORED else None for loss, label in zip(self.losses, self.labels, strict=True)
            ],
        }


@dataclass(frozen=True)
class ReplayedStep:
    """A step, computed again, and what the run had written down of it.

    Attributes:
        loss: As the run minimises it; with ``grad_norm``, the norm of all gradients before they are clipped.
        recorded: Loss and gradient norm in ``steps.bin``; None where the run did not write them down.
        skipped: Whether it changed nothing, since one of the two is not finite.
        records: In the order of the rows.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    recorded: tuple[float, float] | None
    rows: list[ReplayedRow]
    records: list[ReplayedRecord]

    @property
    def skipped(self) -> bool:
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))

    @property
    def is_same(self) -> bool | None:
        """Whether loss and gradient norm are those that the run has recorded, to the last bit; None: it has none."""
        if self.recorded is None:
            return None
        return all(is_same(*pair) for pair in zip((self.loss, self.grad_norm), self.recorded, strict=True))

    @property
    def by_loss(self) -> list[ReplayedRecord]:
        """The records, those with the highest loss first, before them those whose loss is no number; those that have
        none come last."""

        def place(one: ReplayedRecord) -> float:
            if one.loss is None:
                return math.inf
            return -math.inf if math.isnan(one.loss) else -one.loss

        return sorted(self.records, key=place)

    @property
    def mean_loss(self) -> float:
        """The mean cross-entropy of all targets: of a run that minimises that, its loss but for rounding."""
        known = [(one.loss, one.weight) for one in self.records if one.loss is not None]
        return sum(loss * weight for loss, weight in known) / (sum(weight for _, weight in known) or 1.0)

    def as_dict(self) -> dict[str, Any]:
        recorded = None
        if self.recorded is not None:
            recorded = dict(zip(("loss", "grad_norm"), map(written, self.recorded), strict=True))
        return {
            "step": self.step,
            "epoch": self.epoch,
            "loss": written(self.loss),
            "grad_norm": written(self.grad_norm),
            "recorded": recorded,
            "is_same": self.is_same,
            "skipped": self.skipped,
            "records": [{**asdict(one), "loss": written(one.loss)} for one in self.records],
            "rows": [row.as_dict() for row in self.rows],
        }


def is_same(one: float, other: float) -> bool:
    """Whether two figures are equal; what is no number equals what is none either."""
    return one == other or (math.isnan(one) and math.isnan(other))


def written(value: float | None) -> float | str | None:
    """A number for JSON, which has none that are not finite."""
    return value if value is None or math.isfinite(value) else str(value)


@dataclass(frozen=True)
class Replay:
    """What came of computing steps again.

    Attributes:
        folder: Of the run.
        steps: Those that were asked for, in ascending order.
        computed: How many steps were computed for that, those between checkpoints among them.
        starts: From where: the step of each checkpoint, 0 for the beginning of the run.
        differences: What is not as it was in the run, each a clause: its arithmetic, versions, plugins, data.
        minimises: The plugins that make something else of the loss than cross-entropy; the losses of records and tokens
            are cross-entropy all the same.
    """

    folder: str
    steps: list[ReplayedStep]
    computed: int
    starts: list[int]
    differences: list[str] = field(default_factory=list)
    minimises: list[str] = field(default_factory=list)
    tokenizer: Tokenizer | None = None

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "run": self.folder,
            "computed_steps": self.computed,
            "from_steps": self.starts,
            "differences": self.differences,
            "minimises": self.minimises,
            "steps": [one.as_dict() for one in self.steps],
        }

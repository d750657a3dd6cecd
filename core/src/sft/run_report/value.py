"""What is known of a run from its folder: :class:`RunReport`, which ``report.json`` holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

PAGE = "report.html"
"""What the page of a run is called in its folder; its JSON lies beside it, as ``report.json``."""


@dataclass(frozen=True)
class Curve:
    """One figure over the steps of a run.

    Attributes:
        chart: What it is drawn in: ``loss``, ``learning_rate``, ``grad_norm``, ``tokens_per_second``, ``memory_mib``,
            ``padding`` (a share, 0 to 1), ``accuracy``, ``answers`` (scores of the model's own answers), ``objective``,
            or the name of a number of a plugin, which has a slash.
        name: ``train``, a mean over the steps of a line; ``each step``; ``dev``; ``dev NAME`` of one of several data
            sets; or which score.
        steps: Ascending. A figure of a stretch of steps stands at its last one.
        values: As many, all finite.
    """

    chart: str
    name: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Moments:
    """When the logged steps were made: four columns of equal length. Tokens (without padding) and seconds of training
    are counted from the beginning of the run."""

    steps: list[int] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Given:
    """What the model answered after ``step``; ``when`` is before, during or after."""

    when: str
    step: int | None
    text: str


@dataclass(frozen=True)
class Answers:
    """A question to the model, the answer of the data, and what the model said from the run's beginning to its end."""

    prompt: str
    reference: str
    given: list[Given]


@dataclass(frozen=True)
class Document:
    """A record in a row, or one of several that a record is.

    Attributes:
        record: Its number among those of the training data, from 1; None where that is not known.
        spans: Tokens that are not learned, that are learned, that are not learned, and so on.
    """

    record: int | None
    spans: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.spans)


@dataclass(frozen=True)
class Row:
    """A row of a batch: documents, and then padding up to ``width`` tokens."""

    step: int
    width: int
    documents: list[Document]

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(one.tokens for one in self.documents)


@dataclass(frozen=True)
class Mask:
    """Who sees whom in a row: token q sees token k if k ≤ q < end of k. ``row`` is the row's number among
    :attr:`RunReport.rows`; ``ends`` are pairs of an end and how many tokens, one after the other, have it."""

    row: int
    ends: list[tuple[int, int]]


@dataclass(frozen=True)
class Layer:
    """A block of the model, or what is in none: parameters that train, by the part that they belong to."""

    name: str
    trained: dict[str, int]


@dataclass(frozen=True)
class Skipped:
    """The records that cannot be read: how many there are, and the first of them, as ``bad_records.jsonl`` has them."""

    records: int = 0
    first: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class RunReport:
    """A run, as its folder has it. What a run of an earlier version did not write down is empty.

    Attributes:
        name: What it is called: its ``run_name``, or its folder.
        folder: Where it is.
        status: ``running``; ``finished``; ``failed``, with the ``error``; ``interrupted``; or ``died``: it says that it
            runs, and no process does.
        started: Date and time, ISO 8601.
        step: The last step that is written down, whether it was logged or not.
        total_steps: Where it ends, if nothing ends it earlier.
        seconds: By the clock: of the whole run where it has finished, else of the training, up to ``step``.
        result: What :class:`sft.Summary` says, once it has finished; empty before.
        settings: All of them, by name.
        changed: Those that are not what they are by default, each with its default (None too where a run of an earlier
            version did not write it down).
        without_effect: Settings that were given and did nothing, each with the reason.
        notes: What the run has said of what it left out, refused or could not do (``sft.log``), each once.
        counts: What became of the records of ``train`` and ``dev``, as the run counts them.
        machine, arithmetic, precision, hub: What ``run.json`` has under these words: what it ran on, what the last bits
            depend on, dtypes, and the commits of what a hub brought.
        skipped_steps: Steps that changed nothing.
        trained, total: Parameters, in values; None where the run has not come so far.
        evaluations: Each as ``metrics.jsonl`` has it: losses in nats per target token.
        checkpoints: The steps whose checkpoints are there.
    """

    name: str
    folder: str
    status: str
    error: str | None
    started: str | None
    step: int
    total_steps: int | None
    seconds: float
    result: dict[str, Any]
    settings: dict[str, Any]
    changed: dict[str, Any]
    without_effect: list[tuple[str, str]]
    plugins: dict[str, str]
    packages: dict[str, str]
    machine: dict[str, Any]
    arithmetic: dict[str, Any]
    precision: dict[str, Any]
    hub: dict[str, Any]
    notes: list[str]
    counts: dict[str, dict[str, Any]]
    skipped: Skipped
    skipped_steps: int
    trained: int | None
    total: int | None
    layers: list[Layer]
    moments: Moments
    curves: list[Curve]
    evaluations: list[dict[str, Any]]
    answers: list[Answers]
    packs: bool
    rows: list[Row]
    mask: Mask | None
    checkpoints: list[int]

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)

    def curve(self, chart: str, name: str) -> Curve | None:
        """One of the curves; None where the run has no such figure."""
        return next((one for one in self.curves if (one.chart, one.name) == (chart, name)), None)

    @property
    def latest_loss(self) -> Curve | None:
        """The curve of the training's loss that has come furthest: that of the logged lines; or that of each step,
        where steps have come since the last line."""
        found = (self.curve("loss", "train"), self.curve("loss", "each step"))
        return max((one for one in found if one is not None), key=lambda one: one.steps[-1], default=None)

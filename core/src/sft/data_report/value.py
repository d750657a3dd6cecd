"""What is known of the data of a run before it begins: :class:`DataReport`, which ``sft data --json`` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Bar:
    """How many records have from ``first`` to ``last`` tokens."""

    first: int
    last: int
    records: int


@dataclass(frozen=True)
class Lengths:
    """Tokens of the records as the template writes them, before any is cut."""

    mean: float
    median: int
    percentile_90: int
    percentile_99: int
    longest: int
    bars: list[Bar]


@dataclass(frozen=True)
class Pair:
    """Two records that are alike, by file and line."""

    record: str
    earlier: str
    likeness: float
    """Jaccard likeness of their texts, 1 for equal ones; an estimate otherwise."""


@dataclass(frozen=True)
class Duplicates:
    """Records whose turns and tools are those of a record before them."""

    records: int
    first: list[Pair]


@dataclass(frozen=True)
class NearDuplicates:
    """Of different records, those that nearly are another one of the sample."""

    sampled: int
    """Records that were compared with each other."""
    of: int
    """Different records that there are."""
    threshold: float
    records: int
    first: list[Pair]


@dataclass(frozen=True)
class RowCount:
    """The rows of the first pass, in batches as a single process makes them."""

    collator: str
    packs: bool
    rows: int
    records: int
    tokens: int
    padding_tokens: int
    batch_size: int
    steps: int
    """Optimizer steps of a pass."""
    window: int | None
    """So many records at a time share rows; None: all."""

    @property
    def padding(self) -> float:
        """The share of padding, 0 to 1."""
        return self.padding_tokens / max(1, self.tokens + self.padding_tokens)


@dataclass(frozen=True)
class SetCounts:
    """One of several data sets."""

    format: str
    weight: float | None
    counts: dict[str, int]


@dataclass(frozen=True)
class Split:
    """Train or dev data."""

    files: list[str]
    bytes: int
    formats: dict[str, int]
    """Records that could be read, by the name of their format."""
    counts: dict[str, int]
    """What became of the records, as in ``run.json``."""
    turns: dict[str, int]
    """By role."""
    lengths: Lengths | None
    """None where there is no record to measure."""
    over_long: int
    """Records of more than ``max_length`` tokens."""
    over_model: int
    """Records that keep more tokens than the model has positions, which a run refuses."""
    duplicates: Duplicates
    near_duplicates: NearDuplicates | None
    """None where they were not looked for; a note says why."""
    first_skipped: str | None
    sets: dict[str, SetCounts]
    """Of each data set, where there are several."""

    @property
    def trained_share(self) -> float:
        """Tokens that are learned, of those that are read."""
        return self.counts["target_tokens"] / max(1, self.counts["tokens"])


@dataclass(frozen=True)
class Piece:
    """Tokens that follow each other and are all learned or all not; a special token stands alone."""

    text: str
    learned: bool
    special: bool


@dataclass(frozen=True)
class ShownRecord:
    """A record as the model reads it."""

    split: str
    place: str
    tokens: int
    learned: int
    rows: list[list[Piece]]
    """What it becomes: one row, unless it is divided."""


@dataclass(frozen=True)
class DataReport:
    """What ``sft data`` has found.

    Attributes:
        settings: Those that decide what the model sees, by name.
        splits: ``train``, ``dev``, or both.
        overlap: Dev records that are training records too; None where there is only one split.
        found: How many records have the text that was looked for; None where none was.
    """

    model: str
    dataset: str
    chat_template: str
    settings: dict[str, Any]
    splits: dict[str, Split]
    rows: RowCount | None
    overlap: Duplicates | None
    searched: str | None
    found: int | None
    records: list[ShownRecord]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values; shares are numbers from 0 to 1."""
        values = asdict(self)
        for name, split in self.splits.items():
            values["splits"][name]["trained_share"] = round(split.trained_share, 6)
        if self.rows is not None:
            values["rows"]["padding_share"] = round(self.rows.padding, 6)
        return values

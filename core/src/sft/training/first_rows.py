"""``rows.json``: the first rows that a run trains, with their documents, from which its report draws how rows are
filled and who sees whom in one of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft.data.encoded import IGNORED, Encoded
from sft.errors import UsageError
from sft.files import discard, write_text
from sft.small_files import read_object

if TYPE_CHECKING:
    from sft.context import CoreRun
    from sft.data.batches import Step
    from sft.seams import Batch

NAME = "rows.json"
"""An object: ``packs``, whether the run puts several records into a row; ``rows``, each with its ``step``, its
``width`` (tokens with padding) and ``documents``, of each of which ``record`` is the number among the records that were
read (from 1) and ``spans`` are tokens not learned, learned, not learned, and so on; and ``mask``: for the first ``row``
of several documents the ``ends`` of :attr:`sft.Batch.startend_row_indices`, as pairs of an end and how many tokens have
it."""
MOST = 24


def keep_rows(run: CoreRun, source: Path) -> None:
    """Keep in the run's folder what the run that it goes on from, in the folder ``source``, had seen by then."""
    if run.strategy.is_main:
        rows = FirstRows(run, source)
        discard(run.output_dir / NAME)
        rows.write()


class FirstRows:
    """Looks at the first rows of this process until there are enough; the main one writes them down after each step.
    What is in the ``folder`` of a run that goes on is kept, up to its step."""

    def __init__(self, run: CoreRun, folder: Path) -> None:
        self._run = run
        self._path = run.output_dir / NAME if run.strategy.is_main else None
        self._rows: list[dict[str, Any]] = []
        self._mask: dict[str, Any] | None = None
        self._written = 0
        if self._path is not None and run.step:
            self._read(folder / NAME)

    def see(self, at: Step, batches: Sequence[Batch]) -> None:
        """A step is about to be made of these ``batches``."""
        if self._path is None or len(self._rows) == MOST:
            return
        rows = iter(at.rows[self._run.strategy.data_rank :: self._run.strategy.data_world])
        for batch in batches:
            for number, lengths in enumerate(batch.lengths):
                records = _records(at.data, next(rows, ()), len(lengths))
                if len(self._rows) < MOST:
                    self._add(at.number, batch, number, lengths, records)
        self.write()

    def write(self) -> None:
        """Write what has been seen, unless that is done. Where it cannot be written the run goes on."""
        if self._path is None or len(self._rows) == self._written:
            return
        said = {"packs": bool(getattr(self._run.collator, "packs", False)), "mask": self._mask, "rows": self._rows}
        self._written = len(self._rows)
        try:
            write_text(self._path, json.dumps(said) + "\n")
        except OSError as error:
            self._run.say(f"note: {self._path} could not be written ({error.strerror}), so the report draws no rows")
            self._path = None

    def _read(self, path: Path) -> None:
        with contextlib.suppress(UsageError, KeyError, TypeError):  # without them the picture begins later
            said = read_object(path)
            rows = [row for row in said["rows"] if row["step"] <= self._run.step]
            mask = said["mask"] if said["mask"] and said["mask"]["row"] < len(rows) else None
            self._rows, self._mask = rows, mask

    def _add(self, step: int, batch: Batch, number: int, lengths: Sequence[int], records: Sequence[int | None]) -> None:
        learned = batch.labels[number] != IGNORED
        edges = np.cumsum([0, *lengths])
        documents = [
            {"record": record, "spans": _spans(learned[start:stop])}
            for record, start, stop in zip(records, edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        ]
        if self._mask is None and len(documents) > 1:
            values, counts = _stretches(batch.startend_row_indices[number, 0, :, 0])
            self._mask = {"row": len(self._rows), "ends": list(zip(values, counts, strict=True))}
        self._rows.append({"step": step, "width": int(batch.input_ids.shape[1]), "documents": documents})


def _records(data: Encoded, row: Sequence[int], documents: int) -> list[int | None]:
    """Of each document of a row the number of its record, from 1; None where the collator has made others of them."""
    numbers = data.numbers(row)
    each = [1] * len(row) if not len(data.beside) else [int(data.edges[n + 1] - data.edges[n]) for n in row]
    found: list[int | None] = [number + 1 for number, count in zip(numbers, each, strict=True) for _ in range(count)]
    return found if len(found) == documents else [None] * documents


def _spans(learned: np.ndarray) -> list[int]:
    values, counts = _stretches(learned.astype(np.int64))
    return [0, *counts] if values and values[0] else counts


def _stretches(values: np.ndarray) -> tuple[list[int], list[int]]:
    """Equal values that follow each other: which, and how many."""
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return values[starts].tolist(), np.diff([*starts, len(values)]).tolist()

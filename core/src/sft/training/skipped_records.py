"""``bad_records.jsonl``: the records that a run skips because they cannot be read (``on_bad_record skip``)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.bad_records import BadRecord
from sft.files import write_text

if TYPE_CHECKING:
    from sft.context import CoreRun

NAME = "bad_records.jsonl"
"""One JSON object a line: split, file, line (in a parquet file: row), record (of an array, from 1), reason."""


def list_skipped(run: CoreRun, source: Path | None) -> None:
    """Write the list, and go on with it as a stream comes upon more. ``source`` is the folder of the run that this one
    goes on from; what that one has come upon stays listed. Only the main process writes."""
    if run.settings.data.on_bad_record != "skip" or not run.strategy.is_main:
        return
    there = _whole_lines(source / NAME) if source is not None and run.settings.data.lazy else []
    skipped = _List(run.output_dir / NAME, there)
    for split, data in (("dev", run.dev_data), ("train", run.train_data)):
        if data is not None:
            data.list_bad(partial(skipped.add, split))
    if skipped.path.is_file():
        run.say(f"note: records that cannot be read are skipped; they are listed in {skipped.path}")


class _List:
    """Records in the order in which they are met, each once, however often a stream passes it."""

    def __init__(self, path: Path, lines: Sequence[str]) -> None:
        self.path, self._listed = path, set(lines)
        if lines or path.exists():
            write_text(path, "".join(lines))

    def add(self, split: str, records: Iterable[BadRecord]) -> None:
        lines = [line for record in records if (line := _line(split, record)) not in self._listed]
        if lines:
            self._listed.update(lines)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
                file.flush()
                os.fsync(file.fileno())  # a run that goes on from a later checkpoint does not meet them again


def _line(split: str, record: BadRecord) -> str:
    path, line, number = record.place
    where: dict[str, Any] = {"row" if path.suffix == ".parquet" else "line": line}
    if number is not None:
        where["record"] = number
    entry = {"split": split, "file": str(path), **where, "reason": record.reason}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _whole_lines(path: Path) -> list[str]:
    """All but one that was being written when a run ended."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return [f"{line}\n" for line in text.split("\n")[:-1]]

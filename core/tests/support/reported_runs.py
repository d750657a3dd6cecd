"""A run whose report many tests look at, and folders of runs that nobody has made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_plugins import providing

import sft
from sft.data.batches import assemble

Train = Callable[..., sft.Summary]


class Threes:
    """Three records a row, in the order of the data."""

    packs = True

    def __init__(self, run: sft.Run) -> None:
        self.pad_id = run.tokenizer.pad_id

    def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        return [tuple(range(start, min(start + 3, len(lengths)))) for start in range(0, len(lengths), 3)]

    def batch(self, rows: Any) -> sft.Batch:
        return assemble(rows, self.pad_id)


Packing = providing("sft_collator", Threes, "packing")


@dataclass(frozen=True)
class Reported:
    """A run, as it said itself what came of it, and as its folder is read."""

    folder: Path
    summary: sft.Summary
    report: sft.RunReport


@pytest.fixture(scope="session")
def reported_once() -> list[Reported]:
    """Holds the run that is trained for all tests that only look."""
    return []


@pytest.fixture
def reported(reported_once: list[Reported], train: Train, tmp_path: Path) -> Reported:
    if not reported_once:
        summary = train(
            "out",
            (Packing,),
            **{"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            **{"evaluation_strategy": "steps", "eval_steps": 2, "num_samples": 2, "max_new_tokens": 4, "seed": 7},
        )
        reported_once.append(Reported(tmp_path / "out", summary, sft.read_run(tmp_path / "out")))
    return reported_once[0]


def written(folder: Path, **record: Any) -> Path:
    """The folder of a run that somebody has made up."""
    folder.mkdir()
    record = {"status": "finished", "settings": {}, **record}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder

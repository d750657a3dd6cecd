"""Data with known faults, and reports on it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft
from sft.data_report.gather import Wanted, data_report
from sft.data_report.value import DataReport
from sft.testing import write_data

Looking = Callable[..., DataReport]


def records(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions and answers of some words, a few of them several times."""
    words = "red blue warm light coat shirt dress summer city rain long short".split()
    draw = random.Random(seed)
    made = [
        {"src": " ".join(draw.choices(words, k=draw.randint(1, 9))), "tgt": " ".join(draw.choices(words, k=5))}
        for _ in range(number)
    ]
    return [*made, *draw.choices(made, k=number // 5)]


def read(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """The records of a data folder."""
    return [json.loads(line) for line in (folder / f"{split}.json").read_text(encoding="utf-8").splitlines()]


def turns_of(record: dict[str, str]) -> sft.Conversation:
    return sft.Conversation([sft.Turn("user", record["src"]), sft.Turn("assistant", record["tgt"], trains=True)])


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of :func:`records`: some are there twice, and some in both splits."""
    train = records(60)
    return write_data(tmp_path_factory.mktemp("data"), train, [*records(6, seed=1), *train[10:14]])


@pytest.fixture(scope="session")
def look(base_model: Path, questions: Path) -> Looking:
    """The report on ``questions``, with other settings, records and texts where these are given; of equal ones one."""
    made: dict[str, DataReport] = {}

    def make(number: int = 20, find: str | None = None, **settings: Any) -> DataReport:
        values = {"model_name_or_path": str(base_model), "dataset_name_or_path": str(questions), **settings}
        key = repr((number, find, sorted(values.items())))
        if key not in made:
            made[key] = data_report(values, Wanted(number, find), lambda text: None)
        return made[key]

    return make

"""SIGTERM, SIGINT and SIGHUP at random moments: a run exits as documented, run.json says that it was interrupted, and,
resumed with ``auto``, it ends as one that nobody stopped."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from reliability import figures
from reliability.killing import Runs
from reliability.trials import CASES, Trial
from sft.testing import needs

MOMENTS = 60 if figures.WHOLE else 3
"""Signals to a case, of all three kinds in turn."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600 if figures.WHOLE else 120)]


@pytest.mark.row("signals", "{name}")
@pytest.mark.parametrize(
    "name",
    [
        "full, padded, with NEFTune",
        pytest.param("two ranks", marks=needs("lora", "zero-padding", "parallel-4d")),
    ],
)
def test_signals(runs: Runs, records: Path, tmp_path: Path, name: str) -> None:
    trial = Trial(runs, records, tmp_path, CASES[name])
    draw, began, lost = random.Random(name), time.monotonic(), []
    for count in range(MOMENTS):
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[count % 3]
        moment = draw.uniform(0.1, 1) * trial.seconds
        lost += trial.lost(f"{number.name} after {moment:.3f} s", after=moment, number=number)
    heard = sum(count for code, count in trial.codes.items() if code > 128)
    figures.record("signals", name, signals=MOMENTS, heard=heard, lost=len(lost), seconds=time.monotonic() - began)
    assert not lost, "\n".join(lost)
    assert heard, "each came before the run, or after it"

"""``kill -9`` before, in the midst of and after every operation on files of a run, and at random moments: resumed with
``auto`` it ends with the same files, metrics and optimizer state, to the bit, as a run that nobody stopped.

The whole form makes every kill; the short form some of each kind. ``killing.py`` starts and kills the runs.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from reliability import figures
from reliability.killing import Operation, Runs
from reliability.trials import CASES, NAMES, Trial

MOMENTS = 200 if figures.WHOLE else 1
"""Kills of a case at random moments."""
KINDS = None if figures.WHOLE else 3
"""Kills of one process of a case at operations, each of another kind; None is all of them."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200 if figures.WHOLE else 240)]


@pytest.mark.row("kills", "{name}")
@pytest.mark.parametrize("name", NAMES)
def test_kills(runs: Runs, records: Path, tmp_path: Path, name: str) -> None:
    trial = Trial(runs, records, tmp_path, CASES[name])
    began = time.monotonic()
    lost: list[str] = []
    count = 0
    for rank, operations in enumerate(trial.operations):
        for operation, how in chosen(operations, random.Random(f"{name} {rank}")):
            count += 1
            lost += trial.lost(f"{how} {operation}", rank=rank, kill=(operation.number, how))
    covered = sum(map(len, trial.operations))
    moments = random.Random(name)
    for _ in range(MOMENTS):
        moment = moments.uniform(0, trial.seconds)
        lost += trial.lost(f"after {moment:.3f} s", after=moment)
    figures.record(
        "kills",
        name,
        kills=count + MOMENTS,
        lost=len(lost),
        operations_covered=covered,
        random_moments=MOMENTS,
        seconds=time.monotonic() - began,
    )
    assert not lost, f"{len(lost)} of {count + MOMENTS}:\n" + "\n".join(lost)


def chosen(operations: list[Operation], draw: random.Random) -> list[tuple[Operation, str]]:
    """The kills to make, with their moments. After an operation the disk is as before the next one, but other processes
    may have gone on; a write can be made in part."""
    found = [(one, how) for one in operations for how in ("before", "within", "after")]
    found = [(one, how) for one, how in found if how != "within" or (one.kind == "write" and one.size > 1)]
    if KINDS is None:
        return found
    kinds: dict[tuple[str, str], list[tuple[Operation, str]]] = {}
    for one, how in found:
        kinds.setdefault((one.kind, how), []).append((one, how))
    return [draw.choice(kinds[kind]) for kind in draw.sample(sorted(kinds), min(KINDS, len(kinds)))]

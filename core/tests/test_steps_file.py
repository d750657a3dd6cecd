"""The figures of each step (``steps.bin``): what was added is read again bit by bit, whatever becomes of the file."""

from __future__ import annotations

import math
import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.training.steps_file import HEAD, NAME, SIZE, StepsFile, read_steps

PAIRS = [(2.5 / step, 1e-3 * step) for step in range(1, 6)]


def written(folder: Path, pairs: list[tuple[float, float]], first: int = 1) -> StepsFile:
    """A file of these figures, of steps from ``first`` on."""
    file = StepsFile(folder / NAME)
    with closing(file):
        for step, pair in enumerate(pairs, first):
            file.add(step, *pair)
    return file


def pairs_in(folder: Path) -> list[tuple[float, float]]:
    found = read_steps(folder)
    assert found is not None
    return list(zip(found.loss.tolist(), found.grad_norm.tolist(), strict=True))


def test_what_is_added_is_there_at_once_bit_by_bit(tmp_path: Path) -> None:
    """A process that is killed closes nothing."""
    pairs = [(math.pi, 1e-310), (math.nan, math.inf), (-0.0, 2**53 + 1.0)]
    with closing(StepsFile(tmp_path / NAME)) as file:
        for step, pair in enumerate(pairs, 1):
            file.add(step, *pair)
            content = (tmp_path / NAME).read_bytes()
            assert content == HEAD + b"".join(struct.pack("<dd", *each) for each in pairs[:step])
    found = read_steps(tmp_path)
    assert found is not None
    assert (found.known.tolist(), found.taken.tolist()) == ([True] * 3, [True, False, True])
    assert len(HEAD) == SIZE


@pytest.mark.parametrize("left", [0, 5, 16, 16 + 3 * SIZE + 7])
def test_a_write_that_was_cut_off_is_no_step(tmp_path: Path, left: int) -> None:
    written(tmp_path, PAIRS)
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:left])
    assert pairs_in(tmp_path) == PAIRS[: max(0, left // SIZE - 1)]


def test_a_run_without_the_file_and_a_file_of_somebody_else(tmp_path: Path) -> None:
    assert read_steps(tmp_path) is None
    (tmp_path / NAME).write_bytes(b"not the figures of any steps")
    with pytest.raises(sft.UsageError, match=r"steps.bin is not the figures of a run's steps"):
        read_steps(tmp_path)


def test_steps_of_which_nothing_is_known(tmp_path: Path) -> None:
    """A run that goes on from a checkpoint of an earlier version."""
    written(tmp_path, PAIRS[2:], first=3)
    found = read_steps(tmp_path)
    assert found is not None
    assert found.known.tolist() == [False, False, True, True, True]
    assert np.isnan(found.loss[:2]).all()
    assert np.isnan(found.grad_norm[:2]).all()
    assert pairs_in(tmp_path)[2:] == PAIRS[2:]


# --- going back to a checkpoint -------------------------------------------------------------------------------


def rewound(to: Path, written_in: Path, state: dict[str, Any] | None, step: int = 3) -> tuple[StepsFile, str | None]:
    file = StepsFile(to / NAME)
    return file, file.rewind(step, state, written_in / NAME)


@pytest.fixture
def state(tmp_path: Path) -> dict[str, Any]:
    """That of a checkpoint of step 3; two steps have come after it."""
    file = written(tmp_path, PAIRS[:3])
    state = file.state()
    with closing(file):
        for step in (4, 5):
            file.add(step, 9.0, 9.0)
    return state


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_goes_on_has_the_same_file(tmp_path: Path, state: dict[str, Any], elsewhere: bool) -> None:
    """In its own folder it is cut off, in another one copied; by another name that somebody keeps, left alone."""
    other = tmp_path / "other"
    other.mkdir()
    kept = other / "kept"
    kept.hardlink_to(tmp_path / NAME)
    before = kept.read_bytes()
    to = other if elsewhere else tmp_path
    file, clause = rewound(to, tmp_path, state)
    assert clause is None
    with closing(file):
        for step, pair in enumerate(PAIRS[3:], 4):
            file.add(step, *pair)
    assert pairs_in(to) == PAIRS
    whole = StepsFile(None)
    for step, pair in enumerate(PAIRS, 1):
        whole.add(step, *pair)
    assert file.state() == whole.state()
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "clause", "known"),
    [
        (lambda path: path.unlink(), "has the figures of 0 of the 3 steps up to step 3 only", 0),
        (lambda path: path.write_bytes(b""), "has the figures of 0 of the 3 steps up to step 3 only", 0),
        (lambda path: path.write_bytes(path.read_bytes()[: 2 * SIZE]), "of 1 of the 3 steps up to step 3 only", 1),
        (lambda path: path.write_bytes(HEAD + bytes(5 * SIZE)), "has been changed since step 3", 3),
    ],
    ids=["gone", "empty", "short", "changed"],
)
def test_what_has_become_of_the_file_is_said(
    tmp_path: Path, state: dict[str, Any], damage: Any, clause: str, known: int
) -> None:
    damage(tmp_path / NAME)
    file, said = rewound(tmp_path, tmp_path, state)
    assert said is not None
    assert clause in said
    with closing(file):
        file.add(4, *PAIRS[3])
    found = read_steps(tmp_path)
    assert found is not None
    assert found.known.tolist() == [True] * known + [False] * (3 - known) + [True]


def test_a_checkpoint_of_an_earlier_version_has_no_figures_and_says_nothing(tmp_path: Path) -> None:
    file, said = rewound(tmp_path, tmp_path, None)
    assert said is None
    assert not list(tmp_path.iterdir())
    with closing(file):
        file.add(4, 1.0, 2.0)
    assert len(read_steps(tmp_path) or ()) == 4


def test_a_process_that_does_not_write_counts_the_same(tmp_path: Path, state: dict[str, Any]) -> None:
    silent = StepsFile(None)
    for step, pair in enumerate(PAIRS[:3], 1):
        silent.add(step, *pair)
    assert silent.state() == state
    assert silent.rewind(3, state, tmp_path / NAME) is None
    assert silent.count == 3

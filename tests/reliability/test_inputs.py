"""Broken input of every kind (``tests/bad_inputs/``): one sentence, exit code 2, nothing written, and in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_inputs import TABLES, counts
from bad_inputs.server import Server
from bad_inputs.trial import attempt, prepare

from reliability.figures import record

CASES = [(kind, name) for kind, cases in TABLES.items() for name in cases]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def good(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which each case is right but for its changes."""
    folder = tmp_path_factory.mktemp("good") / "good"
    prepare(server, folder)
    return folder


def failures(
    server: Server, good: Path, folder: Path, cases: list[tuple[str, str]], flushes: bool = False
) -> list[str]:
    """Those of the ``cases`` that do not end as they must, each with what was wrong and what was said."""
    found = []
    for number, (kind, name) in enumerate(cases):
        typed, wrong = attempt(server, good, folder / str(number), TABLES[kind][name], flushes)
        if wrong:
            found.append(f"{kind}: {name}: {'; '.join(wrong)}\n{typed.err[-2000:]}")
    return found


def test_some(server: Server, good: Path, tmp_path: Path) -> None:
    """Each twentieth, so that some of every kind are tried each time."""
    assert not failures(server, good, tmp_path, CASES[::20])


@pytest.mark.parametrize("flushes", [False, True])
def test_numbers_that_are_0_where_denormals_are(server: Server, good: Path, tmp_path: Path, flushes: bool) -> None:
    """The same is said of them there, and in the numbers of whoever wrote them."""
    cases = [(kind, name) for kind, name in CASES if "e-320" in name]
    assert len(cases) >= 8
    assert not failures(server, good, tmp_path, cases, flushes)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.row("inputs", "{kind}")
@pytest.mark.parametrize("kind", TABLES)
def test_all(server: Server, good: Path, tmp_path: Path, kind: str) -> None:
    began = time.monotonic()
    cases = [(kind, name) for name in TABLES[kind]]
    found = failures(server, good, tmp_path, cases)
    assert not found, "\n".join(found)
    record("inputs", kind, inputs=len(cases), wrong=0, seconds=time.monotonic() - began)


def test_there_are_enough_and_each_says_what_it_expects() -> None:
    assert sum(counts().values()) >= 800
    assert all(case.says for cases in TABLES.values() for case in cases.values())

"""What several of these tests share, and what sees to it that each row of the table is of a test that ran."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from reliability import figures
from reliability.killing import Runs, started
from reliability.trials import write_records

Row = tuple[str, str]
ROWS = pytest.StashKey[dict[Row, str]]()
"""The rows of the tests that were found, each with the test that fills it."""


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with started(tmp_path_factory.mktemp("runs")) as found:
        yield found


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture
def rows(pytestconfig: pytest.Config) -> dict[Row, str]:
    return pytestconfig.stash[ROWS]


def rows_of(test: pytest.Item) -> list[Row]:
    """The rows that a test fills: its marks may have parameters of it in braces."""
    given = test.callspec.params if hasattr(test, "callspec") else {}
    return [(mark.args[0].format(**given), mark.args[1].format(**given)) for mark in test.iter_markers("row")]


@pytest.hookimpl(tryfirst=True)  # before some are left out, as slow
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[ROWS] = {row: test.nodeid for test in items for row in rows_of(test)}
    if not figures.WHOLE:
        config.hook.pytest_deselected(items=[test for test in items if test.get_closest_marker("whole")])
        items[:] = [test for test in items if not test.get_closest_marker("whole")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """In the whole form a test that was skipped, or has come to no figures, fails, and its rows say so."""
    report: pytest.TestReport = yield
    if figures.WHOLE and (call.when == "call" or not report.passed):
        for row in rows_of(item):
            if row not in figures.RECORDED:
                why = " ".join(str(call.excinfo.value if call.excinfo else "it noted none").split())[:200]
                figures.did_not_run(*row, why)
                if not report.failed:
                    report.outcome, report.longrepr = "failed", f"{', '.join(row)}: no figures: {why}"
    return report

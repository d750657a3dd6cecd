"""The page of figures is made from what the tests measured, and from nothing that did not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from reliability import figures

pytest_plugins = ["pytester"]


def test_the_page_is_current() -> None:
    assert figures.missing(figures.written()) == []
    assert figures.is_current(), "make docs writes it anew"


def test_each_row_is_of_a_test_and_each_test_has_its_row(rows: dict[tuple[str, str], str]) -> None:
    written = {(section, case) for section, cases in figures.written().items() for case in cases}
    assert sorted(set(rows) - written) == [], "make test-reliability measures them"
    files = {test.partition("::")[0] for test in rows.values()}
    if (
        len(files) == len(list(Path(__file__).parent.glob("test_*.py"))) - 1
    ):  # all have been read, and this one has none
        assert written - set(rows) == set(), "no test fills these rows"


def test_figures_are_kept_in_the_whole_form_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "SECTIONS", {"kills": "Kills", "same": "One curve"})
    monkeypatch.setattr(figures, "FIGURES", tmp_path / "figures.json")
    monkeypatch.setattr(figures, "RECORDED", set())
    monkeypatch.setattr(figures, "WHOLE", False)
    figures.record("kills", "one", kills=3)
    assert figures.written() == {}
    monkeypatch.setattr(figures, "WHOLE", True)
    figures.record("same", "other", mean_drift=1.23456e-7, by="hand")
    figures.record("kills", "one", kills=3)
    figures.record("kills", "one", kills=1500, lost=0, seconds=12.3)
    text = figures.page(figures.written())
    assert [line.rpartition(" | ")[0] for line in text.splitlines()[-3:-1]] == [
        "| Kills | `test_kills` | one | 1,500 kills, 0 lost | 12",
        "| One curve | `test_same` | other | mean drift 1.23e-07, by hand | ",
    ]
    with pytest.raises(ValueError):
        figures.record("others", "one")
    with pytest.raises(ValueError):
        figures.record("kills", "none")


def test_no_page_is_made_of_rows_without_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "SECTIONS", {"kills": "Kills", "same": "One curve"})
    monkeypatch.setattr(figures, "FIGURES", tmp_path / "figures.json")
    monkeypatch.setattr(figures, "WHOLE", True)
    monkeypatch.setattr(figures, "RECORDED", set())
    figures.record("kills", "one", kills=3)
    figures.record("kills", "two", kills=4)
    figures.did_not_run("kills", "two", "no compiler")
    one, other = figures.missing(figures.written())
    assert one.startswith("kills, two: not measured on ")
    assert one.endswith("""(no compiler); make test-reliability ARGS='-k "test_kills"' measures it""")
    assert other.startswith("same has no row; ")
    with pytest.raises(ValueError, match="kills, two"):
        figures.page(figures.written())
    assert not figures.is_current()


TESTS = """
import pytest
from reliability.figures import record

@pytest.mark.row("kills", "{name}")
@pytest.mark.parametrize("name", ["is counted", "is skipped", "fails", "notes nothing", "has lost some"])
def test(name):
    if name == "is skipped":
        pytest.skip("no compiler")
    assert name != "fails", "it is wrong"
    if name != "notes nothing":
        record("kills", name, kills=3)
    assert name != "has lost some"

@pytest.fixture
def broken():
    raise OSError("no room")

@pytest.mark.row("same", "is not set up")
def test_other(broken):
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_a_row_whose_test_did_not_run_says_so(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr(figures, "FIGURES", pytester.path / "figures.json")
    monkeypatch.setattr(figures, "WHOLE", True)
    monkeypatch.setattr(figures, "RECORDED", set())
    for name in ("is skipped", "fails", "notes nothing", "is no more"):
        figures.record("kills", name, kills=1000)  # of an older run
    monkeypatch.setattr(figures, "RECORDED", set())
    monkeypatch.setattr(figures, "WHOLE", whole)
    before = figures.written()
    pytester.makeini("[pytest]\nmarkers = row\n")
    pytester.makeconftest("from reliability.conftest import pytest_collection_modifyitems, pytest_runtest_makereport")
    pytester.makepyfile(TESTS)
    outcomes = pytester.runpytest_inprocess("-p", "no:cacheprovider").parseoutcomes()
    if not whole:
        assert outcomes == {"passed": 2, "skipped": 1, "failed": 2, "errors": 1}
        assert figures.written() == before
        return
    assert outcomes == {"passed": 1, "failed": 4, "errors": 1}
    found = {case: values for cases in figures.written().values() for case, values in cases.items()}
    assert {case: values.get("kills") for case, values in found.items()} == {
        **{"is counted": 3, "has lost some": 3, "is no more": 1000},
        **dict.fromkeys(["is skipped", "fails", "notes nothing", "is not set up"]),
    }
    assert found["is skipped"]["did_not_run"] == "no compiler"
    assert found["fails"]["did_not_run"].startswith("it is wrong")
    assert found["notes nothing"]["did_not_run"] == "it noted none"
    assert found["is not set up"]["did_not_run"] == "no room"

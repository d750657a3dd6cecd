"""The page of figures is made from what the tests measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from reliability import figures


def test_the_page_is_current() -> None:
    assert figures.is_current(), "make docs writes it anew"


def test_figures_are_kept_in_the_whole_form_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "FIGURES", tmp_path / "figures.json")
    monkeypatch.setattr(figures, "WHOLE", False)
    figures.record("kills", "one", kills=3)
    assert figures.written() == {}
    monkeypatch.setattr(figures, "WHOLE", True)
    figures.record("same", "other", mean_drift=1.23456e-7, by="hand")
    figures.record("kills", "one", kills=3)
    figures.record("kills", "one", kills=1500, lost=0, seconds=12.3)
    text = figures.page(figures.written())
    assert [line.rpartition(" | ")[0] for line in text.splitlines()[-3:-1]] == [
        f"| {figures.SECTIONS['kills']} | one | 1,500 kills, 0 lost | 12",
        f"| {figures.SECTIONS['same']} | other | mean drift 1.23e-07, by hand | ",
    ]
    with pytest.raises(ValueError):
        figures.record("others", "one")

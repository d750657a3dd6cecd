"""``report_to``: a list whose words ask for plugins, wherever they come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft
from sft import resolve
from sft.plugins.discovery import ALL_OF_PROJECT
from sft.settings import words

PAPER = """
    import sft

    class Paper(sft.Plugin):
        name = "paper"
        api_version = ">=1.1,<2"
        observes = True
        reads = ("run_name",)

        @sft.hookimpl
        def sft_logged(self, run, record):
            print(record["step"])
"""


@pytest.fixture(autouse=True)
def installed(distribute: Callable[..., None]) -> None:
    distribute("sft-paper", PAPER, {"paper": "Paper"}, {"value.report_to.paper": "Paper"})


def resolved(**values: Any) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """The words of ``report_to``, the plugins that are active for it, and what has no effect."""
    settings, active, idle = resolve.resolve(values, ())
    return settings.training.report_to, [name for name in active.names if name == "paper"], idle


@pytest.mark.parametrize("value", ["paper", ["paper"], '["Paper"]', " paper , none"])
def test_a_word_asks_for_its_plugin(value: Any) -> None:
    found, names, idle = resolved(report_to=value)
    assert (found, names) == (["paper"], ["paper"])
    assert idle == []


@pytest.mark.parametrize("value", ["none", "", [], None, "None"])
def test_none_asks_for_nothing(value: Any) -> None:
    found, names, idle = resolved(report_to=value)
    assert (found, names, idle) == ([], [], [])


def test_all_asks_for_every_one() -> None:
    found, names, _ = resolved(report_to="all")
    assert (found, names) == (["all"], ["paper"])


def test_all_but_one() -> None:
    assert resolved(report_to="all", plugin=["no:paper"])[1] == []


def test_an_unknown_word_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        sft.UsageError, match=r"^report_to: no installed plugin brings papier \(installed: .*paper.*\);"
    ):
        resolved(report_to="papier")


def test_a_word_whose_plugin_is_switched_off_is_refused() -> None:
    with pytest.raises(sft.UsageError) as caught:
        resolved(report_to="paper", plugin=["no:paper"])
    assert str(caught.value) == "report_to paper asks for plugin paper, which is switched off; keep one of them."


def test_files_of_others_run_where_no_plugin_is_installed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "by_words", dict)
    found, names, idle = resolved(report_to="visualdl")
    assert (found, names) == ([], [])
    assert idle == [("report_to visualdl", f"no plugin is installed that brings it; {ALL_OF_PROJECT}")]
    assert resolved(report_to="none")[2] == []


@pytest.mark.slow
def test_a_run_that_goes_on_may_report_elsewhere(train: Callable[..., Any], tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "do_eval": False}
    train("out", max_steps=1, **settings)
    said: list[str] = []
    train("out", max_steps=2, resume_from_checkpoint="auto", report_to="paper", say=said.append, **settings)
    assert not any("report_to" in line for line in said)

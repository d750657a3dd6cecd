"""`sft certify` catches what is wrong, in plugins of these tests and in the project's with a fault; and its page."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from certify.seed import FIGURES, seeded, tried
from click.testing import CliRunner
from making.readme import IN_COMPANY, together

import sft
from sft.certify.certify import CHECKS, certify
from sft.certify.report import MADE_BY, code, page
from sft.commands.cli import cli
from sft.pages import begins
from sft.plugins.discovery import installed
from sft.testing import check_plugin, needs

from seeded_faults import FAULTS  # isort: skip

pytestmark = pytest.mark.sweep  # as far as its tests are slow

ROOT = Path(__file__).parents[2]


class Scaled(sft.Plugin):
    """Learns less of everything: what is right."""

    name = "scaled"
    api_version = 1
    summary = "Learns less."

    @sft.hookimpl
    def sft_parameter_groups(self, run: sft.Run, groups: list[sft.ParameterGroup]) -> None:
        for group in groups:
            group.learning_rate *= 0.5


class DrawsFromAll(Scaled):
    """The same, by what numpy's own generator says."""

    name = "draws-from-all"
    api_version = 1

    @sft.hookimpl
    def sft_parameter_groups(self, run: sft.Run, groups: list[sft.ParameterGroup]) -> None:
        for group in groups:
            group.learning_rate *= np.random.uniform(0.4, 0.6)


def test_a_plugin_that_is_right_holds_and_one_that_draws_from_a_shared_generator_does_not() -> None:
    check_plugin(Scaled, "repeats")
    with pytest.raises(AssertionError, match=r"fails      repeats \(as it comes\): losses: at place 1, "):
        check_plugin(DrawsFromAll, "repeats")


class Asks(Scaled):
    """Reads records of its own."""

    name = "asks"
    api_version = 1
    certify = sft.Trial(
        settings={"max_steps": 2},
        records=[{"q": f"type#{number}", "a": "A coat."} for number in range(5)],
        environment={"SFT_TEST_PLACE": "{folder}/kept"},
    )
    seen: ClassVar[list[tuple[int, int, str]]] = []

    @sft.hookimpl
    def sft_record_format(self, record: dict[str, Any]) -> list[sft.Turn]:
        return [sft.Turn("user", record["q"]), sft.Turn("assistant", record["a"], trains=True)]

    @sft.hookimpl
    def sft_run_started(self, run: sft.Run) -> None:
        self.seen.append((run.settings.training.max_steps, len(run.train_data), os.environ["SFT_TEST_PLACE"]))


def test_what_a_plugin_needs_is_there_while_it_is_tried() -> None:
    report = certify("asks", plugins=[Asks], only=["learns"])
    assert (report.failures, [row.status for row in report.rows]) == ([], ["holds"])
    ((steps, records, place),) = Asks.seen
    assert (steps, records) == (2, 5)
    assert Path(place).name == "kept"
    assert not Path(place).parent.exists()
    assert "SFT_TEST_PLACE" not in os.environ


class NeedsAdapter(Scaled):
    """Refuses a run without an adapter."""

    name = "needs-adapter"
    api_version = 1

    @sft.hookimpl
    def sft_check(self, run: sft.Run) -> None:
        if run.plugins.provider("sft_export_adapter") is None:
            raise sft.UsageError("needs-adapter wants one.")


class NeedsMore(NeedsAdapter):
    """Refuses every run."""

    name = "needs-more"
    api_version = 1

    @sft.hookimpl
    def sft_check(self, run: sft.Run) -> None:
        raise sft.UsageError("needs-more wants more.")


@needs("lora")
def test_who_is_refused_without_an_adapter_is_tried_beside_one() -> None:
    report = certify("needs-adapter", plugins=[NeedsAdapter], only=["declared"])
    assert report.company
    with pytest.raises(sft.UsageError, match="Plugin needs-more cannot be tried here: needs-more wants more"):
        certify("needs-more", plugins=[NeedsMore], only=["declared"])


@needs("visualdl", "lora", "vera")
def test_who_cannot_be_tried_says_nothing_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """And two that can, and do not go together, are refused."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "visualdl" else found(name, *more)
    )
    (row,) = certify("lora", only=["works beside"], beside=["visualdl"]).rows
    assert (row.status, row.said[:31]) == ("not tried", "visualdl needs visualdl, which ")
    (row,) = certify("lora", only=["works beside"], beside=["vera"]).rows
    assert (row.status, "cannot work together" in row.said or "both provide" in row.said) == ("refused", True)


def test_each_fault_can_be_put_in(tmp_path: Path) -> None:
    for number, fault in enumerate(FAULTS):
        spec = importlib.util.find_spec(fault.module.partition("/")[0])
        if spec is None:
            continue  # this distribution is not installed
        origin = Path(str(spec.origin)).parents[1] / fault.module
        text = (seeded(fault, tmp_path / str(number)) / fault.module).read_text(encoding="utf-8")
        assert text != origin.read_text(encoding="utf-8"), fault.name


def test_the_page_has_every_fault_and_nineteen_of_twenty_are_caught() -> None:
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    assert list(figures) == [fault.name for fault in FAULTS]
    assert len(figures) >= 40
    caught = [name for name, one in figures.items() if one["caught"] is not None]
    assert len(caught) >= 0.95 * len(figures)


def test_all_holds_in_the_reports_that_are_kept() -> None:
    """From them the README's matrix is made."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "docs" / "certified").glob("*.json")]
    assert reports
    assert [report["plugin"] for report in reports if not report["holds"]] == []
    assert all({row["check"] for row in report["rows"]} >= {"resumes", "reloads"} for report in reports)
    assert [row for report in reports for row in report["rows"] if "sft-certify-" in row["said"]] == []


def test_a_typical_adapter_is_certified_whole_within_ten_minutes() -> None:
    """On two cores, as its report says, that is kept: families, two processes, merging and PEFT's layout among it."""
    report = json.loads((ROOT / "docs" / "certified" / "lora.json").read_text(encoding="utf-8"))
    assert (report["whole"], report["beside"], report["holds"]) == (True, None, True)
    assert report["seconds"] < 600
    held = {row["check"] for row in report["rows"] if row["status"] == "holds"}
    assert held >= {"works on family", "works in two processes", "works beside", "merges", "is in pefts layout"}


def test_what_all_runs_of_a_plugin_have_beside_is_measured_by_its_own_checks() -> None:
    """Where the matrix has a plus without a case that says so."""
    needed = [*({"check": check, "case": "", "status": "holds"} for check in IN_COMPANY)]
    report = {"holds": True, "company": ["lora"], "rows": needed}
    assert together("nf4", "lora", {"nf4": report}) == "+"
    assert together("nf4", "lora", {"nf4": {**report, "rows": needed[1:]}}) == "○"
    assert together("nf4", "lora", {"nf4": {**report, "holds": False}}) == "✗"
    assert together("nf4", "wsd", {"nf4": report}) == "○"


def test_the_command_says_what_fails_and_writes_its_reports(tmp_path: Path) -> None:
    path = tmp_path / "silent_plugin.py"
    path.write_text(
        'import sft\n\n\nclass Silent(sft.Plugin):\n    name = "silent"\n    api_version = 1\n\n'
        "    @sft.hookimpl\n    def sft_run_started(self, run):\n        pass\n",
        encoding="utf-8",
    )
    files = ["--json", str(tmp_path / "report.json"), "--html", str(tmp_path / "report.html")]
    done = CliRunner().invoke(cli, ["certify", str(path), "--check", "declared", *files])
    assert done.exit_code == 1
    assert "fails      declared: " in done.output
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (report["holds"], report["plugin"], len(report["rows"])) == (False, "silent", 1)
    assert report["versions"]["sft-core"]
    assert report["distribution"] == f"the file {path}"
    assert (report["whole"], report["beside"]) == (False, None)
    assert report["code"][path.name] == hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.startswith(begins(MADE_BY))
    assert '<td class="fails">' in text
    assert "<p>These checks alone: declared; beside all other plugins.</p>" in text
    assert f"{path.name} {report['code'][path.name]}" in text


def test_a_report_says_of_which_code_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any change of a Python file counts, in packages and in modules of one file; nothing is imported."""
    package = tmp_path / "sft_test_digest"
    (package / "inner").mkdir(parents=True)
    for path in (package / "__init__.py", package / "inner" / "one.py", tmp_path / "sft_test_single.py"):
        path.write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = {"package": "sft_test_digest.inner.one", "single": "sft_test_single"}
    before = code(modules)
    assert code(modules) == before
    assert before["package"] != before["single"]
    (package / "inner" / "one.py").write_text("2 / 0\n")
    after = code(modules)
    assert (after["package"] != before["package"], after["single"]) == (True, before["single"])


def test_what_a_plugin_says_is_text_on_the_page() -> None:
    report = certify("scaled", plugins=[Scaled], only=["declared"])
    report.plugin = "<script>alert(1)</script>"
    assert "<script>" not in page(report)


def test_a_check_or_an_option_that_is_not_there_is_refused() -> None:
    with pytest.raises(sft.UsageError, match="There is no check 'declares'"):
        certify("scaled", plugins=[Scaled], only=["declares"])
    with pytest.raises(sft.UsageError, match="has no option rank"):
        certify("scaled", plugins=[Scaled], tried={"rank": 4})


def test_checks_have_names_of_their_own_and_a_sentence() -> None:
    assert len({one.name for one in CHECKS}) == len(CHECKS)
    assert all(one.sentence.endswith(".") for one in CHECKS)


# One of each kind; `make certify-faults` tries them all.
SOME = ("lora-merge-sign", "pissa-state-not-restored", "vera-d-initial-ignored", "neftune-in-evaluation")
MORE = (
    "packing-labels-lost",
    "quantizer-gradient",
    "flashmask-sees-ahead",
    "kernels-turn-back",
    "lion-moment-not-kept",
)
LATER = ("dpo-counts-rows", "early-stopping-count-lost", "gguf-without-the-adapter", "focal-loss-of-the-batch")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [*SOME, *MORE, *LATER])
def test_a_seeded_fault_is_caught_by_the_check_that_the_page_names(name: str) -> None:
    (fault,) = (one for one in FAULTS if one.name == name)
    figures: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))[name]
    found = tried(fault, "--check", figures["caught"]["check"])
    assert found["caught"] is not None
    assert found["caught"]["check"] == figures["caught"]["check"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "docs" / "certified").glob("*.json")))
def test_a_plugin_of_the_project_keeps_what_every_plugin_must(name: str) -> None:
    if name not in installed():
        pytest.skip("not installed")
    try:
        check_plugin(name, "declared", "learns", "reloads", "resumes", "repeats")
    except sft.UsageError as error:
        if "is not installed; pip install" not in str(error):
            raise
        pytest.skip(str(error))  # the library of a tracker, which tests/test_tracker_libraries.py installs


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_adapter_holds_in_all_but_several_processes_and_each_company() -> None:
    skipped = {"works beside", "works in two processes", "works on family"}
    report = certify("vera", only=[one.name for one in CHECKS if one.name not in skipped])
    assert report.failures == []
    assert len(report.rows) > 30

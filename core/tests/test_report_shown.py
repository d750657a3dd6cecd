"""What `sft report` shows: the page of a run, or of several side by side, and where it may be written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from reported_runs import Reported, written
from toy_plugins import toy

import sft
from sft.commands.cli import cli
from sft.run_report import library, pictures, words
from sft.run_report.page import page

Train = Callable[..., sft.Summary]
EVIL = '<script>alert(1)</script></style><img src=x onerror="alert(2)">\x1b[2J\u202egnp'


def test_the_run_leaves_the_page_and_the_same_as_json(reported: Reported) -> None:
    run = reported.report
    folder = reported.folder
    values = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert values == {"made_by": "sft report", "runs": [json.loads(json.dumps(run.as_json()))]}
    assert (folder / "report.html").read_text(encoding="utf-8") == page([run])


def test_a_page_holds_all_and_asks_for_nothing(reported: Reported) -> None:
    run = reported.report
    written = page([run])
    shown = re.sub(r"<script.*?</script>|<style.*?</style>", "", written, flags=re.DOTALL)
    for name in ("Overview", "Curves", "Answers", "Rows", "Trained parameters", "Data and events", "Settings"):
        assert f"{name}</h2>" in shown
    for text in (run.answers[0].prompt, run.answers[0].given[1].text, "seed", str(run.machine["cpu"]), "numpy"):
        assert words.value(text) in shown or pictures.text(text) in shown
    assert not re.search(r'(?:src|href)="(?!#)|url\(|@import|style="| on\w+="', shown)
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', written)[0]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert policy.count("sha256-") == 3  # the style, the library with the charts, the page's own


def test_the_mask_that_is_drawn_is_causal_attention_within_each_document(reported: Reported) -> None:
    run = reported.report
    assert run.mask is not None
    documents = run.rows[run.mask.row].documents
    lengths = [one.tokens for one in documents]
    width = run.rows[run.mask.row].width
    of = np.concatenate([np.repeat(np.arange(len(lengths)), lengths), -1 - np.arange(width - sum(lengths))])
    expected = (of[:, None] == of[None, :]) & (np.arange(width)[:, None] >= np.arange(width)[None, :])
    drawn = pictures.mask(run.mask, documents)
    assert f'viewBox="0 0 {width} {width}"' in drawn
    found = np.zeros((width, width), int)
    for kind, corners in re.findall(r'<polygon class="(\w+)" points="([^"]*)"', drawn):
        points = np.array([tuple(map(float, corner.split(","))) for corner in corners.split()])
        found += _inside(points, width)
        assert (kind == "padding") == (points[:, 0].min() >= sum(lengths))
    assert found.tolist() == expected.astype(int).tolist()  # and nothing is drawn twice


def _inside(points: np.ndarray, width: int) -> np.ndarray:
    """Which cells of a square lie in a polygon, by how often a ray from within each crosses its edges."""
    y, x = np.mgrid[:width, :width]
    x, y = x + 0.5, y + 0.75
    crossed = np.zeros((width, width), bool)
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y1 != y2:
            crossed ^= ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return crossed


def test_what_a_folder_says_is_text_on_the_page(tmp_path: Path) -> None:
    folder = written(
        tmp_path / "evil",
        status="failed",
        error=EVIL,
        settings={"run_name": EVIL, "learning_rate": 1.0},
        plugins={EVIL: EVIL},
        parameters={"trained": 1, "total": 2, "layers": {EVIL: {EVIL: 1}}},
        without_effect=[[EVIL, EVIL]],
    )
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, f"toy/{EVIL}": 1.0}) + "\n")
    (folder / "samples-1.jsonl").write_text(json.dumps({"prompt": EVIL, "answer": EVIL, "reference": EVIL}) + "\n")
    (folder / "bad_records.jsonl").write_text(json.dumps({"split": EVIL, "file": EVIL, "reason": EVIL}) + "\n")
    both = page([sft.read_run(folder), sft.read_run(folder)])
    for found in (page([sft.read_run(folder)]), both):
        assert "alert(1)" in found
        assert "<script>alert" not in found
        assert "</style><img" not in found
        assert "<img" not in found
        assert "\x1b" not in found
        assert "\u202e" not in found


def test_a_run_that_has_failed_says_so_on_its_page(train: Train, tmp_path: Path) -> None:
    def fails(self: Any, record: dict[str, Any]) -> None:
        if record["step"]:
            raise sft.SftError("the cause")

    bad = toy("bad", sft_evaluated=fails)
    said: list[str] = []
    with pytest.raises(sft.SftError, match="the cause"):
        train("out", (bad,), say=said.append, max_steps=2, evaluation_strategy="steps", eval_steps=1)
    assert said[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    run = sft.read_run(tmp_path / "out")
    assert (run.status, run.error, run.step, run.total_steps) == ("failed", "the cause", 1, 2)
    found = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert '<p class="error">the cause</p>' in found
    assert "after step 1 of 2" in found


def test_notes_of_a_run_are_on_its_page(train: Train, tmp_path: Path) -> None:
    speaks = toy("speaks", sft_step_ended=lambda self, run: run.say("note: the sky is grey\nand low"))
    train("out", (speaks,), max_steps=2)
    run = sft.read_run(tmp_path / "out")
    assert run.notes == [r"the sky is grey\nand low"]
    assert "<br>the sky is grey" in page([run]) or "<td>the sky is grey" in page([run])


def test_a_report_that_cannot_be_written_does_not_cost_the_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sft.run_report.written.page", fails)
    said: list[str] = []
    assert train("out", say=said.append, max_steps=1).steps == 1
    assert said[-1].startswith(
        "note: the run's report could not be written ([Errno 28] No space left on device); sft re"
    )
    assert not list((tmp_path / "out").glob("report.*"))


def test_a_page_takes_no_other_files_place(tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    for name in ("mine.html", "page.json"):
        (tmp_path / name).write_text("mine")
    for name in ("mine.html", "page.html"):
        done = CliRunner().invoke(cli, ["report", str(folder), "--html", str(tmp_path / name)])
        assert isinstance(done.exception, sft.UsageError)
    assert (tmp_path / "mine.html").read_text() == (tmp_path / "page.json").read_text() == "mine"
    for _ in range(2):  # but its own
        assert CliRunner().invoke(cli, ["report", str(folder)]).exit_code == 0
    printed = CliRunner().invoke(cli, ["report", str(folder), "--json"]).stdout
    assert json.loads(printed) == json.loads((folder / "report.json").read_text(encoding="utf-8"))
    both = CliRunner().invoke(cli, ["report", str(folder), "--json", "--html", str(tmp_path / "both.html")])
    assert both.stdout == printed
    assert (tmp_path / "both.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_chart_library_is_uplot_as_it_was_published() -> None:
    """Its bytes are those of the npm package ``uplot`` of that version."""
    folder = Path(library.__file__).parent / "assets" / "uplot"
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert library.UPLOT == "1.6.32"
    assert found == {
        "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
        "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
    }


# --- several runs --------------------------------------------------------------------------------------------


def test_of_several_runs_the_settings_that_differ_are_told(tmp_path: Path) -> None:
    shared = {"seed": 1, "learning_rate": 1e-3, "run_name": None}
    one = written(tmp_path / "a", settings={**shared, "output_dir": "a"}, packages={"numpy": "1"})
    other = written(
        tmp_path / "b",
        settings={**shared, "output_dir": "b", "learning_rate": 2e-3, "rank": 4},
        packages={"numpy": "2"},
    )
    runs = [sft.read_run(folder) for folder in (one, other)]
    assert words.differences(runs) == {"learning_rate": [1e-3, 2e-3], "rank": [None, 4]}
    assert words.other_differences(runs) == {"version of numpy": ["1", "2"]}
    done = CliRunner().invoke(cli, ["report", str(one), str(other), "--html", str(tmp_path / "both.html")])
    assert (done.exit_code, done.stdout) == (0, "")
    assert json.loads((tmp_path / "both.json").read_text())["differ"]["rank"] == [None, 4]
    found = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert '<th scope="row">learning_rate</th><td>0.001</td><td>0.002</td>' in found


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    runs = [sft.read_run(written(folder)) for folder in (tmp_path / "out", tmp_path / "x" / "out")]
    assert [run.name for run in words.apart(runs)] == [str(tmp_path / "out"), str(tmp_path / "x" / "out")]
    assert [run.name for run in words.apart(runs[:1])] == ["out"]

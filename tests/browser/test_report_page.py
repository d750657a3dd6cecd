"""The page of a run, and of two, as people meet it: in a browser, on a phone and on a wide screen, in light and dark,
by mouse and by keyboard."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from browser.conftest import DEMO
from browser.driver import SCHEMES, SIZES, Browser
from click.testing import CliRunner

import sft
from sft.commands.cli import cli

pytestmark = pytest.mark.browser

CHARTS = ["loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_mib", "padding", "accuracy"]
READ = """
return Object.fromEntries([...document.querySelectorAll("figure[data-chart]")].map(figure =>
  [figure.dataset.chart, [...figure.querySelectorAll(".legend li")].map(one =>
    [one.querySelector("button").textContent, one.querySelector(".value").textContent])]));
"""
TICKS = "return document.querySelector('.where').textContent"


@pytest.fixture(scope="module")
def two(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of both runs."""
    place = tmp_path_factory.mktemp("two") / "report.html"
    done = CliRunner().invoke(cli, ["report", *map(str, runs), "--html", str(place)])
    assert done.exit_code == 0, done.output
    return place


def curve(run: sft.RunReport, chart: str, name: str) -> sft.Curve:
    found = run.curve(chart, name)
    assert found is not None
    return found


@pytest.mark.parametrize(("size", "scheme", "which"), [*itertools.product(SIZES, SCHEMES, ("one", "two"))])
def test_it_opens_and_everyone_can_use_it(
    browser: Browser, runs: list[Path], two: Path, size: str, scheme: str, which: str
) -> None:
    browser.open(runs[0] / "report.html" if which == "one" else two, size, scheme)
    assert browser.complaints() == []
    drawn = browser.colours()
    assert list(drawn) == CHARTS
    assert all(colours > 20 for colours in drawn.values()), drawn
    assert browser.fits()
    assert browser.is_dark() == (scheme == "dark")
    assert browser.axe() == []


def test_hovering_reads_all_charts_at_that_step(browser: Browser, runs: list[Path]) -> None:
    """The values in the legends are those of the step that the mouse is over."""
    browser.open(runs[0] / "report.html")
    run = sft.read_run(runs[0])
    last = browser.evaluate(READ)
    assert last["loss"][0] == ["train", f"{curve(run, 'loss', 'train').values[-1]:#.4g}"]
    browser.point("figure[data-chart=loss] .u-over", 0.5)
    step = int(browser.evaluate(TICKS).removeprefix("step "))
    assert 4 <= step <= 8
    found = browser.evaluate(READ)
    for chart, form in (("loss", "{:#.4g}"), ("grad_norm", "{:#.4g}"), ("memory_mib", "{:,.0f}")):
        values = dict(zip(curve(run, chart, "train").steps, curve(run, chart, "train").values, strict=True))
        assert found[chart][0] == ["train", form.format(values[step])]
    browser.press("Escape")
    browser.point("h1", 0.1)
    assert browser.evaluate(TICKS) == ""


def test_a_zoom_is_that_of_all_charts(browser: Browser, runs: list[Path]) -> None:
    """After a drag over the left half of one chart, the right edge of another one is in the middle of the run."""
    browser.open(runs[0] / "report.html")
    far = "figure[data-chart=padding] .u-over"
    browser.point(far, 0.99)
    assert browser.evaluate(TICKS) == "step 12"
    browser.point("figure[data-chart=loss] .u-over", 0.02, drag_to=0.5)
    browser.point(far, 0.99)
    assert int(browser.evaluate(TICKS).removeprefix("step ")) in (5, 6)
    browser.evaluate(
        "[...document.querySelectorAll('.tools button')].find(one => one.textContent === 'Whole run').click()"
    )
    browser.point("h1", 0.1)
    browser.point(far, 0.99)
    assert browser.evaluate(TICKS) == "step 12"


def test_the_keyboard_reaches_everything(browser: Browser, runs: list[Path]) -> None:
    browser.open(runs[0] / "report.html")
    wanted, reached = browser.walk()
    assert reached == wanted > 20


def test_a_chart_is_read_and_zoomed_by_keys(browser: Browser, runs: list[Path]) -> None:
    browser.open(runs[0] / "report.html")
    browser.evaluate("document.querySelector('figure[data-chart=grad_norm] .plot').focus()")
    browser.press("ArrowRight", "ArrowRight", "ArrowRight")
    assert browser.evaluate(TICKS) == "step 3"
    run = sft.read_run(runs[0])
    assert browser.evaluate(READ)["learning_rate"][0][1] == _exponent(curve(run, "learning_rate", "train").values[2])
    browser.press("ArrowLeft")
    assert browser.evaluate(TICKS) == "step 2"
    browser.press("+")
    browser.press(*["ArrowRight"] * 20)
    zoomed = int(browser.evaluate(TICKS).removeprefix("step "))
    assert zoomed < 8
    browser.press("ArrowRight", shift=True)
    browser.press(*["ArrowRight"] * 20)
    assert int(browser.evaluate(TICKS).removeprefix("step ")) > zoomed
    browser.press("Home")
    browser.press(*["ArrowRight"] * 20)
    assert browser.evaluate(TICKS) == "step 12"


def _exponent(value: float) -> str:
    """As JavaScript writes it: 3.00e-3."""
    return re.sub(r"e([+-])0", r"e\1", f"{value:.2e}") if value else "0"


def test_a_curve_has_the_same_colour_in_each_chart(browser: Browser, runs: list[Path], tmp_path: Path) -> None:
    """Also where a chart lacks the curves that stand before it in others."""
    folder = Path(shutil.copytree(runs[0], tmp_path / "seldom"))
    metrics = folder / "metrics.jsonl"
    logged = [
        line for line in metrics.read_text().splitlines() if "eval_loss" in line or json.loads(line)["step"] % 4 == 0
    ]
    metrics.write_text("\n".join(logged) + "\n")
    assert CliRunner().invoke(cli, ["report", str(folder)]).exit_code == 0
    browser.open(folder / "report.html")
    found: dict[str, set[str]] = {}
    for name, colour in browser.evaluate(
        "return [...document.querySelectorAll('.legend button')].map(one =>"
        "[one.textContent, one.querySelector('line').getAttribute('stroke')])"
    ):
        found.setdefault(name, set()).add(colour)
    assert set(found) == {"train", "dev", "each step"}
    assert [len(colours) for colours in found.values()] == [1, 1, 1]
    assert len(set.union(*found.values())) == 3


def test_a_name_in_a_legend_hides_its_curve(browser: Browser, runs: list[Path]) -> None:
    browser.open(runs[0] / "report.html")
    before = browser.colours()["loss"]
    browser.evaluate("document.querySelector('figure[data-chart=loss] .legend button').focus()")
    browser.press("Enter")
    browser.evaluate("return new Promise(done => requestAnimationFrame(done))")
    assert browser.evaluate("return document.activeElement.getAttribute('aria-pressed')") == "false"
    assert browser.colours()["loss"] < before


@pytest.mark.parametrize("axis", ["steps", "epochs", "tokens", "seconds"])
def test_the_axis_may_be_steps_epochs_tokens_or_time(browser: Browser, two: Path, axis: str) -> None:
    browser.open(two)
    sets = (
        "const [selector, value, event] = arguments, one = document.querySelector(`.tools ${selector}`);"
        "one.value = value; one.dispatchEvent(new Event(event))"
    )
    browser.evaluate(sets, "select", axis, "change")
    browser.evaluate(sets, "input[type=range]", 0.6, "input")
    browser.evaluate("document.querySelector('.tools input[type=checkbox]').click()")
    browser.point("figure[data-chart=loss] .u-over", 0.99)
    assert browser.evaluate(TICKS).startswith(
        {"steps": "step 12", "seconds": "time 0:"}.get(axis, axis.removesuffix("s"))
    )
    assert all(colours > 20 for colours in browser.colours().values())
    assert browser.complaints() == []


def test_a_curve_that_stands_still_is_drawn(browser: Browser, runs: list[Path], tmp_path: Path) -> None:
    """Also when it is smoothed, which moves it by rounding."""
    folder = Path(shutil.copytree(runs[0], tmp_path / "still"))
    metrics = folder / "metrics.jsonl"
    still = re.sub(r'(?<="peak_memory_mib": )[\d.]+', "396", metrics.read_text(encoding="utf-8"))
    metrics.write_text(still, encoding="utf-8")
    done = CliRunner().invoke(cli, ["report", str(folder)])
    assert done.exit_code == 0, done.output
    browser.open(folder / "report.html")
    browser.evaluate(
        "const one = document.querySelector('.tools input[type=range]');"
        "one.value = 0.6; one.dispatchEvent(new Event('input'))"
    )
    assert browser.colours()["memory_mib"] > 20


def test_two_runs_lie_over_each_other(browser: Browser, two: Path, runs: list[Path]) -> None:
    browser.open(two)
    found = browser.evaluate(READ)
    assert [name for name, _ in found["loss"]] == ["steady: train", "steady: dev", "faster: train", "faster: dev"]
    assert [name for name, _ in found["padding"]] == ["steady", "faster"]
    strokes = browser.evaluate(
        "return [...document.querySelectorAll('figure[data-chart=loss] .legend line')]"
        ".map(one => [one.getAttribute('stroke'), one.getAttribute('stroke-dasharray')])"
    )
    assert len({colour for colour, _ in strokes}) == len({dash for _, dash in strokes}) == 2
    text = browser.evaluate("return document.getElementById('what-differs').parentNode.innerText")
    assert "learning_rate" in text
    assert "lora_rank" in text
    assert "weight_decay" not in text


def test_it_prints(browser: Browser, runs: list[Path]) -> None:
    """What is folded is there on paper, and folded again afterwards; charts are drawn for paper."""
    browser.open(runs[0] / "report.html", scheme="dark")
    browser.evaluate(
        "window.met = []; addEventListener('beforeprint', () => met.push("
        "document.querySelectorAll('details:not([open])').length, document.querySelector('.uplot').offsetWidth))"
    )
    assert browser.pdf().startswith(b"%PDF")
    assert browser.evaluate("return met") == [0, 330]
    assert browser.evaluate("return document.querySelectorAll('details:not([open])').length") > 0
    assert browser.evaluate("return document.querySelector('.uplot').offsetWidth") != 330
    assert browser.complaints() == []


def test_what_a_run_holds_is_no_script(browser: Browser, tmp_path: Path) -> None:
    evil = "</script><script>window.met = true</script><img src=x onerror='window.met = true'>"
    record: dict[str, Any] = {"settings": {"run_name": evil}, "status": "failed", "error": evil}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": 1.0 + n, f"toy/{evil}": 1.0}) + "\n" for n in range(3))
    )
    (tmp_path / "samples-0.jsonl").write_text(json.dumps({"prompt": evil, "answer": evil, "reference": evil}) + "\n")
    assert CliRunner().invoke(cli, ["report", str(tmp_path)]).exit_code == 0
    browser.open(tmp_path / "report.html")
    assert browser.evaluate("return window.met === undefined")
    assert browser.complaints() == []
    assert browser.evaluate("return document.querySelector('h1').textContent") == evil


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_of_the_data_opens_too(browser: Browser, tmp_path: Path, scheme: str) -> None:
    settings = ["--model_name_or_path", str(DEMO / "model"), "--dataset_name_or_path", str(DEMO / "data")]
    place = tmp_path / "data.html"
    assert CliRunner().invoke(cli, ["data", *settings, "--max_length", "64", "--html", str(place)]).exit_code == 0
    browser.open(place, "phone", scheme)
    assert browser.complaints() == []
    assert browser.axe() == []
    browser.evaluate("document.getElementById('search').focus()")
    browser.press(*"blue")
    assert re.fullmatch(r"\d+ of 100", browser.evaluate("return document.getElementById('said').textContent"))

"""The page of the board, as people meet it: runs that train, that are stopped by its button, that have died; on a phone
and on a wide screen, in light and dark, by keyboard."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser.boards import TOKEN, board_of, until
from browser.conftest import DEMO
from browser.driver import SCHEMES, SIZES, Browser

import sft

pytestmark = pytest.mark.browser

SLOW = """
import time
import sft

class Slow(sft.Plugin):
    name = "slow"
    api_version = 1

    @sft.hookimpl
    def sft_step_ended(self, run, record):
        time.sleep(0.1)
"""
SETTINGS = {
    "model_name_or_path": DEMO / "model",
    "dataset_name_or_path": DEMO / "data",
    **{"max_steps": 3000, "logging_steps": 1, "max_length": 64, "per_device_train_batch_size": 1},
    **{"learning_rate": 1e-4, "save_strategy": "no", "do_eval": "false", "disable_tqdm": "true"},
}


@pytest.fixture
def training(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that trains in ``tmp_path/runs/out``, ten steps a second at most."""
    (tmp_path / "slow.py").write_text(SLOW)
    given = [text for name, value in SETTINGS.items() for text in (f"--{name}", str(value))]
    line = [sys.executable, "-m", "sft", "run", "--plugin", str(tmp_path / "slow.py"), *given]
    (tmp_path / "runs").mkdir()
    process = subprocess.Popen([*line, "--output_dir", str(tmp_path / "runs" / "out")], stdout=subprocess.DEVNULL)
    yield process
    process.kill()
    process.wait()


def text_of(browser: Browser, name: str) -> str:
    return str(browser.evaluate("return document.getElementById(arguments[0]).textContent", name))


def step_of(browser: Browser) -> int:
    found = re.match(r"step ([\d,]+)", text_of(browser, "steps"))
    return int(found[1].replace(",", "")) if found else 0


@pytest.mark.parametrize(("size", "scheme"), [*itertools.product(SIZES, SCHEMES)])
def test_it_opens_and_everyone_can_use_it(browser: Browser, runs: list[Path], size: str, scheme: str) -> None:
    with board_of(runs[0].parent) as address:
        browser.open(address, size, scheme)
        until(lambda: text_of(browser, "state") == "finished")
        until(lambda: browser.evaluate("return document.querySelectorAll('figure[data-chart] canvas').length"))
        drawn = browser.colours()
        assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_mib"} <= set(drawn)
        assert all(colours > 20 for colours in drawn.values()), drawn
        assert browser.evaluate("return document.querySelectorAll('#runs a').length") == 2
        assert "the run has finished" in text_of(browser, "log")
        assert "After training" in text_of(browser, "answers")
        assert "learning_rate" in text_of(browser, "settings")
        assert TOKEN not in browser.driver.current_url
        assert browser.fits()
        assert browser.is_dark() == (scheme == "dark")
        assert browser.axe() == []
        assert browser.complaints() == []


def test_the_keyboard_reaches_everything(browser: Browser, runs: list[Path]) -> None:
    with board_of(runs[0].parent) as address:
        browser.open(address)
        until(lambda: text_of(browser, "state") == "finished")
        wanted, reached = browser.walk()
        assert reached == wanted > 0
        name = text_of(browser, "name")
        browser.evaluate("document.querySelector('#runs a:not([aria-current])').focus()")
        browser.press("Enter")
        other = until(lambda: text_of(browser, "name") != name and text_of(browser, "name"))
        assert browser.evaluate("return document.querySelector('#runs a[aria-current]').textContent").startswith(other)


def test_a_run_that_trains_is_followed_and_its_button_stops_it(
    browser: Browser, training: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    with board_of(tmp_path / "runs") as address:
        browser.open(address)
        assert "No run is in this folder yet" in text_of(browser, "no-runs")
        until(lambda: text_of(browser, "state") == "running")
        first = until(lambda: step_of(browser))
        until(lambda: step_of(browser) > first + 5)
        assert re.search(r"Time left\d+:\d\d:\d\d", text_of(browser, "facts"))
        assert re.search(r"Memory of the run now[\d.]+ GiB", text_of(browser, "facts"))
        assert re.search(r"Loss\d+\.\d{4}", text_of(browser, "facts"))
        until(lambda: f"step {step_of(browser)}/3000" in text_of(browser, "log"))
        assert browser.colours()["loss"] > 20
        assert browser.axe() == []
        # By keyboard: the button, a question that is answered with no by default, and its other answer.
        browser.evaluate("document.querySelector('[data-what=stop]').focus()")
        browser.press("Enter")
        assert browser.evaluate("return document.getElementById('sure').open")
        assert browser.axe() == []
        assert browser.evaluate("return document.activeElement.id") == "sure-no"
        browser.press("Enter")
        assert not browser.evaluate("return document.getElementById('sure').open")
        assert not (tmp_path / "runs" / "out" / "STOP").exists()
        browser.press("Enter")
        browser.press("Tab", shift=True)
        browser.press("Enter")
        until(lambda: text_of(browser, "state") == "finished")
        assert re.search(r"ended early, after step \d+: the file .*STOP asks for it", text_of(browser, "why"))
        assert training.wait(60) == 0
        assert sft.read_run(tmp_path / "runs" / "out").result["stopped_early"]["step"] > 5
        assert browser.complaints() == []


def test_a_run_that_is_killed_is_shown_to_have_died_and_so_is_the_board(
    browser: Browser, training: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    with board_of(tmp_path / "runs") as address:
        browser.open(address, "phone")
        until(lambda: step_of(browser) > 2)
        os.kill(training.pid, signal.SIGKILL)
        until(lambda: text_of(browser, "state") == "died")
        assert "--resume_from_checkpoint auto goes on" in text_of(browser, "why")
        assert browser.evaluate("return document.getElementById('orders').hidden")
        assert "step 2/3000" in text_of(browser, "log")
        assert browser.axe() == []
        assert browser.complaints() == []
    until(lambda: browser.evaluate("return !document.getElementById('trouble').hidden"))
    assert text_of(browser, "trouble").startswith("The board does not answer. What you see is of ")
    assert text_of(browser, "state") == "died"


def test_a_run_that_cannot_be_read_shows_nothing_of_another(browser: Browser, runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{")
    with board_of(tmp_path) as address:
        browser.open(address)
        browser.evaluate("location.hash = '#run=good'")
        until(lambda: text_of(browser, "state") == "finished")
        assert "Dev loss" in browser.evaluate("return document.body.innerText")
        browser.evaluate("location.hash = '#run=bad'")
        until(lambda: text_of(browser, "state") == "cannot be read")
        shown = browser.evaluate("return document.querySelector('main').innerText")
        assert "run.json is missing or cannot be read" in shown
        assert not re.search("Dev loss|After training|step 12", shown)
        browser.evaluate("location.hash = '#run=good'")
        until(lambda: "Dev loss" in browser.evaluate("return document.querySelector('main').innerText"))


def test_answers_that_are_too_many_are_counted(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "finished", "settings": {}}')
    lines = [f'{{"prompt": "number {n}", "answer": "", "reference": ""}}\n' for n in range(62)]
    (tmp_path / "samples-0.jsonl").write_text("".join(lines))
    with board_of(tmp_path) as address:
        browser.open(address)
        until(lambda: "number 49" in text_of(browser, "answers"))
        assert "number 50" not in text_of(browser, "answers")
        assert "and 12 more, which sft report shows" in browser.evaluate("return document.body.innerText")


def test_without_the_token_it_shows_nothing(browser: Browser, runs: list[Path]) -> None:
    with board_of(runs[0].parent) as address:
        browser.open("about:blank")
        browser.open(address.partition("#")[0])
        said = until(lambda: text_of(browser, "trouble"))
        assert said == "The token is missing or old; open the address that sft board has printed."
        assert browser.evaluate("return document.querySelectorAll('#runs a').length") == 0


def test_what_a_run_says_is_no_script(browser: Browser, tmp_path: Path) -> None:
    evil = "</pre><script>window.met = true</script><img src=x onerror='window.met = true'>"
    (tmp_path / evil.replace("/", "")).mkdir()
    folder = tmp_path / evil.replace("/", "")
    (folder / "run.json").write_text(
        '{"status": "failed", "settings": {"run_name": EVIL}, "error": EVIL, "changed": {"run_name": null}}'.replace(
            "EVIL", f'"{evil}"'
        )
    )
    (folder / "sft.log").write_text(evil)
    with board_of(tmp_path) as address:
        browser.open(address)
        until(lambda: text_of(browser, "state") == "failed")
        assert (text_of(browser, "why"), text_of(browser, "log")) == (evil, evil)
        assert text_of(browser, "name") == folder.name
        assert browser.evaluate("return window.met === undefined")
        assert browser.complaints() == []

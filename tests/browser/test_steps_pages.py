"""The pages of single steps and records: what `sft replay`, `sft blame` and `sft why` write, as people meet them."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser.conftest import DEMO
from browser.driver import SCHEMES, SIZES, Browser
from click.testing import CliRunner

import sft
from sft.commands.cli import cli

pytestmark = pytest.mark.browser

EVIL = "</span><script>window.met = true</script><img src=x onerror='window.met = true'>"
ASKED = {
    "replay": ["--step", "3", "--step", "17"],
    "blame": ["--most", "2"],
    "why": ["--prompt", EVIL, "--answer", "A red dress.", "--top", "3"],
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages, by command, of a run that meets a strange record in its 17th step."""
    folder = tmp_path_factory.mktemp("steps")
    lines = (DEMO / "data" / "train.json").read_text(encoding="utf-8").splitlines()[:120]
    (folder / "train.json").write_text("\n".join(lines), encoding="utf-8")
    settings: dict[str, Any] = {
        "plugin": ["lora"],
        "model_name_or_path": str(DEMO / "model"),
        "dataset_name_or_path": str(folder / "train.json"),
        **{"max_steps": 30, "max_length": 128, "per_device_train_batch_size": 2, "learning_rate": 3e-3},
        **{"save_strategy": "steps", "save_steps": 15, "do_eval": False, "disable_tqdm": True},
    }

    def trained(name: str) -> None:
        sft.run({**settings, "output_dir": str(folder / name)}, say=lambda text: None)

    trained("first")
    asked = CliRunner().invoke(cli, ["replay", str(folder / "first"), "--step", "17", "--json"])
    record = json.loads(asked.output.splitlines()[-1])["steps"][0]["records"][0]
    number = int(record["place"].rpartition(" ")[2]) - 1
    strange = {**json.loads(lines[number]), "src": EVIL[:41], "tgt": "Ж҂ ѭ ☃ zq xv 9#7 %%" * 3}
    (folder / "train.json").write_text("\n".join([*lines[:number], json.dumps(strange), *lines[number + 1 :]]))
    trained("out")
    found = {}
    for name, given in ASKED.items():
        found[name] = folder / f"{name}.html"
        done = CliRunner().invoke(cli, [name, str(folder / "out"), *given, "--html", str(found[name])])
        assert done.exit_code == 0, done.output
    return found


@pytest.mark.parametrize(("name", "size", "scheme"), [*itertools.product(ASKED, SIZES, SCHEMES)])
def test_it_opens_and_everyone_can_use_it(
    browser: Browser, pages: dict[str, Path], name: str, size: str, scheme: str
) -> None:
    browser.open(pages[name], size, scheme)
    assert browser.complaints() == []
    assert browser.fits()
    assert browser.is_dark() == (scheme == "dark")
    assert browser.axe() == []


def test_a_step_that_is_computed_again_shows_its_tokens_by_their_loss(browser: Browser, pages: dict[str, Path]) -> None:
    """Each learned token says its loss, and is the stronger coloured the more that is."""
    browser.open(pages["replay"])
    assert browser.evaluate("return document.body.innerText").count("as recorded, to the last bit") == 4
    told = browser.evaluate(
        "return [...document.querySelectorAll('.learned[title]')].map(one => [Number(one.title.split(', ')[0]),"
        "Number(getComputedStyle(one).backgroundColor.match(/([\\d.]+)\\)$/)[1])])"
    )
    assert len(told) > 50
    strengths = [strength for _, strength in sorted(told)]
    assert strengths == sorted(strengths)
    assert strengths[0] < strengths[-1]


def test_the_strange_record_is_blamed(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["blame"])
    assert "☃" in browser.evaluate("return document.querySelector('article').innerText")
    assert re.search("(9[5-9]|100)% of the spike", browser.evaluate("return document.querySelector('h3').innerText"))


@pytest.mark.parametrize("name", ASKED)
def test_what_a_record_or_a_prompt_holds_is_no_script(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    assert browser.evaluate("return window.met === undefined")
    assert browser.complaints() == []
    assert "</span><script>" in browser.evaluate("return document.body.innerText")

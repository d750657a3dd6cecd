"""``sft demo``: on the core alone all parameters train; an installed plugin that claims the demo is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest

import sft
from sft.commands import demo
from sft.plugins.requests import requests
from sft.testing import needs

SHOWN = """
    from dataclasses import dataclass
    import sft

    @dataclass
    class Options:
        depth: int = sft.option(1, "how deep")

    class Shown(sft.Plugin):
        name = "shown"
        api_version = 1
        Options = Options
        demo = {"depth": 3, "learning_rate": 0.5}
"""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no plugin that has a demo is installed."""
    monkeypatch.setattr(demo, "requests", lambda kind: {})


@pytest.fixture
def short(paddle: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """``short(*words)``: what ``sft demo`` prints, of two steps, run in a folder of its own."""
    folder = tmp_path / "package"
    folder.mkdir()
    for name in ("model", "data"):
        (folder / name).symlink_to(demo.FOLDER / name)
    settings = json.loads((demo.FOLDER / "settings.json").read_text())
    settings.update(max_steps=2, per_device_train_batch_size=2, num_samples=1, max_new_tokens=2, do_eval=False)
    (folder / "settings.json").write_text(json.dumps(settings))
    monkeypatch.setattr(demo, "FOLDER", folder)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        return str(click.testing.CliRunner().invoke(demo.command, words, catch_exceptions=False).output)

    return run


def test_on_the_core_alone_all_parameters_train(alone: None, short: Callable[..., str], tmp_path: Path) -> None:
    text = short()
    assert text.startswith("$ sft run --max_length 128 ")
    assert "trained     2,755,008 of 2,755,008 parameters" in text
    assert "next: sft generate --model_name_or_path sft-demo --prompt" in text
    assert (tmp_path / "sft-demo" / "model.safetensors").is_file()


@needs("lora")
def test_an_adapter_is_shown_where_one_is_installed(short: Callable[..., str], tmp_path: Path) -> None:
    text = short()
    assert text.startswith("$ sft run --plugin lora --max_length 128 ")
    assert f"--model_name_or_path {demo.FOLDER / 'model'} --adapter_path sft-demo --prompt" in text
    assert (tmp_path / "sft-demo" / "adapter_model.safetensors").is_file()


def test_a_plugin_brings_its_settings(distribute: Callable[..., None]) -> None:
    distribute("toy-shown", SHOWN, {"shown": "Shown"}, {"command.demo": "Shown"})
    plain = demo.demo_settings("out", [f"no:{name}" for name in requests("command")["demo"]])
    assert plain["plugin"] == []
    shown = demo.demo_settings("out", ["shown"])
    assert {key: shown[key] for key in shown if shown[key] != plain.get(key)} == {
        "plugin": ["shown"], "depth": 3, "learning_rate": 0.5,
    }  # fmt: skip
    refining = SHOWN.replace('name = "shown"', 'name, requires = "refining", ("shown",)')
    distribute("toy-refining", refining, {"refining": "Shown"}, {"command.demo": "Shown"})
    assert demo.demo_settings("out", ["refining"])["plugin"] == ["shown", "refining"]
    with pytest.raises(sft.UsageError, match=r"^Plugin other has no demo; those that have one are .*shown"):
        demo.demo_settings("out", ["other"])

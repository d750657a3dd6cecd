"""Help in Chinese: each text has a translation, none is left over, and a terminal shows it well."""

from __future__ import annotations

import copy
import importlib
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import click
import pytest
from click.testing import CliRunner
from making.chinese import WORDS
from making.project import ROOT, own_plugins
from making.reference import paddlenlp_page
from rich.cells import cell_len

from sft.certify.certify import CHECKS
from sft.commands import run
from sft.commands.cli import COMMANDS, cli
from sft.commands.words import in_readers_language, texts
from sft.errors import UsageError
from sft.language import VARIABLES, language, package_of, table
from sft.options import options_of
from sft.plugins.requests import requests
from sft.settings.arguments import GROUPS

LABELS = ("Plugin", "Settings", "unset", "from plugin", run.HEAD, run.TAIL)


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_LANG", "zh")


def said() -> dict[str, list[str]]:
    """All texts of help, by the package whose table has them."""
    found: dict[str, list[str]] = defaultdict(list)
    found["sft"] += [*LABELS, *COMMANDS.values(), *(f"{group.capitalize()} arguments" for group in GROUPS)]
    for cls in GROUPS.values():
        found["sft"] += [(cls.__doc__ or "").strip(), *(option.help for option in options_of(cls).values())]
    for plugin in own_plugins().values():
        found[package_of(plugin)].append(plugin.summary)
        if plugin.Options is not None:
            found[package_of(plugin)] += [option.help for option in options_of(plugin.Options).values()]
    for package, command in commands():
        found[package] += texts(command)
    return found


def commands() -> Iterator[tuple[str, click.Command]]:
    alone = copy.copy(cli)
    alone.commands = {}  # it keeps those of plugins that somebody has asked for
    yield "sft", alone
    for name in COMMANDS:
        yield "sft", importlib.import_module(f"sft.commands.{name}").command
    with cli.make_context("sft", ["--help"], resilient_parsing=True) as context:
        for name in set(requests("command")) - set(COMMANDS):
            command = cli.get_command(context, name)
            assert command is not None
            yield package_of(command.callback), command


def spellings(text: str) -> list[str]:
    """As a table may have it: an option that is a setting says it as a sentence."""
    return [text, text.rstrip("."), text[:1].lower() + text[1:].rstrip(".")]


def test_each_text_of_help_is_translated_and_no_translation_is_left_over() -> None:
    for package, list_of_texts in said().items():
        words = table(package, "zh")
        needed = {text: spellings(text) for text in list_of_texts if text}
        missing = [
            text for text, ways in needed.items() if not any(way in words or way in table("sft", "zh") for way in ways)
        ]
        assert missing == [], f"zh_CN.json of {package} lacks these"
        known = {way for ways in needed.values() for way in ways}
        assert [text for text in words if text not in known] == [], f"zh_CN.json of {package} says what nobody asks for"


def test_each_word_of_the_generated_pages_is_translated() -> None:
    for check in CHECKS:
        assert check.sentence in WORDS, "docs/zh/words.json lacks it"
    asked: list[str] = []
    paddlenlp_page(lambda text, package="sft": asked.append(text) or text)
    assert [text for text in asked if text not in WORDS] == [], "docs/zh/words.json lacks these"


def test_a_key_stands_once_in_a_table() -> None:
    for path in [*ROOT.glob("*/src/*/zh_CN.json"), *ROOT.glob("plugins/*/src/*/zh_CN.json")]:
        pairs: list[tuple[str, Any]] = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
        assert len(pairs) == len(dict(pairs)), path


def test_the_language_is_that_of_the_locale_unless_another_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SFT_LANG", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    assert language() == "en"
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert language() == "zh"
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert language() == "en"
    monkeypatch.setenv("SFT_LANG", "zh-CN")
    assert language() == "zh"
    monkeypatch.setenv("SFT_LANG", "fr")
    with pytest.raises(UsageError, match="SFT_LANG: help is there in en and zh, got 'fr'"):
        language()


def test_help_is_chinese_and_fits_a_terminal(chinese: None) -> None:
    shown = {}
    for name in (None, *COMMANDS, *sorted(set(requests("command")) - set(COMMANDS))):
        arguments = ["--help"] if name is None else [name, "--help"]
        result = CliRunner().invoke(in_readers_language(cli), arguments, terminal_width=80)
        assert result.exit_code == 0, result.output
        shown[name] = result.output
    assert "微调一个模型。" in shown[None]
    assert "epochs" not in shown["run"].replace("num_train_epochs", "")
    assert "--learning_rate X  [5e-05]\n      学习率的峰值" in shown["run"]
    for name, text in shown.items():
        assert "用法：" in text, name
        if name != "run":  # its lines are as long as they are, in English too
            assert [line for line in text.splitlines() if cell_len(line) > 80] == [], name
            assert "选项：" in text, name
            for words in ("Usage:", "Options:", "Commands:", "Show this message", "default:", "required]"):
                assert words not in text, f"{name} has English of click's: {words}"
    assert "[默认：8；边生成边显示时为1]" in "".join(shown["generate"].split())


def test_help_of_a_plugin_is_in_its_own_table(chinese: None) -> None:
    text = run.help_text({"plugin": ["lora"]})
    assert "更新的秩 r" in text
    assert table("sft", "zh").get("rank r of the update") is None


def test_english_help_is_the_command_itself() -> None:
    assert in_readers_language(cli) is cli

"""Settings files that sft writes: `sft run --print_settings` and `sft init`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from terminals import Terminal

import sft
from sft.commands.cli import cli
from sft.commands.init import file_text
from sft.commands.settings_file import entry, resolved
from sft.commands.typed import collect
from sft.resolve import resolve
from sft.settings.files import read_file
from sft.settings.reading import normalise

Distribute = Callable[..., None]

TOOL = """
    from dataclasses import dataclass
    import sft

    @dataclass
    class Options:
        size: int = sft.option(1, "a size")
        words: list[str] = sft.option([], "some words")
        tool_token: str | None = sft.option(None, "a secret")

    class {title}(sft.Plugin):
        name = "{name}"
        api_version = 1
        summary = "Adapts nothing."
        Options = Options
"""


def invoked(*words: str, lines: str | None = None) -> Result:
    return CliRunner().invoke(cli, words, input=lines, standalone_mode=False)


def alike(values: dict[str, Any], again: dict[str, Any]) -> None:
    """Two files mean the same run: the same settings, of which the same are given, and the same plugins."""
    (one, plugins, idle), (two, others, also) = resolve(values, ()), resolve(again, ())
    assert one == two
    assert one.given == two.given
    assert plugins.names == others.names
    assert sorted(idle) == sorted(also)


CASES: dict[str, list[str]] = {
    "nothing": [],
    "typed values": ["--learning_rate", "3e-4", "--max-steps", "5", "--bf16", "--fp16_opt_level", "O1"],
    "text that looks like another value": [
        *("--model_name_or_path", "123", "--output_dir", "null: #yes", "--run_name", "1e-5", "--report_to", "none"),
        *("--dataset_name_or_path", "数据/训练.jsonl", "--chat_template", "none", "--device", "no"),
    ],
    "unset": ["--eval_steps", "none", "--dev_split=", "--metric_for_best_model", "none"],
    "another name of a setting": ["--preprocessing_num_workers", "2"],
    "lists": ["--new_tokens", "<a>,<b>", "--dataset_name_or_path", "a.json:0.7,b.json:0.3"],
    "PaddleNLP's": ["--unified_checkpoint", "true", "--pad_to_multiple_of", "8"],
    "plugins": ["--plugin", "one,two", "--one.size", "3", "--two.words", "a,b"],
    "a plugin by its switch": ["--one", "--size", "4"],
    "left out": ["--plugin", "one", "--plugin", "no:two", "--size", "4"],
}


@pytest.fixture
def tools(distribute: Distribute) -> None:
    distribute("toy-one", TOOL.format(name="one", title="One"), {"one": "One"})
    distribute("toy-two", TOOL.format(name="two", title="Two"), {"two": "Two"})


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_what_is_printed_is_the_same_run(words: list[str], tmp_path: Path) -> None:
    done = invoked("run", *words, "--print_settings")
    assert done.exception is None, done.exception
    path = tmp_path / "settings.yaml"
    path.write_text(done.stdout, encoding="utf-8")
    again = normalise(read_file(path)) if yaml.safe_load(done.stdout) else {}
    alike(collect(words), again)
    assert resolved(again) == done.stdout


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("words", [["--one"], ["--one", "true"], ["--one=True"]])
def test_a_typed_switch_is_true_and_not_a_word(words: list[str]) -> None:
    printed = yaml.safe_load(invoked("run", *words, "--benchmark", "false", "--print_settings").stdout)
    assert printed == {"one": True, "benchmark": False}


@pytest.mark.usefixtures("tools")
def test_every_setting_stands_there_once(tmp_path: Path) -> None:
    """Those that are not given are commented out, with what they are."""
    text = resolved(collect(["--plugin", "one", "--size", "3", "--seed", "7"]))
    settings, active, _ = resolve(collect(["--plugin", "one", "--size", "3", "--seed", "7"]), ())
    lines = text.splitlines()
    for name, value in settings.flat().items():
        if name == "plugin":
            continue
        written = entry(name, value)
        found = [line for line in lines if line.removeprefix("# ").partition(":")[0] == name]
        assert found == [written if name in settings.given else f"# {written}"], name
    assert "plugin: [one]" in lines
    assert f"# Active plugin: one ({active.origin('one')})" in lines
    assert lines[2] == "# Still to be set: model_name_or_path, dataset_name_or_path, output_dir"


@pytest.mark.usefixtures("tools")
def test_secrets_are_not_printed() -> None:
    text = resolved(collect(["--plugin", "one", "--tool_token", "hunter2"]))
    assert "hunter2" not in text
    assert "# tool_token: *** (it looks like a secret" in text


def test_what_a_run_refuses_is_not_printed() -> None:
    done = invoked("run", "--learning_rate", "fast", "--print_settings")
    assert isinstance(done.exception, sft.UsageError)
    assert done.stdout == ""


# --- sft init -----------------------------------------------------------------------------------------------

ANSWERS = ["model", "data", "one", "512", "", "1", "1e-4", ""]


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Two adapters, in a folder of its own."""
    from sft.kit.about import About
    from sft.options import Option

    rows = [
        About("one", "toy 1.0", kinds=("adapter",), summary="Adapts.", options=(Option("size", int, 3, "a size"),)),
        About("two", "toy 1.0", kinds=("refines one", "adapter"), summary="Adapts, too."),
        About("broken", "toy 1.0", kinds=("adapter",), fault="It is broken."),
        About("other", "toy 1.0", kinds=("events",)),
    ]
    monkeypatch.setattr("sft.commands.init.all_plugins", lambda shapes: rows)
    monkeypatch.chdir(tmp_path)
    return ["one", "two"]


def lines_of(*answers: str) -> str:
    return "".join(f"{answer}\n" for answer in answers)


@pytest.mark.usefixtures("adapters")
def test_init_writes_what_was_answered(tmp_path: Path) -> None:
    """An empty answer takes what is proposed. All lines that are commented out are settings too."""
    done = invoked("init", lines=lines_of(*ANSWERS))
    assert done.exception is None, done.exception
    values = read_file(tmp_path / "sft.yaml")
    assert values == {
        **{"plugin": ["one"], "model_name_or_path": "model", "dataset_name_or_path": "data", "max_length": 512},
        **{"per_device_train_batch_size": 8, "num_train_epochs": 1.0, "learning_rate": 1e-4, "output_dir": "out"},
        **{"logging_steps": 10, "save_strategy": "epoch", "save_total_limit": 2},
    }
    assert "note: model is not there yet" in done.stderr
    assert "written to sft.yaml\n" in done.stdout
    text = (tmp_path / "sft.yaml").read_text(encoding="utf-8")
    assert "# size: 3  # a size" in text
    named = {line.removeprefix("# ").partition(":")[0] for line in text.splitlines() if "  # " in line}
    resolve(dict.fromkeys(named - {"size"}), ())


@pytest.mark.usefixtures("adapters")
def test_init_without_an_adapter(tmp_path: Path) -> None:
    done = invoked("init", "full.yaml", lines=lines_of("model", "data", "none", "", "", "", "", "here"))
    assert done.exception is None, done.exception
    values = read_file(tmp_path / "full.yaml")
    assert (values["plugin"], values["learning_rate"], values["output_dir"]) == ([], 5e-5, "here")


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize(
    ("name", "answers", "message"),
    [
        ("there.yaml", ANSWERS, r"^there\.yaml already exists; give another name \(sft init FILE\), or remove it\.$"),
        ("new.json", ANSWERS, r"^new\.json: what is written is YAML with comments; give a name that ends in \.yaml\.$"),
        ("no/new.yaml", ANSWERS, r"^no/new\.yaml is in no folder that is there; make it, or give another name\.$"),
        ("new.yaml", ANSWERS[:3], r"^The input ended before the last question was answered; nothing has been written"),
        ("new.yaml", [*ANSWERS[:3], "many"], r"^max_length: expected a whole number of at least 2, got 'many'\.$"),
        ("new.yaml", [*ANSWERS[:2], "three"], r"^adapter: expected one of one, two, none, got 'three'\.$"),
    ],
)
def test_init_refuses(tmp_path: Path, name: str, answers: list[str], message: str) -> None:
    """And nothing is written, and nothing that is there is touched."""
    (tmp_path / "there.yaml").write_text("seed: 1\n")
    done = invoked("init", name, lines=lines_of(*answers))
    with pytest.raises(sft.UsageError, match=message):
        raise done.exception or AssertionError(done.output)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"there.yaml": "seed: 1\n"}


@pytest.mark.usefixtures("adapters")
def test_a_person_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda text: answers.pop(0))
    monkeypatch.setattr("sys.stdin", Terminal())
    answers = [*ANSWERS[:3], "many", *ANSWERS[3:]]
    cli.main(["init"], standalone_mode=False)
    assert read_file(tmp_path / "sft.yaml")["max_length"] == 512
    assert answers == []


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import os, signal, click.termui; from sft.commands.cli import main\n"
        "def asked(text): os.kill(os.getpid(), signal.SIGINT); return 'x'\n"
        "click.termui.visible_prompt_func = asked; main()"
    )
    line = [sys.executable, "-c", program, "init"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == "sft: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_values_that_yaml_would_take_for_others(tmp_path: Path) -> None:
    values = {"model_name_or_path": "yes", "dataset_name_or_path": "1e-3", "output_dir": "a: b # c"}
    path = tmp_path / "file.yaml"
    path.write_text(file_text("file.yaml", values, None), encoding="utf-8")
    assert {name: read_file(path)[name] for name in values} == values

"""A plugin in one file, asked for by its path."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from toy_plugins import active

import sft
from sft.plugins.files import read_plugin_file, with_files

Distribute = Callable[..., None]
Train = Callable[..., sft.Summary]

SOURCE = """
from dataclasses import dataclass

import sft


@dataclass
class Options:
    last_blocks: int = sft.option(1, "blocks at the end that train", minimum=1)


class Base(sft.Plugin):
    api_version = 1

    def chosen(self, model):
        return range(len(model.architecture.blocks) - self.options.last_blocks, len(model.architecture.blocks))


class Last(Base):
    name = "my-last"
    Options = Options

    @sft.hookimpl
    def sft_adapt_model(self, run, model):
        for parameter in model.parameters():
            parameter.stop_gradient = True
        for target in sft.target_layers(model):
            target.layer.weight.stop_gradient = int(target.name.split(".")[2]) not in self.chosen(model)
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a plugin's file into the folder from which the test runs; its path from there."""
    monkeypatch.chdir(tmp_path)

    def make(source: str = SOURCE, name: str = "my_last.py") -> str:
        (tmp_path / name).write_text(textwrap.dedent(source), encoding="utf-8")
        return f"./{name}"

    return make


def refused(path: str) -> str:
    with pytest.raises(sft.UsageError) as caught:
        with_files({"plugin": [path]})
    return str(caught.value)


def test_a_run_with_a_file_and_one_that_goes_on(
    write: Callable[..., str], train: Train, base_model: Path, tmp_path: Path
) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "do_eval": False, "last_blocks": 2}
    path, said = write(), list[str]()
    train("whole", plugin=[path], **settings)
    before, after = load_file(base_model / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    changed = {name.split(".")[2] for name in before if (before[name] != after[name]).any()}
    assert len(changed) == 2
    report = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert report["plugins"]["my-last"] == "the file my_last.py"
    assert report["plugin_files"]["my-last"]["path"] == str(tmp_path / "my_last.py")

    going_on = {**settings, "resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-1")}
    with pytest.raises(sft.UsageError, match=r"same plugins .my-last: --plugin .*/my_last\.py., or start"):
        train("lacking", **{key: value for key, value in going_on.items() if key != "last_blocks"})
    train("resumed", plugin=path, say=said.append, **going_on)  # a text, as a settings file may have it
    assert not [line for line in said if "has changed" in line]
    model = "model.safetensors"
    assert (tmp_path / "resumed" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()

    write(SOURCE + "\n# more\n")
    train("edited", plugin=path, say=said.append, **going_on)
    assert "note: my_last.py, from which plugin my-last is, has changed since checkpoint-1 was written" in said


def test_what_has_been_edited_is_read_again(write: Callable[..., str]) -> None:
    """Also within a second and to the same length, where Python's bytecode would be taken for current."""
    first = read_plugin_file(write())
    again = read_plugin_file(write())
    assert first is again
    other = read_plugin_file(write(SOURCE.replace("my-last", "my-list")))
    assert (first.name, other.name) == ("my-last", "my-list")


def test_a_module_may_be_the_plugin(write: Callable[..., str]) -> None:
    source = """
        import sft

        name, api_version = "as-module", 1

        @sft.hookimpl
        def sft_check(run):
            pass
    """
    values, files = with_files({"plugin": "lora," + write(source), "seed": 3})
    assert values == {"plugin": ["lora", "as-module"], "seed": 3}
    plugins = active(extra=tuple(files))
    assert plugins.who("as-module") == "Plugin as-module (the file my_last.py)"
    assert plugins.direct == []
    assert plugins.implementing("sft_check") == ["as-module"]


def test_one_beside_an_installed_plugin_of_its_name_is_told(distribute: Distribute, write: Callable[..., str]) -> None:
    distribute("sft-test-last", SOURCE, {"my-last": "Last"})
    _, files = with_files({"plugin": [write()]})
    plugins = active("my-last", extra=tuple(files))
    assert plugins.replaced == ["plugin my-last is the file my_last.py, not that of sft-test-last 1.0"]


def test_help_shows_its_settings(write: Callable[..., str]) -> None:
    from sft.commands.run import help_text

    text = help_text({"plugin": [write()]})
    assert "Plugin my-last (the file my_last.py): \n  --last_blocks N  [1]" in text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import sft\n\nsft.hookimp\n", ", line 3: AttributeError: module 'sft' has no attribute 'hookimp'; correct"),
        ("def f(:\n", ": SyntaxError: invalid syntax (my_last.py, line 1); correct it there."),
        ("raise SystemExit(3)\n", ", line 1: SystemExit: 3; correct it there."),
        ("import sft\n", " holds no plugin: a class that derives from sft.Plugin."),
        (
            "import sft\nclass A(sft.Plugin):\n    name = 'a'\nclass B(sft.Plugin):\n    name = 'b'\n",
            " holds A and B; keep one plugin in a file.",
        ),
        ("import sft\nclass A(sft.Plugin):\n    api_version = 1\n", ": class A has no name; set name to the text"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_line(write: Callable[..., str], source: str, message: str) -> None:
    assert refused(write(source)).startswith(f"Plugin file my_last.py{message}")


def test_one_that_cannot_be_read(tmp_path: Path) -> None:
    assert refused(str(tmp_path / "no.py")).endswith(
        "no.py cannot be read (No such file or directory); check the path."
    )
    (tmp_path / "folder.py").mkdir()
    assert "cannot be read (Is a directory)" in refused(str(tmp_path / "folder.py"))


def test_an_undeclared_api_is_refused_as_of_any_plugin(write: Callable[..., str]) -> None:
    _, files = with_files({"plugin": [write(SOURCE.replace("api_version = 1", "pass"))]})
    with pytest.raises(sft.UsageError, match=r"^Plugin my-last \(the file my_last.py\) does not say for which"):
        active(extra=tuple(files))

"""Blocks of the pages that are no command lines: files of the examples, code that runs, records that are read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chinese_pages import sections
from click.testing import CliRunner
from packaging.specifiers import SpecifierSet
from safetensors.numpy import load_file, save_file

import sft
from sft import hookspecs
from sft.commands.cli import cli
from sft.data.formats import Formats
from sft.data.sources import read
from sft.plugins.registry import Plugins
from sft.testing import needs, read_metrics, write_data

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def shown(page: str, language: str, beginning: str) -> str:
    """The block of a page that begins so."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = [one for section in sections(text) for kind, one in section.code if kind == language]
    (block,) = (one for one in blocks if one.startswith(beginning))
    return block


def names_of(code: str, **known: Any) -> dict[str, Any]:
    """What a block of Python makes, as in a file of its own."""
    names: dict[str, Any] = {"__name__": "page", **known}
    exec(compile(code, "page", "exec", dont_inherit=True), names)
    return names


def conversation(record: str, folder: Path) -> sft.Conversation:
    plugins = Plugins.load([], hookspecs)
    plugins.start({})
    (folder / "train.json").write_text(record, encoding="utf-8")
    (found,) = (Formats(plugins).turns(one) for one in read([folder / "train.json"]))
    return found


def test_the_range_of_the_page_has_this_api() -> None:
    declared = names_of(shown("docs/api-policy.md", "python", "api_version"))["api_version"]
    assert sft.API_VERSION in SpecifierSet(declared)
    assert "2.0" not in SpecifierSet(declared)


def test_the_sentences_of_the_page_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path / "data", [{"src": "a", "tgt": "b"}, {"src": "a"}])
    monkeypatch.chdir(tmp_path)
    model = str(ROOT / "core" / "tests" / "fixtures" / "models" / "llama-tied-gqa")
    data, lines = ["--dataset_name_or_path", "data", "--output_dir", "out"], []
    for words in (
        ["--learning_rat", "1"],
        ["--max_steps", "many"],
        ["--model_name_or_path", "nowhere", *data],
        ["--model_name_or_path", model, *data],
    ):
        error = CliRunner().invoke(cli, ["run", *words], standalone_mode=False).exception
        assert isinstance(error, sft.UsageError)
        lines.append(f"sft: {error}\n")
    assert shown("docs/exit-codes.md", "", "sft: ") == "".join(lines)


def test_the_guide_shows_the_examples() -> None:
    for page, language, beginning, path in (
        ("plugins", "toml", '[project.entry-points."sft.plugins"]', "third_party_plugin/pyproject.toml"),
        ("adapters", "toml", '[project.entry-points."sft.requests"]', "ia3_plugin/pyproject.toml"),
        ("plugins", "python", 'pytest_plugins = ["sft.testing"]', "third_party_plugin/conftest.py"),
    ):
        assert shown(f"docs/{page}.md", language, beginning) in (EXAMPLES / path).read_text(encoding="utf-8")


@needs("lora")
def test_the_sides_of_the_guide_are_those_of_lora() -> None:
    """A line of the class's body."""
    from typing import ClassVar

    from sft_peft_lora.layer import LoraLinear

    names = names_of(shown("docs/plugins.md", "python", "sides: ClassVar"), ClassVar=ClassVar)
    assert names["sides"].items() <= LoraLinear.sides.items()


def test_the_formula_of_the_page_is_a_check() -> None:
    names = names_of(shown("docs/certify.md", "python", "import numpy"))
    entry = re.search(r'"(.+)"$', shown("docs/certify.md", "toml", "[project").strip())
    assert entry is not None
    (check,) = names[entry[1].partition(":")[2]]
    layers = [SimpleNamespace(scale=3.0), SimpleNamespace()]
    asked = {}

    def lab(scale: float) -> SimpleNamespace:
        layers[0].scale = scale
        model = SimpleNamespace(sublayers=lambda: layers)

        def run(started: Any, **settings: Any) -> SimpleNamespace:
            asked.update(settings)
            return SimpleNamespace(started=started(SimpleNamespace(model=model)))

        return SimpleNamespace(run=run)

    check(lab(3.0))
    assert asked["my_alpha"] / asked["my_rank"] == 3.0
    with pytest.raises(AssertionError, match="the scales are"):
        check(lab(0.25))


def test_the_tools_of_the_page_are_read(tmp_path: Path) -> None:
    found = conversation(shown("docs/data.md", "json", '{"tools"'), tmp_path)
    (call,) = found[1].tool_calls
    assert (call.name, json.loads(call.arguments) if isinstance(call.arguments, str) else call.arguments) == (
        "square",
        {"of": 3},
    )
    assert [(turn.role, turn.trains) for turn in found] == [
        ("user", False),
        ("assistant", True),
        ("tool", False),
        ("assistant", True),
    ]
    assert found.tools[0]["function"]["name"] == "square"


def test_the_weights_of_the_page_are_read(tmp_path: Path) -> None:
    found = conversation(shown("docs/data.md", "json", '{"messages": [{"role": "user", "content": "12'), tmp_path)
    assert (found.weight, [turn.weight for turn in found if turn.trains]) == (3, [0.5])


def test_the_family_of_the_guide_keeps_the_protocol(tmp_path: Path) -> None:
    """On a Llama whose files call the backbone ``body``."""
    folder = shutil.copytree(ROOT / "core" / "tests" / "fixtures" / "models" / "llama-untied", tmp_path / "mine")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "my_llama"}), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    renamed = {re.sub(r"^model\.", "body.", name): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    family = names_of(shown("docs/plugins.md", "python", "import sft\n\n\nclass MyFamily"))["MyFamily"]
    code = shown("docs/plugins.md", "python", "from sft.testing import check_family")
    names_of(code, CHECKPOINT=folder, MyFamily=family)["test_it_keeps_the_protocol"]()


@pytest.mark.slow
def test_the_files_of_the_page_are_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint and an evaluation after the first step, then an end, with a reason or without."""
    monkeypatch.chdir(tmp_path)
    *first, stop, with_reason = shown("docs/control.md", "bash", "touch").splitlines()
    demo = ROOT / "core" / "src" / "sft" / "demo"
    settings = {"model_name_or_path": str(demo / "model"), "dataset_name_or_path": str(demo / "data")}
    settings |= {"max_length": 64, "per_device_train_batch_size": 1, "overwrite_output_dir": True}

    for last in (stop, with_reason):

        class Typist(sft.Plugin):
            name = "typist"
            api_version = ">=1.1,<2"

            @sft.hookimpl
            def sft_step_ended(self, run: sft.Run, record: dict[str, Any], last: str = last) -> None:
                for line in first if record["step"] == 1 else [last]:
                    subprocess.run(["bash", "-c", line], check=True)

        summary = sft.run({**settings, "output_dir": "out", "max_steps": 5}, plugins=[Typist], say=lambda _: None)
        assert summary.stopped_early is not None
        assert summary.stopped_early["step"] == 2
        assert ("the loss looks good" in summary.stopped_early["reason"]) == (last is with_reason)
        assert (tmp_path / "out" / "checkpoint-1").is_dir()
        evaluated = [line["step"] for line in read_metrics(tmp_path / "out") if "eval_loss" in line]
        assert evaluated == [0, 1, 2]


def test_a_plugin_may_need_all_that_the_page_shows() -> None:
    trial = names_of(shown("docs/certify.md", "python", "certify = sft.Trial("), sft=sft)["certify"]
    assert all((trial.settings, trial.options, len(trial.records) == 12, trial.environment))


@pytest.mark.slow
@needs("neftune")
def test_a_plugin_is_certified_as_the_page_shows() -> None:
    code = shown("docs/certify.md", "python", "from sft.testing import check_plugin")
    names_of(code.replace('"my-plugin"', '"neftune"'))["test_it_keeps_what_a_plugin_must"]()


@pytest.mark.slow
def test_the_suite_of_the_guide_passes(tmp_path: Path) -> None:
    """In place of the tests of the example that it is about."""
    from installing import install, python

    plugin, site = shutil.copytree(EXAMPLES / "third_party_plugin", tmp_path / "plugin"), tmp_path / "site"
    site.mkdir()
    install(plugin, site)
    for path in (plugin / "tests").glob("test_*.py"):
        path.unlink()
    (plugin / "tests" / "test_page.py").write_text(shown("docs/plugins.md", "python", "import pytest"))
    done = python(plugin, site, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE)

"""`sft export`: what a plugin that writes a form is given, and what of it the core sees to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file
from toy_plugins import plugin

import sft
from sft.commands.cli import cli
from sft.inference.export import export

WRITER = """
        @sft.hookimpl
        def sft_export(self, model, to, folder):
            names = [name for name in model.names if {chosen}]
            about = {{name: [list(model.shape(name)), model.dtype_of(name)] for name in names}}
            for name in names:
                array = model.read(name)
                assert [list(array.shape), str(array.dtype)] == about[name]
            path = folder / "about.txt"
            path.write_text(repr([to, about]))
            return [{returned}]
"""


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Path:
    """A model with a head of its own, in bfloat16."""
    folder = tmp_path / "model"
    shutil.copytree(models / "llama-untied", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models / "llama-tied-gqa" / name, folder / name)
    stored = load_file(folder / "model.safetensors")
    save_file({name: array.astype(ml_dtypes.bfloat16) for name, array in stored.items()}, folder / "model.safetensors")
    return folder


def typed(model: Path, to: str, output: Path, *more: str) -> Result:
    line = ["export", "--model_name_or_path", str(model), "--to", to, "--output_path", str(output), *more]
    return CliRunner().invoke(cli, line)


def toy(distribute: Any, name: str, chosen: str = "True", returned: str = "path", form: str = "toy") -> None:
    body = WRITER.format(chosen=chosen, returned=returned)
    distribute(f"toy-{name}", plugin(name, body), {name: "Tool"}, requests={f"export.{form}": "Tool"})


def test_a_form_asks_for_its_plugin_which_sees_every_tensor(distribute: Any, model: Path, tmp_path: Path) -> None:
    toy(distribute, "one")
    done = typed(model, "toy", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert f"wrote {tmp_path / 'out' / 'about.txt'}" in done.output
    to, about = eval((tmp_path / "out" / "about.txt").read_text())
    stored = load_file(model / "model.safetensors")
    assert to == "toy"
    assert about == {name: [list(array.shape), "bfloat16"] for name, array in stored.items()}


def test_what_is_not_whole_is_not_there(distribute: Any, model: Path, tmp_path: Path) -> None:
    toy(distribute, "lossy", chosen="'k_proj' not in name", form="lossy")
    toy(distribute, "elsewhere", returned="folder / 'no-such-file'", form="elsewhere")
    done = typed(model, "lossy", tmp_path / "out")
    assert isinstance(done.exception, sft.PluginError)
    assert "lossy (toy-lossy 1.0) left out 2 of the model's 21 tensors, such as model.layers.0.self_attn.k_proj" in str(
        done.exception
    )
    done = typed(model, "elsewhere", tmp_path / "out")
    assert isinstance(done.exception, sft.PluginError)
    assert "no-such-file, which is not in" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_what_nobody_writes_and_what_two_write(distribute: Any, model: Path, tmp_path: Path) -> None:
    toy(distribute, "one")
    toy(distribute, "two")
    out = tmp_path / "out"
    two = r"one \(toy-one 1.0\) and two \(toy-two 1.0\) both export to toy"
    refused = [
        ("other", [], r"Nothing that is installed exports to other \(there are: huggingface, .*toy.*\); take one"),
        ("toy", [], rf"{two}; choose with --plugin one or --plugin two"),
        ("toy", ["--plugin", "no:one,no:two"], "What exports to toy is left out; take away --plugin no:"),
        ("toy", ["--plugin", "no:two", "--learning_rate", "3"], "learning_rate does nothing in sft export"),
        ("huggingface", ["--plugin", "one"], "Plugin one has no part in sft export"),
        ("huggingface", ["--size", "3"], "sft export --to huggingface has no option size; it has no options of its"),
        ("huggingface", ["size"], "Unexpected 'size'; options are given as --name value"),
    ]
    for to, more, message in refused:
        done = typed(model, to, out, *more)
        assert isinstance(done.exception, sft.UsageError), (to, more, done.output)
        with pytest.raises(sft.UsageError, match=message):
            raise done.exception
        assert not out.exists()
    assert typed(model, "toy", out, "--plugin", "two").exit_code == 0


@pytest.mark.parametrize("case", ["qwen2-tied-sharded", "gemma-tied"])
def test_huggingface_copies_every_bit(models: Path, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / case, folder)
    if not (folder / "tokenizer.json").exists():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(models / "qwen2-untied" / name, folder / name)
    written = export(str(folder), None, "huggingface", tmp_path / "out", lambda text: None)
    assert tmp_path / "out" / "config.json" in written
    stored = {name: array for file in folder.glob("model*.safetensors") for name, array in load_file(file).items()}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(found) == sorted(stored)
    for name, array in stored.items():
        np.testing.assert_array_equal(found[name].view(np.uint8), array.view(np.uint8))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == json.loads((folder / "config.json").read_text())["hidden_size"]


def test_a_full_place_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    monkeypatch.setattr("sft.models.loading.ModelSource.weights", lambda self: pytest.fail("weights are opened"))
    with pytest.raises(sft.UsageError, match="already exists and is not empty"):
        export(str(model), None, "huggingface", tmp_path / "out", lambda text: None)
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_paddle_is_asked_for_where_something_is_computed(
    distribute: Any, monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    """Before anything is opened."""
    body = """
        @sft.hookimpl
        def sft_quantizer(self): ...
"""
    distribute("toy-few", plugin("few", body), {"few": "Tool"})

    def missing() -> None:
        raise sft.UsageError("PaddlePaddle is not installed")

    monkeypatch.setattr("sft.runtime.require_paddle", missing)
    export(str(model), None, "huggingface", tmp_path / "plain", lambda text: None)
    monkeypatch.setattr("sft.inference.finished.open_model", lambda *given: pytest.fail("the model is opened"))
    with pytest.raises(sft.UsageError, match="PaddlePaddle is not installed"):
        export(str(model), None, "huggingface", tmp_path / "out", lambda text: None, ["few"])

"""``sft plugins new``: each kind installs, holds what it declares and passes its own tests, as it is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from installing import install, python

import sft
from sft.commands.cli import cli
from sft.kit.about import about, find_plugin
from sft.kit.new import KINDS, write_package
from sft.tensor_files import read_tensors
from sft.testing import load, needs


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_is_a_plugin_of_its_kind(tmp_path: Path, kind: str) -> None:
    folder = write_package("odd-9-name", kind, tmp_path / "package")
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        *(".gitignore", "README.md", "conftest.py", "pyproject.toml"),
        *("src/sft_odd_9_name.py", "tests/test_odd_9_name.py"),
    ]
    texts = [path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.is_file()]
    assert not [text for text in texts if re.search(r"new.?plugin\b(?! NAME)|@\w+@", text, re.IGNORECASE)]
    row = about(find_plugin(str(folder / "src" / "sft_odd_9_name.py")), [])
    assert row.kinds == ("observer" if kind == "tracker" else kind,)
    assert (row.name, row.fault, row.summary) == ("odd-9-name", None, KINDS[kind].summary)
    assert all(option.name.startswith("odd_9_name_") for option in row.options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@needs("lora")  # under which a quantizer is tried
def test_it_installs_validates_and_passes_its_own_tests(tmp_path: Path, kind: str) -> None:
    folder, site = write_package(f"my-{kind}", kind, tmp_path / "package"), tmp_path / "site"
    site.mkdir()
    install(folder, site)
    valid = python(tmp_path, site, "-m", "sft", "plugins", "validate", f"my-{kind}")
    assert valid.returncode == 0, valid.stdout + valid.stderr
    done = python(folder, site, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE)
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_pip_installs_it(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling, with which pip builds it, is not installed")
    folder = write_package("my-adapter", "adapter", tmp_path / "package")
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*line, "--target", str(tmp_path / "site"), str(folder)], capture_output=True, timeout=110)
    assert done.returncode == 0, done.stderr
    shown = python(tmp_path, tmp_path / "site", "-m", "sft", "plugins", "info", "my-adapter")
    assert shown.stdout.startswith("my-adapter: adapter (sft-my-adapter 0.1.0)\n")
    assert "adapter MY_ADAPTER" in shown.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_its_code_is_in_the_house_format(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("ruff", reason="ruff is not installed")
    folder = write_package(f"my-{kind}", kind, tmp_path / "package")
    config = ["--config", str(Path(__file__).parent.parent / "pyproject.toml"), str(folder)]
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, *config], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_adapter_of_a_file_says_which_file_it_needs(
    base_model: Path, train: Callable[..., sft.Summary], tmp_path: Path
) -> None:
    """The adapter of the template, without its distribution."""
    path = write_package("my-scale", "adapter", tmp_path / "package") / "src" / "sft_my_scale.py"
    done = train("out", plugin=[str(path)], learning_rate=1e-1)
    with pytest.raises(sft.UsageError) as caught:
        load(base_model, done.output_dir)
    assert str(caught.value) == (
        f"{done.output_dir} is a MY_SCALE adapter of plugin my-scale: it was the file sft_my_scale.py, so add --plugin "
        "PATH/sft_my_scale.py."
    )
    model = load(base_model, done.output_dir, [str(path)])
    scales = [layer.scale.numpy() for layer in model.sublayers() if type(layer).__name__ == "Scaled"]
    assert scales
    assert any((scale != 1).any() for scale in scales)
    cli.main(
        [
            *("merge", "--model_name_or_path", str(base_model), "--adapter_path", str(done.output_dir)),
            *("--output_path", str(tmp_path / "merged"), "--plugin", str(path)),
        ],
        standalone_mode=False,
    )
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
@needs("parallel-4d")
def test_processes_that_nproc_starts_find_the_file(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    """By a path from the folder in which the command is typed; and one process goes on from what two have saved."""
    write_package("my-scale", "adapter", tmp_path / "package")
    line = ["-m", "sft", "run", "--model_name_or_path", str(base_model), "--dataset_name_or_path", str(dataset)]
    line += ["--plugin", "package/src/sft_my_scale.py", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    line += ["--save_strategy", "steps", "--save_steps", "1", "--learning_rate", "0.1", "--device", "cpu"]
    (tmp_path / "site").mkdir()
    two = python(tmp_path, tmp_path / "site", *line, "--nproc", "2", "--output_dir", "two")
    assert two.returncode == 0, two.stdout + two.stderr
    given = ["--resume_from_checkpoint", "two/checkpoint-1", "--gradient_accumulation_steps", "2"]
    one = python(tmp_path, tmp_path / "site", *line, "--output_dir", "one", *given)
    assert one.returncode == 0, one.stdout + one.stderr
    found, expected = (read_tensors(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, rtol=0)
    about_file = json.loads((tmp_path / "two" / "run.json").read_text())["plugin_files"]["my-scale"]
    assert about_file["path"] == str(tmp_path / "package" / "src" / "sft_my_scale.py")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My Plugin", "The name 'my plugin' is not of small letters, digits and single dashes, as in my-plugin."),
        ("9lives", "The name '9lives' is not of small letters"),
        ("../up", "The name '../up' is not of small letters"),
        ("seed", "The name seed would be the switch seed, which is a setting already; choose another name."),
    ],
)
def test_a_name_that_cannot_be_one(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError) as caught:
        cli.main(["plugins", "new", name, "--kind", "tracker", str(tmp_path / "new")], standalone_mode=False)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "new").exists()


@needs("lora")
def test_the_name_of_one_that_is_there_and_a_folder_that_is_full(tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match=r"^Plugin lora is installed already, from sft-peft-lora"):
        write_package("lora", "adapter", tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(sft.UsageError, match="already exists and is not empty"):
        write_package("my-adapter", "adapter", tmp_path / "full")

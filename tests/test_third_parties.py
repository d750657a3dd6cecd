"""Plugins of third parties: an example distribution tests itself, and stands beside ours without breaking anything."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from environments import build_wheels
from installing import install, python
from safetensors.numpy import load_file

import sft
from sft.plugins.discovery import entries
from sft.testing import forward, load, make_model, needs, write_data

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_the_sqlite_tracker_tests_itself(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / "sqlite_tracker", tmp_path / "plugin")
    source = tmp_path / "plugin" / "src"
    done = python(tmp_path / "plugin", source, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^9 passed", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_the_sqlite_tracker_beside_our_plugins(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    install(EXAMPLES / "sqlite_tracker", site)
    make_model(tmp_path / "model")
    write_data(tmp_path / "data", [{"src": f"type#{n}", "tgt": "A coat."} for n in range(12)])

    def typed(*arguments: str) -> str:
        done = python(tmp_path, site, "-m", "sft", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    listed = typed("plugins")
    assert re.search(r"^sqlite +observer +sft-example-sqlite 0\.1\.0$", listed, re.MULTILINE)
    assert re.search(r"^lora +adapter +sft-peft-lora ", listed, re.MULTILINE)
    assert "--sqlite_path TEXT" in typed("run", "--plugin", "sqlite", "--help")
    run = ("run", "--model_name_or_path", "model", "--dataset_name_or_path", "data", "--max_steps", "3")
    run = (*run, "--plugin", "lora", "--logging_steps", "1")
    typed(*run, "--output_dir", "without")
    typed(*run, "--output_dir", "with", "--plugin", "sqlite", "--sqlite_path", "runs.sqlite")
    losses = [values["loss"] for values in lines(tmp_path / "with") if "loss" in values]
    assert losses == [values["loss"] for values in lines(tmp_path / "without") if "loss" in values]
    adapter = "adapter_model.safetensors"
    assert (tmp_path / "with" / adapter).read_bytes() == (tmp_path / "without" / adapter).read_bytes()
    with sqlite3.connect(tmp_path / "runs.sqlite") as database:
        stored = database.execute("SELECT value FROM metrics WHERE name = 'loss' ORDER BY step").fetchall()
        assert stored == [(loss,) for loss in losses]
        assert database.execute("SELECT id, status FROM runs").fetchall() == [(1, "finished")]
    ask = ("generate", "--model_name_or_path", "model", "--prompt", "type#1", "--max_new_tokens", "4", "--lora_path")
    assert typed(*ask, "with") == typed(*ask, "without")


@pytest.mark.slow
def test_ia3_tests_itself(tmp_path: Path) -> None:
    """With the parity that its fixtures of PEFT ask for, over models that it makes."""
    shutil.copytree(EXAMPLES / "ia3_plugin", tmp_path / "plugin")
    (tmp_path / "site").mkdir()
    install(EXAMPLES / "ia3_plugin", tmp_path / "site")
    done = python(tmp_path / "plugin", tmp_path / "site", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^13 passed", done.stdout, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(("example", "name"), [("lr_finder", "lr-finder"), ("layerwise_decay", "layerwise-decay")])
def test_a_plugin_from_outside_is_a_wheel_that_tests_itself(tmp_path: Path, example: str, name: str) -> None:
    wheels = build_wheels([EXAMPLES / example], tmp_path / "wheels", tmp_path / "sources")
    (wheel,) = wheels.iterdir()
    site, tests = tmp_path / "site", tmp_path / "plugin"
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(line, check=True, timeout=110)
    shutil.copytree(EXAMPLES / example, tests, ignore=shutil.ignore_patterns("src", "__pycache__"))
    valid = python(tmp_path, site, "-m", "sft", "plugins", "validate", name)
    assert valid.returncode == 0, valid.stdout + valid.stderr
    done = python(tests, site, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed in", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_two_processes_of_the_data_parallel_example_learn_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In four steps of 4 rows, the last of which has one row; and one process goes on from a checkpoint of the two."""
    monkeypatch.setenv("PADDLE_DISTRI_BACKEND", "gloo")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # paddle's launcher takes it for a GPU
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "site").mkdir()
    install(EXAMPLES / "data_parallel_plugin", tmp_path / "site")
    make_model(tmp_path / "model")
    records = [{"src": f"type#{n}", "tgt": "A coat. " * (1 + n % 3)} for n in range(13)]
    write_data(tmp_path / "data", records, records[:3])
    run = ("run", "--model_name_or_path", "model", "--dataset_name_or_path", "data", "--num_train_epochs", "1")
    run = (*run, "--per_device_train_batch_size", "2", "--logging_steps", "1", "--save_strategy", "steps")
    run = (*run, "--save_steps", "2", "--learning_rate", "1e-2", "--adam_epsilon", "1e-3")
    one = ("-m", "sft", *run, "--gradient_accumulation_steps", "2")
    two = ("-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--max_restart", "0")
    two = (*two, str(Path(sys.executable).with_name("sft")), *run, "--plugin", "data-parallel,no:parallel-4d")
    for line in (
        (*one, "--output_dir", "one"),
        (*two, "--output_dir", "two"),
        (*one, "--output_dir", "resumed", "--resume_from_checkpoint", "two/checkpoint-2"),
    ):
        done = python(tmp_path, tmp_path / "site", *line)
        assert done.returncode == 0, done.stdout + done.stderr
    expected = lines(tmp_path / "one")
    assert [values["step"] for values in expected] == [0, 1, 2, 3, 4, 4]
    for other, steps in (("two", 6), ("resumed", 3)):
        for values, others in zip(expected[-steps:], lines(tmp_path / other)[-steps:], strict=True):
            for key in {"step", "loss", "grad_norm", "eval_loss", "target_tokens"} & values.keys():
                assert others[key] == pytest.approx(values[key], rel=1e-5)
        weights, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", other))
        for name, tensor in weights.items():
            np.testing.assert_allclose(theirs[name], tensor, atol=1e-5, rtol=0)


@needs("lora")
def test_ia3_reads_its_adapters_and_leaves_lora_alone(
    paddle: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Folders of both are read and merged by who claims them."""
    from sft.inference.merge import merge
    from sft.inference.open import settings_for

    (tmp_path / "site").mkdir()
    install(EXAMPLES / "ia3_plugin", tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    entries.cache_clear()
    base = make_model(tmp_path / "base")
    write_data(tmp_path / "data", [{"src": f"a{n}", "tgt": "b"} for n in range(4)])
    settings = {"model_name_or_path": str(base), "dataset_name_or_path": str(tmp_path / "data"), "max_steps": 2}
    for plugin in ("lora", "ia3"):
        sft.run({**settings, "plugin": plugin, "output_dir": str(tmp_path / plugin)}, say=lambda text: None)
    of_peft = EXAMPLES / "ia3_plugin" / "tests" / "fixtures" / "llama"
    ids = np.arange(4, 24)[None]
    for folder, reader in ((tmp_path / "lora", "lora"), (tmp_path / "ia3", "ia3"), (of_peft, "ia3")):
        assert settings_for(folder)[1].readers == [reader]
        merged = tmp_path / f"merged {folder.name}"
        merge(str(base), folder, merged, lambda text: None)
        np.testing.assert_allclose(forward(load(base, folder), ids), forward(load(merged), ids), atol=2e-5, rtol=0)
    with pytest.raises(sft.UsageError, match="what reads it is left out; take away --plugin no:ia3"):
        load(base, of_peft, ["no:ia3"])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

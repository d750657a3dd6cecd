"""The main job from the command line, on the embedded model: run, merge, generate; and what the demo ships."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from sft.commands.demo import FOLDER, curve, demo_settings
from sft.plugins.requests import by_device

SFT = Path(sys.executable).with_name("sft")
PROMPT = "type#bag*color#red*material#canvas"


def sft(*words: str, cwd: Path) -> str:
    done = subprocess.run([str(SFT), *words], capture_output=True, text=True, cwd=cwd, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``sft run --plugin lora`` has trained ``out`` for a few steps and merged it to ``merged``."""
    folder = tmp_path_factory.mktemp("job")
    model = ["--model_name_or_path", str(FOLDER / "model")]
    (folder / "run.txt").write_text(
        sft(
            *("run", "--plugin", "lora", *model, "--dataset_name_or_path", str(FOLDER / "data")),
            *("--max_length", "128", "--learning-rate", "1e-2", "--max-steps=8", "--output_dir", "out"),
            *("--per_device_train_batch_size", "8", "--logging_steps", "4", "--num_samples", "1"),
            cwd=folder,
        )
    )
    (folder / "merge.txt").write_text(sft("merge", *model, "--lora_path", "out", "--output_path", "merged", cwd=folder))
    return folder


def test_what_a_run_prints(work: Path) -> None:
    text = (work / "run.txt").read_text()
    assert re.search(r"^train data: 400 records of src/tgt, [\d,]+ tokens, [\d,]+ target tokens$", text, re.MULTILINE)
    assert re.search(r"^runtime: .*OMP_NUM_THREADS=\d+", text, re.MULTILINE)
    assert "lora: 42 layers, rank 8, scaling 2" in text
    assert [int(step) for step in re.findall(r"^step (\d+)/8 ", text, re.MULTILINE)] == [1, 4, 8]
    before, after = map(float, re.search(r"dev loss +([\d.]+) -> ([\d.]+)", text).groups())  # type: ignore[union-attr]
    assert after < before - 0.5
    for word in ("prompt: ", "  before: ", "  after:  ", "peak memory", "written to out"):
        assert word in text


def test_what_a_run_leaves(work: Path) -> None:
    names = {path.name for path in (work / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "run.json", "metrics.jsonl"} <= names
    record = json.loads((work / "out" / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["settings"]["max_steps"] == 8
    assert {*record["plugins"]} == {"lora", *by_device({})}
    assert record["result"]["eval_loss_after"] < record["result"]["eval_loss_before"]
    assert record["machine"]["python"] == sys.version.split()[0]


def test_merged_weights_are_the_base_plus_the_adapter(work: Path) -> None:
    """Against the paper's W + s·B·A in float64, from the files alone."""
    adapter, merged = load_file(work / "out" / "adapter_model.safetensors"), work / "merged" / "model.safetensors"
    config = json.loads((work / "out" / "adapter_config.json").read_text())
    changed = 0
    with safe_open(FOLDER / "model" / "model.safetensors", "np") as base, safe_open(merged, "np") as result:
        assert set(base.keys()) == set(result.keys())
        for name in base.keys():  # noqa: SIM118  (no dict)
            weight, found = base.get_tensor(name), result.get_tensor(name)
            assert found.dtype == weight.dtype == np.float16
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            expected = weight.astype(np.float64)
            if f"{key}A.weight" in adapter:
                a, b = (adapter[f"{key}{half}.weight"].astype(np.float64) for half in "AB")
                expected = expected + config["lora_alpha"] / config["r"] * (b @ a)
                changed += 1
            np.testing.assert_allclose(found.astype(np.float64), expected, rtol=1e-3, atol=1e-6)
    assert changed == len(adapter) // 2 == 42


def test_merged_model_answers_as_the_adapter_does(work: Path) -> None:
    words = ["--prompt", PROMPT, "--max_new_tokens", "24"]
    adapter = sft("generate", "--model_name_or_path", str(FOLDER / "model"), "--lora_path", "out", *words, cwd=work)
    merged = sft("generate", "--model_name_or_path", "merged", *words, cwd=work)
    base = sft("generate", "--model_name_or_path", str(FOLDER / "model"), *words, cwd=work)
    assert adapter == merged != base
    assert len(adapter.split()) > 3


def test_generate_reads_lines(work: Path) -> None:
    done = subprocess.run(
        [str(SFT), "generate", "--model_name_or_path", "merged", "--max_new_tokens", "4"],
        input=f"{PROMPT}\n\n{PROMPT}\n",
        capture_output=True,
        text=True,
        cwd=work,
    )
    first, second = done.stdout.splitlines()
    assert first == second != ""


def test_merge_refuses_to_overwrite(work: Path) -> None:
    words = ["merge", "--model_name_or_path", str(FOLDER / "model"), "--lora_path", "out", "--output_path", "merged"]
    done = subprocess.run([str(SFT), *words], capture_output=True, text=True, cwd=work)
    assert done.returncode == 2
    assert done.stderr.startswith("sft: merged already exists")
    assert done.stderr.count("\n") == 1


def test_the_embedded_model_is_small() -> None:
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size <= 8 << 20
    with safe_open(FOLDER / "model" / "model.safetensors", "np") as weights:
        names = list(weights.keys())
        assert sum(int(np.prod(weights.get_slice(name).get_shape())) for name in names) <= 3_000_000
        assert all(np.isfinite(weights.get_tensor(name)).all() for name in names)


def test_demo_data_is_the_advertisement_format_and_dev_is_disjoint() -> None:
    splits = {}
    for split in ("train", "dev"):
        lines = (FOLDER / "data" / f"{split}.json").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        assert all(set(record) == {"src", "tgt"} for record in records)
        assert all(re.fullmatch(r"\w+#[\w-]+( [\w-]+)*(\*\w+#[\w-]+( [\w-]+)*)+", record["src"]) for record in records)
        splits[split] = {record["src"] for record in records}
    assert len(splits["train"]) == 400
    assert len(splits["dev"]) == 40
    assert not splits["train"] & splits["dev"]


def test_demo_overwrites_its_own_folder_alone() -> None:
    assert demo_settings("sft-demo")["overwrite_output_dir"] is True
    assert demo_settings("somewhere")["overwrite_output_dir"] is False


def test_curve_falls_with_the_loss() -> None:
    rows = curve([4.0, 3.0, 2.0, 1.0], height=4).splitlines()
    assert rows[0].endswith("4.000 ┤█")
    assert rows[-1].endswith("1.000 ┤████")
    assert [row.count("█") for row in rows] == [1, 2, 2, 4]


@pytest.mark.slow
def test_demo_shows_what_was_learned(tmp_path: Path) -> None:
    text = sft("demo", cwd=tmp_path)
    before, after = map(float, re.search(r"dev loss +([\d.]+) -> ([\d.]+)", text).groups())  # type: ignore[union-attr]
    assert before > 3
    assert after < 0.7
    answers = re.findall(r"^  (before|after):  ?(.+)$", text, re.MULTILINE)
    assert len(answers) == 6
    assert all(text.startswith(("This is ", "These are ")) for kind, text in answers if kind == "before")
    assert not any(text.startswith(("This is ", "These are ")) for kind, text in answers if kind == "after")
    assert "train loss by step" in text
    assert "written to sft-demo" in text
    assert (tmp_path / "sft-demo" / "adapter_model.safetensors").is_file()

"""What sft wrote while PaddleNLP's classes computed its models: it loads, computes the same, and runs go on.

``fixtures/before_decoder/make.py`` says what the files are; the version that it names computed what is expected here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from sft.commands.cli import cli
from sft.inference.open import load_for_inference
from sft.testing import forward, load, needs, read_metrics

OLD = Path(__file__).parent / "fixtures" / "before_decoder"
MODELS = Path(__file__).parent / "fixtures" / "models"
LLAMA = MODELS / "llama-tied-gqa"
BASES = {"lora-mistral": MODELS / "mistral-gqa", "lora-gemma": MODELS / "gemma-tied"}
NEEDS = {
    "lora": ["lora"],
    "rslora": ["lora", "rslora"],
    "pissa": ["lora", "pissa"],
    "vera": ["vera"],
    "lora-nf4": ["lora", "nf4"],
    "rslora-nf4": ["lora", "nf4"],
    "pissa-nf4": ["lora", "nf4"],
    "vera-nf4": ["vera", "nf4"],
    "lora-mistral": ["lora"],
    "lora-gemma": ["lora"],
}
RUNS = [
    pytest.param("whole-run"),
    pytest.param("lora-run", marks=needs("lora", "pissa", "lora-plus", "neftune")),
]
# Float32 has 24 bits, and the sums of a forward pass are taken in another order: as for the families (test_decoder.py).
LOGITS = 2e-6
# PiSSA takes the adapter's initial product out of the base: what is computed is a sum of three products as large as the
# one of the weights, each with the rounding of its own.
PISSA = 3 * LOGITS
# Each step passes such a difference on through AdamW, which divides by √v; a norm over all gradients has more of it
# than a mean of losses. Over these four steps: at most 8e-8 of a loss and 4e-7 of a norm.
LOSS, NORM = 1e-6, 4e-6


def expected(name: str) -> np.ndarray:
    return load_file(OLD / "expected.safetensors")[name]


def numbers(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))[name]
    return found


def with_tokenizer(folder: Path) -> Path:
    """``folder`` with the tokenizer that the fixture leaves out."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(LLAMA / name, folder / name)
    return folder


@pytest.fixture
def kept(tmp_path: Path) -> Callable[[str], Path]:
    """A complete copy of a folder that a model or a run stands in."""

    def get(name: str) -> Path:
        folder = shutil.copytree(OLD / name, tmp_path / name)
        with_tokenizer(folder)
        for checkpoint in folder.glob("checkpoint-*"):
            with_tokenizer(checkpoint)
        return folder

    return get


def assert_same_logits(model: Path, adapter: Path | None, name: str) -> None:
    logits = forward(load(model, adapter), expected("input_ids"))[..., ::8]
    bound = PISSA if name.startswith("pissa") else LOGITS
    assert np.abs(logits - expected(name)).max() <= bound * np.abs(expected(name)).max()


def sft(*arguments: object) -> str:
    """What a command prints on standard output."""
    done = CliRunner().invoke(cli, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


# --- adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(*plugins), id=name) for name, plugins in NEEDS.items()]
)
def test_an_adapter_computes_what_it_did(paddle: Any, tmp_path: Path, name: str) -> None:
    """Loaded over its base, and merged with it."""
    base, adapter = BASES.get(name, LLAMA), OLD / "adapters" / name
    assert_same_logits(base, adapter, name)
    sft("merge", "--model_name_or_path", base, "--adapter_path", adapter, "--output_path", tmp_path / "merged")
    assert_same_logits(tmp_path / "merged", None, name)


@needs("lora")
def test_the_base_is_checked_as_it_was(paddle: Any, kept: Callable[[str], Path]) -> None:
    """The fingerprint that an adapter holds is that of its base, and not of other weights."""
    other = shutil.copytree(LLAMA, kept("base") / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, other / "model.safetensors")
    for model, is_other in ((LLAMA, False), (other, True)):
        said: list[str] = []
        load_for_inference(str(model), OLD / "adapters" / "lora", said.append)
        assert ("was trained over other weights" in "".join(said)) == is_other, said


# --- whole models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whole-result", "merged-paddle"])
def test_a_whole_model_computes_what_it_did(paddle: Any, kept: Callable[[str], Path], name: str) -> None:
    """In Hugging Face's layout, and in PaddleNLP's."""
    assert_same_logits(kept(name), None, name)


def test_a_result_is_measured_and_answers_as_its_run_did(paddle: Any, kept: Callable[[str], Path]) -> None:
    model, before = kept("whole-result"), numbers("whole-run")
    line = sft("evaluate", "--model_name_or_path", model, "--dataset_name_or_path", OLD / "data", "--json")
    assert json.loads(line)["eval_loss"] == pytest.approx(before["eval_loss_after"], rel=LOSS)
    for sample in before["samples"]:
        answer = sft("generate", "--model_name_or_path", model, "--prompt", sample["prompt"], "--max_new_tokens", 8)
        assert answer == sample["after"] + "\n"


# --- runs that were stopped -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_as_it_would_have(train: Any, kept: Callable[[str], Path], name: str) -> None:
    """Parameters, optimizer, place in the data, draws of dropout and noise, lines written so far: all from then."""
    folder, before = kept(name), numbers(name)
    settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
    settings["plugin"].remove("snapshot")  # which made the copy
    model = with_tokenizer(shutil.copytree(OLD / "base", folder.parent / "base")) if name == "whole-run" else LLAMA
    settings.update(model_name_or_path=str(model), dataset_name_or_path=str(OLD / "data"), output_dir=str(folder))
    summary = train(**{**settings, "resume_from_checkpoint": "auto"})

    lines = read_metrics(folder, same=True)
    assert [line["step"] for line in lines] == [line["step"] for line in before["lines"]]
    assert lines[:6] == before["lines"][:6]  # those that were written before it was stopped
    for line, then in zip(lines[6:], before["lines"][6:], strict=True):
        assert line.keys() == then.keys()
        for key, value in line.items():
            tolerance = {"loss": LOSS, "eval_loss": LOSS, "eval_ppl": 10 * LOSS, "grad_norm": NORM}.get(key, 0)
            assert value == pytest.approx(then[key], rel=tolerance, abs=0), (line["step"], key)
    assert summary.eval_loss_before == before["eval_loss_before"]
    assert [sample["after"] for sample in summary.samples] == [sample["after"] for sample in before["samples"]]

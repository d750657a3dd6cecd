"""Layers that train whole beside an adapter (`modules_to_save`): PEFT's adapters, and what a run writes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.inference.merge import merge
from sft.testing import load, needs

CASES = {"llama-lora-saved": "llama-tied-gqa", "qwen2-lora-saved": "qwen2-untied"}
TOLERANCE = 1e-4
PREFIX = "base_model.model."
EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"


def quiet(text: str) -> None:
    pass


@pytest.mark.parametrize(("case", "base"), CASES.items(), ids=list(CASES))
def test_logits_are_pefts_also_merged(assert_logits_are_pefts: Any, case: str, base: str) -> None:
    assert_logits_are_pefts(case, base)


@pytest.mark.parametrize(
    ("model", "names", "trained"),
    [
        ("llama-tied-gqa", ["embed_tokens"], {"model.embed_tokens"}),
        ("llama-tied-gqa", ["lm_head", "norm"], {"model.embed_tokens", "model.norm"}),
        ("qwen2-untied", ["embed_tokens", "lm_head"], {"model.embed_tokens", "lm_head"}),
        pytest.param("qwen2-untied", [r".*1\..*norm"], None, marks=pytest.mark.slow),
        pytest.param("qwen2-untied", ["k_proj", "lm_head"], None, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_what_a_run_trains_is_written_and_comes_back(
    train: Any,
    adapt: Any,
    models: Path,
    tmp_path: Path,
    looking: Any,
    input_ids: Any,
    logits_of: Any,
    model: str,
    names: list[str],
    trained: set[str] | None,
) -> None:
    """To the bit; merged the same but for float32 noise; and a run that goes on from it begins there."""
    base, (look, logits) = models / model, looking
    settings = {"model_name_or_path": str(base), "modules_to_save": names, "lora_target_modules": ["q_proj"]}
    run = adapt(**settings)
    found = {name.rpartition(".")[0] for name, p in run.model.named_parameters() if not p.stop_gradient}
    whole = {name for name in found if not name.endswith("q_proj")}
    assert trained is None or whole == trained
    train("out", (look,), **settings)
    tied = model == "llama-tied-gqa"
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    kept = {name[len(PREFIX) :].rpartition(".")[0] for name in written if ".lora_" not in name}
    assert kept == (whole | {"lm_head"} if tied else whole)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    names = [path.replace("model.embed_tokens", "embed_tokens") for path in sorted(kept)]
    assert config["modules_to_save"] == names
    assert config.get("ensure_weight_tying", False) is tied
    before = load_file(base / "model.safetensors")
    moved = [name for name in written if ".lora_" not in name and name[len(PREFIX) :] in before]
    assert moved
    assert not any(np.array_equal(written[name], before[name[len(PREFIX) :]]) for name in moved)
    np.testing.assert_array_equal(logits_of(load(base, tmp_path / "out"), input_ids), logits[0])
    merge(str(base), tmp_path / "out", tmp_path / "merged", quiet)
    np.testing.assert_allclose(logits_of(load(tmp_path / "merged"), input_ids), logits[0], atol=TOLERANCE, rtol=0)
    go_on = {"model_name_or_path": str(base), "lora_path": str(tmp_path / "out"), "learning_rate": 0.0, "max_steps": 1}
    train("on", **go_on)
    again = load_file(tmp_path / "on" / "adapter_model.safetensors")
    assert {name: tensor.tobytes() for name, tensor in again.items()} == {n: t.tobytes() for n, t in written.items()}


@pytest.mark.parametrize("model", ["llama-tied-gqa", pytest.param("qwen2-untied", marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_run_that_was_not_stopped(train: Any, models: Path, tmp_path: Path, model: str) -> None:
    settings = {"model_name_or_path": str(models / model), "modules_to_save": ["embed_tokens", "lm_head"]}
    settings = {**settings, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    train("whole", **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert not (checkpoint / "trainer" / "trainable.safetensors").exists()  # all of it is in the adapter's file
    train("stopped", **settings, resume_from_checkpoint=str(checkpoint))
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped"))
    assert {n: t.tobytes() for n, t in whole.items()} == {n: t.tobytes() for n, t in resumed.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "plugins", [["vera"], ["lora", "dora", "pissa"], ["lora", "nf4"], ["vera", "int8"]], ids="-".join
)
def test_it_goes_together_with_any_adapter(
    train: Any, models: Path, tmp_path: Path, looking: Any, input_ids: Any, logits_of: Any, plugins: list[str]
) -> None:
    base, (look, logits) = models / "qwen2-untied", looking
    train("out", (look,), plugin=plugins, model_name_or_path=str(base), modules_to_save="embed_tokens,lm_head")
    np.testing.assert_allclose(logits_of(load(base, tmp_path / "out"), input_ids), logits[0], atol=TOLERANCE, rtol=0)
    merge(str(base), tmp_path / "out", tmp_path / "merged", quiet)
    np.testing.assert_allclose(logits_of(load(tmp_path / "merged"), input_ids), logits[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"modules_to_save": ["head"]},
            "modules_to_save: 'head' meets no layer that has weights; there are embed_tokens,",
        ),
        ({"modules_to_save": ["q_proj"]}, "q_proj is adapted, and modules_to_save lets it train whole; leave it out"),
        (
            {"modules_to_save": ["norm"], "plugin": []},
            "names layers beside an adapter, and this run trains all of them",
        ),
        pytest.param(
            {"modules_to_save": ["q_proj"], "plugin": ["lora", "nf4"], "lora_target_modules": ["v_proj"]},
            "'q_proj' meets no layer that has weights",
            marks=needs("nf4"),
        ),
    ],
    ids=str,
)
def test_what_cannot_train_whole_is_refused(train: Any, tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(sft.UsageError, match=message):
        train("out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "change", "config", "message"),
    [
        (
            "llama-lora-saved",
            lambda t: t.pop(HEAD),
            {"ensure_weight_tying": False},
            "an embedding and a head that are apart",
        ),
        ("llama-lora-saved", lambda t: t.update({HEAD: t[HEAD] + 1}), {}, "an embedding and a head that are apart"),
        (
            "qwen2-lora-saved",
            lambda t: t.update({HEAD: t[HEAD][1:].copy()}),
            {},
            r"lm_head\.weight.* does ?n.t fit|it belongs",
        ),
        ("qwen2-lora-saved", lambda t: [t.pop(n) for n in list(t) if ".lora_" not in n], {}, "holds no such layer"),
        ("qwen2-lora-saved", None, {"modules_to_save": "lm_head"}, "must give modules_to_save as names, not 'lm_head'"),
        ("qwen2-lora-saved", None, {"modules_to_save": ["lm_head"]}, "input_layernorm.weight is not a LoRA weight"),
    ],
    ids=["untied", "apart", "shape", "lost", "a word", "more than is named"],
)
def test_what_does_not_belong_together_is_refused(
    models: Path, adapter_variant: Any, tmp_path: Path, case: str, change: Any, config: Any, message: str
) -> None:
    folder = adapter_variant(case, change, **config)
    with pytest.raises(sft.UsageError, match=message):
        load(models / CASES[case], folder)
    with pytest.raises(sft.UsageError, match=message):
        merge(str(models / CASES[case]), folder, tmp_path / "merged", quiet)


def test_one_matrix_of_a_tied_base_is_enough(models: Path, peft: Path, adapter_variant: Any, logits_of: Any) -> None:
    expected = load_file(peft / "llama-lora-saved" / "reference.safetensors")
    folder = adapter_variant("llama-lora-saved", lambda tensors: tensors.pop(HEAD))
    found = logits_of(load(models / "llama-tied-gqa", folder), expected["input_ids"])
    np.testing.assert_allclose(found, expected["logits"], atol=TOLERANCE, rtol=0)

"""Adapter folders: what HF PEFT wrote computes here what it computes there, and what is written here is PEFT's."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.inference.merge import merge
from sft.testing import load

CASES = {
    "llama-lora-all-linear": "llama-tied-gqa",
    "llama-lora-qv-rs": "llama-tied-gqa",
    "qwen2-lora-all-linear": "qwen2-untied",
    "qwen2-lora-qv-rs": "qwen2-untied",
}
SCALINGS = {"lora-all-linear": 8 / 4, "lora-qv-rs": 8 / math.sqrt(4)}

# Between PEFT and this: float32 noise of 1e-5 at logits of up to 7; half the scale moves some logit by 0.05.
TOLERANCE = 1e-4


def quiet(text: str) -> None:
    pass


def lora_layers(model: Any) -> dict[str, Any]:
    """Adapted layers by their name in PEFT's files."""
    return {"base_model.model." + path: layer for path, layer in model.named_sublayers() if hasattr(layer, "lora_A")}


# --- what PEFT wrote ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_gives_pefts_logits(paddle: Any, models: Path, peft: Path, logits_of: Any, case: str) -> None:
    expected = load_file(peft / case / "reference.safetensors")
    base = models / CASES[case]
    model = load(base, peft / case)
    np.testing.assert_allclose(logits_of(model, expected["input_ids"]), expected["logits"], atol=TOLERANCE, rtol=0)
    plain = logits_of(load(base), expected["input_ids"])
    assert np.abs(plain - expected["logits"]).max() > 0.05  # the adapter is seen


@pytest.mark.parametrize("case", CASES)
def test_scaling_and_rank_are_read_from_the_config(paddle: Any, models: Path, peft: Path, case: str) -> None:
    layers = lora_layers(load(models / CASES[case], peft / case))
    assert len(layers) == (14 if "all-linear" in case else 4)
    assert {layer.scaling for layer in layers.values()} == {SCALINGS[case.partition("-")[2]]}
    assert {layer.rank for layer in layers.values()} == {4}


@pytest.mark.parametrize("case", CASES)
def test_merging_gives_pefts_merged_model(
    paddle: Any, models: Path, peft: Path, tmp_path: Path, logits_of: Any, case: str
) -> None:
    expected = load_file(peft / case / "reference.safetensors")
    base, merged = models / CASES[case], tmp_path / "merged"
    changed = merge(str(base), peft / case, merged, quiet)
    assert changed == (14 if "all-linear" in case else 4)
    found = logits_of(load(merged), expected["input_ids"])
    np.testing.assert_allclose(found, expected["merged_logits"], atol=TOLERANCE, rtol=0)
    # The same sums in another order: relative to the largest logit, float32 noise alone.
    adapted = logits_of(load(base, peft / case), expected["input_ids"])
    assert np.abs(found - adapted).max() < 1e-5 * np.abs(adapted).max()
    # In Hugging Face's layout as the base is, with the tokenizer.
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert (merged / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("case", ["llama-lora-all-linear", "llama-lora-qv-rs"])
def test_a_merged_weight_is_w_plus_s_b_a(paddle: Any, models: Path, peft: Path, tmp_path: Path, case: str) -> None:
    """In Hugging Face's layout: W [out, in] + s·B [out, r]·A [r, in], in float64."""
    base, merged = models / CASES[case], tmp_path / "merged"
    merge(str(base), peft / case, merged, quiet)
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    tensors = load_file(peft / case / "adapter_model.safetensors")
    scaling = SCALINGS[case.partition("-")[2]]
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in tensors:
            assert after[name].tobytes() == weight.tobytes(), name
            continue
        a, b = (tensors[f"{key}.lora_{half}.weight"].astype(np.float64) for half in "AB")
        np.testing.assert_allclose(after[name], weight + scaling * b @ a, atol=1e-6, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", ["llama-lora-all-linear", "qwen2-lora-all-linear"])
def test_loss_and_gradients_are_pefts(adapt: Any, models: Path, peft: Path, case: str) -> None:
    """Through the attention and the loss of training. Gradients are 1e-3 to 1 in size, float32 noise is 1e-6."""
    from sft.training.loss import batch_loss

    run = adapt(model_name_or_path=str(models / CASES[case]), lora_path=str(peft / case))
    expected = load_file(peft / case / "gradients.safetensors")
    ids, labels = expected.pop("input_ids"), expected.pop("labels")
    rows = [[sft.Example(*pair)] for pair in zip(ids, labels, strict=True)]
    loss = batch_loss(run.model, sft.assemble(rows, 0)) / 15
    loss.backward()
    assert float(loss) == pytest.approx(float(expected.pop("loss")[0]), rel=1e-5)
    found = {
        f"{name}.lora_{half}.weight": getattr(layer, f"lora_{half}").grad.numpy().T
        for name, layer in lora_layers(run.model).items()
        for half in "AB"
    }
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, atol=5e-6, rtol=1e-4, err_msg=name)


def test_patterns_of_a_peft_config_count(paddle: Any, models: Path, variant: Any) -> None:
    folder = variant(
        alpha_pattern={"q_proj": 16, r"layers\.1\.mlp\.up_proj": 2},
        r=2,
        rank_pattern={".*_proj": 4},
        lora_alpha=8,
    )
    for name, layer in lora_layers(load(models / "llama-tied-gqa", folder)).items():
        special = {"q_proj": 16, "layers.1.mlp.up_proj": 2}
        alpha = next((value for pattern, value in special.items() if name.endswith(pattern)), 8)
        assert layer.scaling == alpha / 4, name


def test_an_adapter_with_patterns_gives_pefts_logits(
    paddle: Any, models: Path, peft: Path, tmp_path: Path, logits_of: Any
) -> None:
    expected = load_file(peft / PATTERNS / "reference.safetensors")
    base, merged = models / "llama-tied-gqa", tmp_path / "merged"
    merge(str(base), peft / PATTERNS, merged, quiet)
    for model, name in ((load(base, peft / PATTERNS), "logits"), (load(merged), "merged_logits")):
        np.testing.assert_allclose(logits_of(model, expected["input_ids"]), expected[name], atol=TOLERANCE, rtol=0)


def test_a_bfloat16_adapter_is_read(paddle: Any, models: Path, variant: Any) -> None:
    import ml_dtypes

    def halve(tensors: dict[str, np.ndarray]) -> None:
        tensors.update({name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()})

    folder = variant(halve)
    tensors = load_file(folder / "adapter_model.safetensors")
    layers = lora_layers(load(models / "llama-tied-gqa", folder))
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    for name, layer in layers.items():
        np.testing.assert_array_equal(layer.lora_A.numpy(), tensors[f"{name}.lora_A.weight"].astype(np.float32).T)


@pytest.mark.parametrize("start", [False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_with_another_start_over_its_base_is_read(
    paddle: Any, models: Path, peft: Path, variant: Any, logits_of: Any, start: Any
) -> None:
    expected = load_file(peft / "llama-lora-all-linear" / "reference.safetensors")
    found = logits_of(load(models / "llama-tied-gqa", variant(init_lora_weights=start)), expected["input_ids"])
    np.testing.assert_allclose(found, expected["logits"], atol=TOLERANCE, rtol=0)


# --- what is written ----------------------------------------------------------------------------------------


def test_what_a_run_writes_has_pefts_keys_shapes_and_config(train: Any, peft: Path, tmp_path: Path) -> None:
    train(lora_rank=4, lora_alpha=8)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    expected = load_file(peft / "llama-lora-all-linear" / "adapter_model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in written.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    of_peft = json.loads((peft / "llama-lora-all-linear" / "adapter_config.json").read_text())
    assert set(config) <= set(of_peft)
    differ = {"base_model_name_or_path"}
    assert {k: v for k, v in config.items() if k not in differ} == {k: of_peft[k] for k in config if k not in differ}
    assert set(config) >= {"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules", "bias"}


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_rank": 3, "lora_alpha": 5.5}, {"lora_target_modules": ["v_proj"]}, {"lora_dropout": 0.5}],
    ids=["default", "odd", "v_proj", "dropout"],
)
def test_a_written_adapter_over_a_fresh_base_is_the_trained_model(
    train: Any, models: Path, tmp_path: Path, logits_of: Any, looking: Any, input_ids: Any, settings: dict[str, Any]
) -> None:
    """Bit by bit; and merged, up to float32 noise."""
    look, trained = looking
    train(plugins=(look,), **settings)
    base = models / "llama-tied-gqa"
    np.testing.assert_array_equal(logits_of(load(base, tmp_path / "out"), input_ids), trained[0])
    assert np.abs(logits_of(load(base), input_ids) - trained[0]).max() > 0.01
    merge(str(base), tmp_path / "out", tmp_path / "merged", quiet)
    merged = logits_of(load(tmp_path / "merged"), input_ids)
    assert np.abs(merged - trained[0]).max() < 1e-5 * np.abs(trained[0]).max()


@pytest.mark.parametrize("case", ["llama-lora-all-linear", "llama-lora-qv-rs"])
def test_a_run_goes_on_from_an_adapter(
    train: Any, adapt: Any, models: Path, peft: Path, tmp_path: Path, logits_of: Any, case: str
) -> None:
    """It begins with PEFT's weights and scaling, and what it writes means the same over there."""
    expected = load_file(peft / case / "reference.safetensors")
    run = adapt(lora_path=str(peft / case))
    found = logits_of(run.model, expected["input_ids"])
    np.testing.assert_allclose(found, expected["logits"], atol=TOLERANCE, rtol=0)
    tensors = load_file(peft / case / "adapter_model.safetensors")
    trained = {name for name, parameter in run.model.named_parameters() if not parameter.stop_gradient}
    assert len(trained) == len(tensors)

    train(lora_path=str(peft / case), learning_rate=0.0)  # nothing is learned: what comes out is what went in
    config, of_peft = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "out", peft / case)
    )
    for key in ("r", "lora_alpha", "use_rslora", "target_modules"):
        assert config[key] == of_peft[key], key
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(written[name].tobytes() == tensors[name].tobytes() for name in tensors)


def by_peft(config: dict[str, Any], target: str) -> tuple[int, float]:
    """Rank and scaling of a target as PEFT reads them (``get_pattern_key`` and ``update_layer`` of peft 0.21)."""

    def pattern(key: str, default: Any) -> Any:
        patterns = config.get(key) or {}
        found = next((one for one in patterns if re.match(rf"(.*\.)?({one})$", target)), None)
        return default if found is None else patterns[found]

    rank, alpha = pattern("rank_pattern", config["r"]), pattern("alpha_pattern", config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


PATTERNS = "llama-lora-patterns"
"""Ranks 2 and 4, scalings 0.5 to 6."""


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
def test_a_run_goes_on_from_an_adapter_of_several_ranks_and_scalings(
    train: Any, models: Path, peft: Path, tmp_path: Path, adapter_variant: Any, logits_of: Any, changes: dict[str, Any]
) -> None:
    """What it writes means the same to PEFT, for each layer; and over its base the logits are PEFT's."""
    folder = adapter_variant(PATTERNS, **changes)
    said: list[str] = []
    train(lora_path=str(folder), learning_rate=0.0, say=said.append)
    config, of_peft = (json.loads((one / "adapter_config.json").read_text()) for one in (tmp_path / "out", folder))
    tensors, written = (load_file(one / "adapter_model.safetensors") for one in (folder, tmp_path / "out"))
    assert written.keys() == tensors.keys()
    assert all(written[name].tobytes() == tensors[name].tobytes() for name in tensors)
    targets = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    assert len(targets) == 6
    for target in targets:
        rank, scaling = by_peft(config, target)
        expected = by_peft(of_peft, target)
        assert (rank, scaling) == (expected[0], pytest.approx(expected[1], rel=1e-12)), target
    assert len({by_peft(of_peft, target) for target in targets}) == 5
    assert config["use_rslora"] == of_peft["use_rslora"]
    if not changes:
        assert "lora: 6 layers, ranks 2 to 4, scalings 0.5 to 6" in said
        expected = load_file(folder / "reference.safetensors")
        found = logits_of(load(models / "llama-tied-gqa", tmp_path / "out"), expected["input_ids"])
        np.testing.assert_allclose(found, expected["logits"], atol=TOLERANCE, rtol=0)


def test_layers_of_several_ranks_learn(train: Any, peft: Path) -> None:
    summary = train(lora_path=str(peft / PATTERNS))
    assert summary.eval_loss_after < summary.eval_loss_before - 0.05


def test_going_on_learns(train: Any, peft: Path) -> None:
    summary = train(lora_path=str(peft / "llama-lora-all-linear"))
    assert summary.eval_loss_after < summary.eval_loss_before - 0.05

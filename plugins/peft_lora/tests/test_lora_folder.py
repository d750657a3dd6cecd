"""Adapter folders: what HF PEFT wrote computes here what it computes there, and what is written here is PEFT's."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft import adapters
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
    return {
        "base_model.model." + path.replace("llama.", "model.", 1).replace("qwen2.", "model.", 1): layer
        for path, layer in model.named_sublayers()
        if hasattr(layer, "lora_A")
    }


@pytest.fixture
def variant(adapter_variant: Callable[..., Path]) -> Callable[..., Path]:
    return partial(adapter_variant, "llama-lora-all-linear")


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
    changed = adapters.merge(str(base), peft / case, merged, quiet)
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
    adapters.merge(str(base), peft / case, merged, quiet)
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
    from sft.training.strategy import batch_loss

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
    adapters.merge(str(base), peft / PATTERNS, merged, quiet)
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
    adapters.merge(str(base), tmp_path / "out", tmp_path / "merged", quiet)
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


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("target_parameters", ["experts.weight"]),
        ("use_qalora", True),
    ],
)
def test_more_than_lora_is_refused_and_not_left_out(
    train: Any, models: Path, variant: Any, tmp_path: Path, key: str, value: Any
) -> None:
    """By everything that reads an adapter: inference, merging and training."""
    folder = variant(**{key: value})
    base, message = models / "llama-tied-gqa", rf"adapter: {key} = .* is more than LoRA"
    with pytest.raises(sft.UsageError, match=message):
        load(base, folder)
    with pytest.raises(sft.UsageError, match=message):
        adapters.merge(str(base), folder, tmp_path / "merged", quiet)
    with pytest.raises(sft.UsageError, match=message):
        train(lora_path=str(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_an_adapter_over_a_base_that_its_start_changed_is_refused(
    train: Any, models: Path, variant: Any, tmp_path: Path, start: str
) -> None:
    """PEFT writes W − s·B₀·A₀ nowhere; over W the adapter would add A₀ and B₀ once more."""
    folder = variant(init_lora_weights=start)
    base = models / "llama-tied-gqa"
    message = rf"adapter: init_lora_weights = '{start}' changed the base .* path_initial_model_for_weight_conversion"
    with pytest.raises(sft.UsageError, match=message):
        load(base, folder)
    with pytest.raises(sft.UsageError, match=message):
        adapters.merge(str(base), folder, tmp_path / "merged", quiet)
    with pytest.raises(sft.UsageError, match=message):
        train(lora_path=str(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize("start", [False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_with_another_start_over_its_base_is_read(
    paddle: Any, models: Path, peft: Path, variant: Any, logits_of: Any, start: Any
) -> None:
    expected = load_file(peft / "llama-lora-all-linear" / "reference.safetensors")
    found = logits_of(load(models / "llama-tied-gqa", variant(init_lora_weights=start)), expected["input_ids"])
    np.testing.assert_allclose(found, expected["logits"], atol=TOLERANCE, rtol=0)


A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(B), r"pair of lora_A and lora_B for model\.layers\.0\.mlp\.up_proj is not complete"),
        (lambda t: t.update({B: t[B][:, :2].copy()}), r"layers\.0\.mlp\.up_proj is not complete"),
        (lambda t: t.update({"base_model.model.lm_head.weight": t[A]}), r"lm_head\.weight is not a LoRA weight"),
        (lambda t: t.clear(), "holds no LoRA weights"),
        (lambda t: t.update({A: t[A][:2].copy(), B: t[B][:, :2].copy()}), r"has rank 2, adapter_config\.json says 4"),
    ],
    ids=["half", "ranks-differ", "unknown", "empty", "rank"],
)
def test_damaged_tensors_are_named(
    paddle: Any, models: Path, variant: Any, change: Callable[..., Any], message: str
) -> None:
    folder = variant(change)
    with pytest.raises(sft.UsageError, match=message):
        load(models / "llama-tied-gqa", folder)


@pytest.mark.parametrize(
    ("option", "value"), [("lora_rank", 8), ("lora_rank", 16), ("lora_alpha", 8), ("lora_target_modules", ["q_proj"])]
)
def test_what_the_adapter_decides_is_not_given_beside_it(train: Any, peft: Path, option: str, value: Any) -> None:
    """Whatever its value: the default, given, is an answer too."""
    with pytest.raises(sft.UsageError, match=f"{option} does nothing beside lora_path"):
        train(lora_path=str(peft / "llama-lora-all-linear"), **{option: value})


def test_a_run_does_not_go_on_from_an_adapter_of_another_type(train: Any, variant: Any, tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match="adapter is a LOHA adapter, and plugin lora reads LORA alone"):
        train(lora_path=str(variant(peft_type="LOHA")))
    assert not (tmp_path / "out").exists()


HEAD = "base_model.model.lm_head"
EMBEDDING = "base_model.model.model.embed_tokens"


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ([f"{HEAD}.lora_A.weight", f"{HEAD}.lora_B.weight"], "lm_head"),
        ([f"{HEAD}.base_layer.weight", f"{HEAD}.lora_A.weight", f"{HEAD}.lora_B.weight"], "lm_head"),
        ([f"{EMBEDDING}.{key}" for key in ("base_layer.weight", "lora_embedding_A", "lora_embedding_B")],
         "model.embed_tokens"),
    ],
    ids=["lm_head", "lm_head and its base", "embed_tokens"],
)  # fmt: skip
def test_an_adapter_of_more_than_blocks_is_refused_by_its_target(
    train: Any, models: Path, variant: Any, tmp_path: Path, keys: list[str], named: str
) -> None:
    """In PEFT's keys, by everything that reads an adapter."""
    folder = variant(lambda tensors: tensors.update(dict.fromkeys(keys, tensors[A])))
    message = f"adapter adapts {named}, and plugin lora adapts Linears of the transformer blocks alone"
    with pytest.raises(sft.UsageError, match=message):
        load(models / "llama-tied-gqa", folder)
    with pytest.raises(sft.UsageError, match=message):
        adapters.merge(str(models / "llama-tied-gqa"), folder, tmp_path / "merged", quiet)
    with pytest.raises(sft.UsageError, match=message):
        train(lora_path=str(folder))


def test_a_folder_without_an_adapter_is_refused(train: Any, models: Path, peft: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(sft.UsageError, match=r"empty holds no adapter \(no adapter_config\.json\)"):
        load(models / "llama-tied-gqa", empty)
    with pytest.raises(sft.UsageError, match="holds no adapter"):
        train(lora_path=str(empty))
    (empty / "adapter_config.json").write_text('{"r": 4}')
    with pytest.raises(sft.UsageError, match="names no peft_type"):
        load(models / "llama-tied-gqa", empty)
    shutil.copy(peft / "llama-lora-qv-rs" / "adapter_config.json", empty)
    with pytest.raises(sft.UsageError, match=r"has no adapter_model\.safetensors"):
        load(models / "llama-tied-gqa", empty)


def test_an_adapter_of_an_unknown_type_names_those_that_are_known(models: Path, variant: Any) -> None:
    with pytest.raises(sft.UsageError, match=r"is a LOHA adapter, which no installed plugin reads \(installed: .*LORA"):
        load(models / "llama-tied-gqa", variant(peft_type="LOHA"))


def test_an_adapter_of_another_model_is_refused(train: Any, models: Path, peft: Path, tmp_path: Path) -> None:
    """llama3-scaled has key and value projections of 32 outputs where the adapter's base has 16."""
    base, adapter = models / "llama3-scaled", peft / "llama-lora-all-linear"
    message = r"has weights for model\.layers\.\d\.self_attn\.[kv]_proj, which do not fit this model"
    with pytest.raises(sft.UsageError, match=message):
        load(base, adapter)
    with pytest.raises(sft.UsageError, match=message):
        train(model_name_or_path=str(base), lora_path=str(adapter))
    with pytest.raises(sft.UsageError, match=r"[kv]_proj is 16x32 and the model's .* is 32x32; it belongs to another"):
        adapters.merge(str(base), adapter, tmp_path / "merged", quiet)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_a_deeper_model_is_refused(paddle: Any, models: Path, variant: Any, tmp_path: Path) -> None:
    deeper = {A.replace("layers.0", "layers.9"): A, B.replace("layers.0", "layers.9"): B}
    folder = variant(lambda tensors: tensors.update({new: tensors[old] for new, old in deeper.items()}))
    base = models / "llama-tied-gqa"
    with pytest.raises(sft.UsageError, match=r"has weights for model\.layers\.9\.mlp\.up_proj"):
        load(base, folder)
    with pytest.raises(sft.UsageError, match=r"no place for \(model\.layers\.9\.mlp\.up_proj\)"):
        adapters.merge(str(base), folder, tmp_path / "merged", quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_merging_does_not_write_into_a_folder_that_holds_something(
    paddle: Any, models: Path, peft: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(sft.UsageError, match="already exists and is not empty"):
        adapters.merge(str(models / "llama-tied-gqa"), peft / "llama-lora-qv-rs", tmp_path, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

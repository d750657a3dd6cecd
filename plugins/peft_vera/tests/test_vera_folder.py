"""VeRA on disk: PEFT's folders compute here what they compute there, what is written is PEFT's, and nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.inference.merge import merge
from sft.testing import load, needs

CASES = ["llama-vera-all-linear", "llama-vera-qv"]

# Between PEFT and this: float32 noise of 1e-5 at logits of up to 7; the adapter moves some logit by 3.8.
TOLERANCE = 1e-4


def quiet(text: str) -> None:
    pass


@pytest.fixture
def base(base_model: Path) -> Path:
    return base_model


@pytest.fixture
def variant(adapter_variant: Callable[..., Path]) -> Callable[..., Path]:
    return partial(adapter_variant, "llama-vera-all-linear")


# --- what PEFT wrote ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_gives_pefts_logits(paddle: Any, base: Path, peft: Path, logits_of: Any, case: str) -> None:
    expected = load_file(peft / case / "reference.safetensors")
    found = logits_of(load(base, peft / case), expected["input_ids"])
    np.testing.assert_allclose(found, expected["logits"], atol=TOLERANCE, rtol=0)
    assert np.abs(logits_of(load(base), expected["input_ids"]) - expected["logits"]).max() > 3


@pytest.mark.parametrize("case", CASES)
def test_merging_gives_pefts_merged_model(
    paddle: Any, base: Path, peft: Path, tmp_path: Path, logits_of: Any, case: str
) -> None:
    expected = load_file(peft / case / "reference.safetensors")
    changed = merge(str(base), peft / case, tmp_path / "merged", quiet)
    assert changed == (14 if "all-linear" in case else 4)
    found = logits_of(load(tmp_path / "merged"), expected["input_ids"])
    np.testing.assert_allclose(found, expected["merged_logits"], atol=TOLERANCE, rtol=0)
    adapted = logits_of(load(base, peft / case), expected["input_ids"])
    assert np.abs(found - adapted).max() < 1e-5 * np.abs(adapted).max()


@pytest.mark.parametrize("case", CASES)
def test_a_merged_weight_is_w_plus_b_b_d_a(paddle: Any, base: Path, peft: Path, tmp_path: Path, case: str) -> None:
    """In Hugging Face's layout: W [out, in] + diag(b)·B[:out]·diag(d)·A[:, :in], in float64."""
    merge(str(base), peft / case, tmp_path / "merged", quiet)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    tensors = {n: t.astype(np.float64) for n, t in load_file(peft / case / "adapter_model.safetensors").items()}
    A, B = tensors["base_model.vera_A"], tensors["base_model.vera_B"]
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.vera_lambda_b" not in tensors:
            assert after[name].tobytes() == weight.tobytes(), name
            continue
        b, d = tensors[f"{key}.vera_lambda_b"], tensors[f"{key}.vera_lambda_d"]
        out, size = weight.shape
        update = b[:, None] * ((B[:out] * d) @ A[:, :size])
        np.testing.assert_allclose(after[name], weight + update, atol=1e-6, rtol=1e-6, err_msg=name)


# --- what is written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "asked"), [(CASES[0], []), (CASES[1], ["q_proj", "v_proj"])])
def test_what_a_run_writes_has_pefts_keys_shapes_and_config(
    train: Any, peft: Path, tmp_path: Path, case: str, asked: list[str]
) -> None:
    train(vera_rank=4, seed=31, vera_target_modules=asked)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    expected = load_file(peft / case / "adapter_model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in written.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    of_peft = json.loads((peft / case / "adapter_config.json").read_text())
    for values in (config, of_peft):
        values.pop("base_model_name_or_path")
    assert config.pop("projection_prng_key") == 31
    assert config == {key: of_peft[key] for key in config}
    assert set(config) >= {"peft_type", "task_type", "r", "save_projection", "target_modules", "d_initial"}


def test_where_only_some_layers_of_a_kind_are_adapted_the_config_names_each(train: Any, tmp_path: Path) -> None:
    """PEFT reads ``q_proj`` as every q_proj there is."""
    train(vera_target_modules=[r".*layers\.1\.self_attn\.[qv]_proj"], max_steps=1)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.1.self_attn.{kind}_proj" for kind in "qv"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"vera_rank": 3, "vera_d_initial": 0.5}, {"vera_target_modules": ["v_proj"]}, {"vera_dropout": 0.5}],
    ids=["default", "odd", "v_proj", "dropout"],
)
def test_a_written_adapter_over_a_fresh_base_is_the_trained_model(
    train: Any,
    base: Path,
    tmp_path: Path,
    logits_of: Any,
    looking: Any,
    input_ids: np.ndarray,
    settings: dict[str, Any],
) -> None:
    """Bit by bit; and merged, up to float32 noise."""
    look, trained = looking
    train(plugins=(look,), **settings)
    np.testing.assert_array_equal(logits_of(load(base, tmp_path / "out"), input_ids), trained[0])
    assert np.abs(logits_of(load(base), input_ids) - trained[0]).max() > 0.01
    merge(str(base), tmp_path / "out", tmp_path / "merged", quiet)
    merged = logits_of(load(tmp_path / "merged"), input_ids)
    assert np.abs(merged - trained[0]).max() < 1e-5 * np.abs(trained[0]).max()


@needs("nf4")
def test_over_a_quantized_base_too(
    train: Any, base: Path, tmp_path: Path, logits_of: Any, looking: Any, input_ids: np.ndarray
) -> None:
    look, trained = looking
    train(plugins=(look,), plugin=["vera", "nf4"])
    adapted = load(base, tmp_path / "out")
    np.testing.assert_array_equal(logits_of(adapted, input_ids), trained[0])
    merge(str(base), tmp_path / "out", tmp_path / "merged", quiet)
    merged = logits_of(load(tmp_path / "merged"), input_ids)
    assert np.abs(merged - trained[0]).max() < 1e-5 * np.abs(trained[0]).max()


def test_trap_a_reload_in_a_fresh_process_is_exact(
    train: Any, base: Path, tmp_path: Path, logits_of: Any, looking: Any, input_ids: np.ndarray, fresh_logits: Any
) -> None:
    """Elsewhere reloading loses A: here the pair is in the folder, whatever the seed of the process that reads it."""
    look, trained = looking
    train(plugins=(look,), seed=5)
    np.testing.assert_array_equal(fresh_logits(base, tmp_path / "out", input_ids), trained[0])


def test_a_resumed_run_is_the_same_bit_by_bit(train: Any, tmp_path: Path) -> None:
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "vera_dropout": 0.2}
    train("whole", **settings, save_strategy="steps", save_steps=3)
    train("resumed", **settings, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(whole[name].tobytes() == resumed[name].tobytes() for name in whole)


def test_a_resumed_run_goes_on_over_the_checkpoints_pair(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another numpy may draw other numbers from the same seed; the trained vectors belong to the old ones."""
    from sft_peft_vera import vera

    train("whole", max_steps=4, save_strategy="steps", save_steps=2)
    draw = vera._kaiming
    monkeypatch.setattr(vera, "_kaiming", lambda *given: 0.5 * draw(*given))
    train("resumed", max_steps=4, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    whole, resumed = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


# --- what is refused ----------------------------------------------------------------------------------------

B = "base_model.model.model.layers.0.mlp.up_proj.vera_lambda_b"
D = B.replace("lambda_b", "lambda_d")
PAIR = "base_model.vera_A", "base_model.vera_B"


@pytest.mark.parametrize("missing", [PAIR[:1], PAIR[1:], PAIR], ids=["A", "B", "both"])
def test_trap_projections_that_were_not_saved_are_refused_and_not_drawn_again(
    paddle: Any, base: Path, variant: Any, tmp_path: Path, missing: tuple[str, ...]
) -> None:
    folder = variant(lambda tensors: [tensors.pop(name) for name in missing], save_projection=False)
    message = r"adapter does not hold vera_A and vera_B; save the adapter with save_projection\."
    with pytest.raises(sft.UsageError, match=message):
        load(base, folder)
    with pytest.raises(sft.UsageError, match=message):
        merge(str(base), folder, tmp_path / "merged", quiet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(B), r"the vectors of model\.layers\.0\.mlp\.up_proj are not complete"),
        (lambda t: t.pop(D), r"the vectors of model\.layers\.0\.mlp\.up_proj are not complete"),
        (lambda t: t.update({D: t[D][:2].copy()}), r"the vectors of model\.layers\.0\.mlp\.up_proj are not complete"),
        (lambda t: t.update({B: t[B][:, None].copy()}), r"layers\.0\.mlp\.up_proj are not complete"),
        (lambda t: t.update({"base_model.model.model.norm.weight": t[B]}), r"norm\.weight is not a VeRA weight"),
        (lambda t: [t.pop(n) for n in list(t) if n not in PAIR], "holds no VeRA vectors"),
        (lambda t: t.update({PAIR[1]: t[PAIR[1]][:, :3].copy()}), "shapes of vera_A and vera_B do not belong together"),
        (lambda t: t.update({PAIR[0]: t[PAIR[0]][0].copy()}), "shapes of vera_A and vera_B do not belong together"),
    ],
    ids=["no-b", "no-d", "short-d", "matrix-b", "unknown", "empty", "ranks-differ", "vector-A"],
)
def test_damaged_tensors_are_named(
    paddle: Any, base: Path, variant: Any, change: Callable[..., Any], message: str
) -> None:
    with pytest.raises(sft.UsageError, match=message):
        load(base, variant(change))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({PAIR[0]: t[PAIR[0]][:, :40].copy()}),
        lambda t: t.update({PAIR[1]: t[PAIR[1]][:20].copy()}),
        lambda t: t.update({B: t[B][:20].copy()}),
    ],
    ids=["narrow-A", "narrow-B", "short-b"],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused(
    paddle: Any, base: Path, variant: Any, tmp_path: Path, change: Callable[..., Any]
) -> None:
    folder = variant(change)
    with pytest.raises(sft.UsageError, match=r"has vectors for model\.layers\.0\.\S+, which do not fit this model"):
        load(base, folder)
    with pytest.raises(sft.UsageError, match=r"does not fit the model's model\.layers\.0\.\S+; it belongs to another"):
        merge(str(base), folder, tmp_path / "merged", quiet)


def test_an_adapter_of_a_deeper_model_is_refused(paddle: Any, base: Path, variant: Any, tmp_path: Path) -> None:
    deeper = {B.replace("layers.0", "layers.9"): B, D.replace("layers.0", "layers.9"): D}
    folder = variant(lambda tensors: tensors.update({new: tensors[old] for new, old in deeper.items()}))
    with pytest.raises(sft.UsageError, match=r"has vectors for model\.layers\.9\.mlp\.up_proj"):
        load(base, folder)
    with pytest.raises(sft.UsageError, match=r"no place for \(model\.layers\.9\.mlp\.up_proj\)"):
        merge(str(base), folder, tmp_path / "merged", quiet)


def test_a_rank_that_is_not_the_configs_is_refused(paddle: Any, base: Path, variant: Any) -> None:
    with pytest.raises(sft.UsageError, match=r"vera_A has rank 4, adapter_config\.json says 8"):
        load(base, variant(r=8))


@pytest.mark.parametrize(("key", "value"), [("bias", "all"), ("fan_in_fan_out", True)])
def test_more_than_vera_is_refused_and_not_left_out(
    paddle: Any, base: Path, variant: Any, key: str, value: Any
) -> None:
    with pytest.raises(sft.UsageError, match=rf"adapter: {key} = .* is more than VeRA"):
        load(base, variant(**{key: value}))


@needs("lora")
def test_lora_and_vera_are_refused_in_one_sentence(train: Any, tmp_path: Path) -> None:
    message = r"^Plugins vera \(.*\) and lora \(.*\) cannot work together; leave one of them out\.$"
    with pytest.raises(sft.UsageError, match=message):
        train(plugin=["lora", "vera"])
    assert not (tmp_path / "out").exists()


@needs("lora")
def test_an_option_of_lora_beside_vera_is_not_answered_with_lora(train: Any, tmp_path: Path) -> None:
    """Which could not be added."""
    message = (
        r"^Unknown setting lora_path; .* plugin lora, that cannot work together with vera: leave one of them out\.$"
    )
    with pytest.raises(sft.UsageError, match=message):
        train(plugin=["vera"], lora_path=str(tmp_path))

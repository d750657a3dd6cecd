"""config.json: every spelling of what is supported gives one meaning, and what cannot be computed is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_folders import (
    TOLERANCE,
    architecture_of,
    backend_logits,
    config_of,
    largest_difference,
    load,
    own_logits,
    reference,
)

import sft

# --- the rotary embedding's spellings -----------------------------------------------------------------------


LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_parameters": None},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}, "rope_parameters": None},
        {"rope_scaling": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}, "rope_parameters": None},
        {"rope_theta": 500000.0, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
    ],
    ids=["transformers-4", "type", "theta-in-scaling", "theta-beside-parameters"],
)
def test_every_spelling_of_a_scaling_gives_the_same_config_and_logits(
    paddle: Any, models: Path, variant: Callable[..., Path], spelling: dict[str, Any]
) -> None:
    folder = variant("llama3-scaled", **spelling)
    assert architecture_of(config_of(folder)) == architecture_of(config_of(models / "llama3-scaled"))
    input_ids, logits = reference(folder)
    assert largest_difference(own_logits(load(folder), input_ids), logits) < TOLERANCE


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-tied-sharded"])
def test_trap_a_plain_theta_is_read_from_either_spelling(paddle: Any, models: Path, case: str) -> None:
    values = config_of(models / case)
    theta = values["rope_parameters"]["rope_theta"]
    old = {key: value for key, value in values.items() if key != "rope_parameters"}
    expected = architecture_of(values)
    assert expected.rotaries[0].base == theta != 10000.0
    assert architecture_of({**old, "rope_theta": theta, "rope_scaling": None}) == expected


def test_without_any_theta_it_is_10000_as_in_transformers(paddle: Any, models: Path) -> None:
    values = {key: value for key, value in config_of(models / "llama-untied").items() if key != "rope_theta"}
    assert architecture_of(values).rotaries[0].base == 10000.0


def test_a_linear_scaling_divides_positions(paddle: Any, models: Path, variant: Callable[..., Path]) -> None:
    """Positions twice as far apart under factor 2 are the plain model's positions."""
    folder = variant("llama-untied", rope_scaling={"type": "linear", "factor": 2.0})
    input_ids, expected = reference(folder)
    model = load(folder)
    length = input_ids.shape[1]
    found = backend_logits(model, input_ids, np.tile(2 * np.arange(length), (len(input_ids), 1)))
    assert largest_difference(found, expected) < TOLERANCE
    assert largest_difference(backend_logits(model, input_ids), expected) > 0.05


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (
            "llama-untied",
            {"rope_scaling": {"rope_type": "spiral", "factor": 4.0}},
            "rotary scaling 'spiral' is not known",
        ),
        (
            "llama-untied",
            {"rope_scaling": {"rope_type": "linear"}},
            r"rope_scaling\.factor as a number above 0, not None",
        ),
        ("llama-untied", {"rope_scaling": [1]}, "rope_scaling as an object or null"),
        ("llama-untied", {"rope_theta": "many"}, "rope_theta as a number above 1, not 'many'"),
        ("llama-untied", {"rope_theta": -1}, "rope_theta as a number above 1, not -1"),
        ("llama-untied", {"rms_norm_eps": "small"}, "rms_norm_eps as a number"),
        ("llama-tied-gqa", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "by layer type"),
        (
            "llama-tied-gqa",
            {"rope_parameters": {"partial_rotary_factor": 2}},
            "partial_rotary_factor as a number above 0",
        ),
        ("llama-untied", {"hidden_act": "relu"}, "hidden_act as one of silu, swish, not 'relu'"),
        ("llama-untied", {"quantization_config": {"bits": 4}}, "quantization_config = "),
        (
            "llama-untied",
            {"num_key_value_heads": 3},
            "num_key_value_heads as a divisor of num_attention_heads 4, not 3",
        ),
        ("llama-untied", {"model_type": "mamba"}, "model_type 'mamba' is not a family.*llama, qwen2, mistral, gemma"),
        ("llama-untied", {"model_type": ["llama"]}, r"model_type \['llama'\] is not a family"),
        ("llama-untied", {"model_type": None}, "model_type None"),
        ("gemma-tied", {"hidden_act": "silu"}, "hidden_act as one of"),
        ("gemma-tied", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("llama-untied", {"hidden_size": None}, "hidden_size as a whole number"),
        ("llama-untied", {"num_attention_heads": 0}, "num_attention_heads"),
        ("llama-untied", {"max_position_embeddings": "2k"}, "max_position_embeddings as a whole number above 0"),
        ("gemma-tied", {"head_dim": "x"}, "head_dim as a whole number above 0, not 'x'"),
        ("mistral-gqa", {"sliding_window": "many"}, "sliding_window as a whole number above 0, not 'many'"),
        ("mistral-gqa", {"sliding_window": 0}, "sliding_window as a whole number above 0, not 0"),
    ],
)
def test_a_value_that_cannot_be_computed_is_refused_by_name(
    models: Path, case: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(sft.UsageError, match=rf"^the-model: .*{message}"):
        architecture_of({**config_of(models / case), **changes}, "the-model")


@pytest.mark.parametrize(
    ("text", "message"), [(None, "has no config.json"), ("{", "is not valid JSON"), ("[]", "must hold one JSON object")]
)
def test_a_damaged_config_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    from sft.models.loading import open_model

    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(sft.UsageError, match=message):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_long_sequence_strategies": True}, "use_long_sequence_strategies = True is not computed here"),
        ({"alibi": True}, "alibi = True is not computed here"),
        ({"rms_norm_eps": None}, "must give rms_norm_eps as a number above 0, not None"),
        ({"rms_norm_eps": -1e-6}, "must give rms_norm_eps as a number above 0, not -1e-06"),
        ({"rope_parameters": None, "rope_theta": -1.0}, "rope_theta as a number above 1, not -1.0"),
        ({"rope_parameters": None, "rope_theta": 0}, "rope_theta as a number above 1, not 0"),
        ({"rope_parameters": None, "rope_theta": [1]}, r"rope_theta as a number above 1, not \[1\]"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rotary scaling \['linear'\] is not known"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, "gives no angles that are numbers"),
        ({"head_dim": 7}, "gives 7 of the 7 of a head to it; correct head_dim"),
    ],
)
def test_values_that_no_model_has_are_refused(models: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(sft.UsageError, match=rf"^the-model: .*{message}"):
        architecture_of({**config_of(models / "llama-tied-gqa"), **changes}, "the-model")


def test_what_says_nothing_of_the_decoder_is_not_read(models: Path) -> None:
    """PaddleNLP keeps how a model was computed beside what it is; others keep what is of other models."""
    values = config_of(models / "llama-tied-gqa")
    other = {"self": 1, "num_labels": "x", "id2label": 5, "tensor_parallel_degree": 2, "sequence_parallel": True}
    other.update(recompute=True, use_flash_attention=True, fuse_attention_qkv=True, pipeline_parallel_degree=2)
    assert architecture_of({**values, **other}) == architecture_of(values)


@pytest.mark.parametrize("case", ["llama-tied-gqa", "mistral-gqa", "qwen2-untied"])
def test_without_a_number_of_key_value_heads_each_head_has_its_own(models: Path, case: str) -> None:
    """Null says so; what is missing has the family's default, as in transformers."""
    values = config_of(models / case)
    assert architecture_of({**values, "num_key_value_heads": None}).kv_heads == 4


# --- what families have of their own ------------------------------------------------------------------------


@pytest.mark.parametrize("window", [{"sliding_window": None}, {"sliding_window": 1024}, {}], ids=str)
def test_a_mistral_without_a_word_about_its_window_has_4096(models: Path, window: dict[str, Any]) -> None:
    """As in transformers, where only null is none."""
    values = {key: value for key, value in config_of(models / "mistral-gqa").items() if key != "sliding_window"}
    found = architecture_of({**values, **window})
    assert {block.window for block in found.blocks} == {window.get("sliding_window", 4096)}
    assert found.positions == 64


def test_a_record_longer_than_the_sliding_window_is_trained(
    train: Callable[..., Any], variant: Callable[..., Path]
) -> None:
    assert train(model_name_or_path=str(variant("mistral-gqa", sliding_window=16))).steps


@pytest.mark.parametrize(
    "spelling",
    [
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": None},
        {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
    ],
    ids=str,
)
def test_trap_every_spelling_of_gemmas_gelu_is_the_tanh_form(
    paddle: Any, variant: Callable[..., Path], spelling: dict[str, Any]
) -> None:
    """The exact form moves a logit of this case by 0.002."""
    folder = variant("gemma-tied", **spelling)
    input_ids, expected = reference(folder)
    assert largest_difference(own_logits(load(folder), input_ids), expected) < TOLERANCE

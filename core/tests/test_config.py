"""config.json: every spelling of what is supported gives one meaning, and what would be computed wrongly is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_folders import TOLERANCE, backend_logits, config_of, largest_difference, load, own_logits, reference

import sft
from sft.models.config import paddle_config

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
    _, expected = paddle_config(config_of(models / "llama3-scaled"), "here")
    _, found = paddle_config(config_of(folder), "here")
    assert found.to_dict() == expected.to_dict()
    input_ids, logits = reference(folder)
    assert largest_difference(own_logits(load(folder), input_ids), logits) < TOLERANCE


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-tied-sharded"])
def test_trap_a_plain_theta_is_read_from_either_spelling(paddle: Any, models: Path, case: str) -> None:
    values = config_of(models / case)
    theta = values["rope_parameters"]["rope_theta"]
    old = {key: value for key, value in values.items() if key != "rope_parameters"}
    _, expected = paddle_config(values, "here")
    _, found = paddle_config({**old, "rope_theta": theta, "rope_scaling": None}, "here")
    assert expected.rope_theta == theta != 10000.0
    assert found.to_dict() == expected.to_dict()


def test_without_any_theta_it_is_10000_as_in_transformers(paddle: Any, models: Path) -> None:
    values = {key: value for key, value in config_of(models / "llama-untied").items() if key != "rope_theta"}
    assert paddle_config(values, "here")[1].rope_theta == 10000.0


def test_a_linear_scaling_divides_positions(paddle: Any, models: Path, variant: Callable[..., Path]) -> None:
    """Positions twice as far apart under factor 2 are the plain model's positions."""
    from sft.models.attention import DefaultAttention

    folder = variant("llama-untied", rope_scaling={"type": "linear", "factor": 2.0})
    input_ids, expected = reference(folder)
    model = load(folder)
    model.attention = DefaultAttention()
    length = input_ids.shape[1]
    # PaddleNLP's tables reach as far as the row, so it is made twice as long; causality hides the second half.
    twice = np.concatenate([input_ids, input_ids], axis=1)
    plain, apart = (np.concatenate([step * np.arange(length), np.arange(length)]) for step in (1, 2))
    found = backend_logits(model, twice, np.tile(apart, (len(twice), 1)))[:, :length]
    assert largest_difference(found, expected) < TOLERANCE
    found = backend_logits(model, twice, np.tile(plain, (len(twice), 1)))[:, :length]
    assert largest_difference(found, expected) > 0.05


# --- what is refused ----------------------------------------------------------------------------------------


def test_an_explicit_head_dim_is_refused(models: Path) -> None:
    with pytest.raises(sft.UsageError, match=r"llama-headdim: head_dim = 16 is ignored by PaddleNLP"):
        paddle_config(config_of(models / "llama-headdim"), models / "llama-headdim")


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama-untied", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn'"),
        ("llama-tied-gqa", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'"),
        ("qwen2-untied", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "knows default"),
        ("llama-tied-gqa", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "by layer type"),
        ("llama-tied-gqa", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "part of a"),
        ("qwen2-untied", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("llama-untied", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama-untied", {"attention_bias": True}, "attention_bias = True"),
        ("llama-untied", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama-untied", {"quantization_config": {"bits": 4}}, "quantization_config = "),
        (
            "llama-untied",
            {"model_type": "mamba"},
            "model_type 'mamba' has not been verified.*llama, qwen2, mistral, gemma",
        ),
        ("gemma-tied", {"model_type": "gemma2"}, "model_type 'gemma2' has not been verified"),
        ("gemma-tied", {"model_type": "gemma3_text"}, "model_type 'gemma3_text' has not been verified"),
        ("mistral-gqa", {"head_dim": 16}, "head_dim = 16"),
        ("mistral-gqa", {"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ("mistral-gqa", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("mistral-gqa", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rotary scaling 'llama3'"),
        ("gemma-tied", {"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ("gemma-tied", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        ("gemma-tied", {"attention_bias": True}, "attention_bias = True"),
        ("gemma-tied", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("llama-untied", {"model_type": None}, "model_type None"),
        ("llama-untied", {"hidden_size": None}, r"config\.json must give hidden_size as a whole number"),
        ("llama-untied", {"num_attention_heads": 0}, "num_attention_heads"),
        ("llama-untied", {"max_position_embeddings": "2k"}, "give max_position_embeddings as a whole number or null"),
        ("gemma-tied", {"head_dim": "x"}, "give head_dim as a whole number or null, not 'x'"),
        ("mistral-gqa", {"sliding_window": "many"}, "give sliding_window as a whole number or null, not 'many'"),
        ("mistral-gqa", {"sliding_window": 0}, "give sliding_window as a whole number or null, not 0"),
    ],
)
def test_a_setting_that_paddlenlp_would_ignore_is_refused_by_name(
    models: Path, case: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(sft.UsageError, match=rf"^the-model: .*{message}"):
        paddle_config({**config_of(models / case), **changes}, "the-model")


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
        ({"self": 1}, "PaddleNLP's LlamaConfig does not take what config.json says"),
        ({"num_labels": "x"}, "PaddleNLP's LlamaConfig does not take what config.json says"),
        ({"id2label": 5}, "PaddleNLP's LlamaConfig does not take what config.json says"),
        ({"use_long_sequence_strategies": True}, "makes PaddleNLP compute another model"),
        ({"alibi": True}, "makes PaddleNLP compute another model"),
        ({"rms_norm_eps": None}, "must give rms_norm_eps as a number above 0, not None"),
        ({"rms_norm_eps": -1e-6}, "must give rms_norm_eps as a number above 0, not -1e-06"),
        ({"rope_parameters": None, "rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_parameters": None, "rope_theta": [1]}, "something else than numbers above 0"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rotary scaling \['linear'\] is not computed by"),
    ],
)
def test_values_that_no_model_has_are_refused(paddle: Any, models: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(sft.UsageError, match=rf"^the-model: .*{message}"):
        paddle_config({**config_of(models / "llama-tied-gqa"), **changes}, "the-model")


def test_how_paddlenlp_computed_elsewhere_is_no_part_of_the_model(paddle: Any, models: Path) -> None:
    """Its configs keep the degrees of the run that saved them, with which its layers would need other processes."""
    left = {"tensor_parallel_degree": 2, "sequence_parallel": True, "pipeline_parallel_degree": 2, "recompute": True}
    config = paddle_config({**config_of(models / "llama-tied-gqa"), **left}, "here")[1]
    assert (config.tensor_parallel_degree, config.sequence_parallel, config.recompute) == (1, False, False)


# --- what families have of their own ------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama-untied", "mistral-gqa"])
def test_a_head_dim_that_is_the_usual_one_is_accepted(paddle: Any, models: Path, case: str) -> None:
    assert paddle_config({**config_of(models / case), "head_dim": 8}, "here")[1].hidden_size == 32


@pytest.mark.parametrize(
    ("window", "positions"),
    [
        ({"sliding_window": None}, 32768),
        ({"sliding_window": 1024}, 1024),
        ({"sliding_window": 65536}, 32768),
        ({}, 4096),
    ],
    ids=str,
)
def test_trap_a_mistral_reads_no_further_than_its_sliding_window(
    paddle: Any, models: Path, window: dict[str, Any], positions: int
) -> None:
    """PaddleNLP ignores the window; a document that it holds does not feel it. Absent means 4096 in transformers."""
    values = {key: value for key, value in config_of(models / "mistral-gqa").items() if key != "sliding_window"}
    values["max_position_embeddings"] = 32768
    assert paddle_config({**values, **window}, "here")[1].max_position_embeddings == positions


def test_a_record_longer_than_the_sliding_window_is_refused(
    train: Callable[..., Any], variant: Callable[..., Path]
) -> None:
    folder = variant("mistral-gqa", sliding_window=16)
    with pytest.raises(
        sft.UsageError, match=r"A record has \d+ tokens and .* at most 17, .*sliding_window.*--max_length 17\."
    ):
        train(model_name_or_path=str(folder))


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

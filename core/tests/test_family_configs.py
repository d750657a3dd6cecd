"""What a config.json of a family may leave out or say in two ways, and how it is written beside a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sft
from sft.models.architecture import Architecture
from sft.models.config import hf_config

FIXTURES = Path(__file__).parent / "fixtures"
PUBLISHED = {
    name: entry["config"]
    for name, entry in json.loads((FIXTURES / "published.json").read_text(encoding="utf-8")).items()
}
TINY = {path.parent.name: json.loads(path.read_text()) for path in sorted(FIXTURES.glob("families/*/config.json"))}


def read(config: dict[str, Any]) -> Architecture:
    from sft.models.families.known import family_of

    return family_of(config, "here").architecture(config, "here")


@pytest.mark.parametrize("config", [*TINY.values(), *PUBLISHED.values()], ids=[*TINY, *PUBLISHED])
def test_a_config_that_is_written_is_read_alike(config: dict[str, Any]) -> None:
    written = json.loads(json.dumps(hf_config(config, "float32")))
    assert read(written) == read(config)


def test_gemma3s_base_for_windows_is_written_for_transformers_4() -> None:
    written = hf_config(TINY["gemma3"], "float32")
    assert written["rope_local_base_freq"] == 1e4
    assert written["rope_theta"] == 1e6
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    old = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert read(old) == read(TINY["gemma3"])


def test_phis_factors_are_written_as_transformers_4_takes_them() -> None:
    """It refuses a rope_scaling of other than three names, and reads the shares and lengths from beside it."""
    written = hf_config(TINY["phi3-longrope"], "float32")
    assert written["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert (written["partial_rotary_factor"], written["original_max_position_embeddings"]) == (0.5, 12)
    old = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert read(old) == read(TINY["phi3-longrope"])
    kept = hf_config(PUBLISHED["microsoft/Phi-4-mini-instruct"], "float32")
    for key in ("rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"):
        assert kept[key] == PUBLISHED["microsoft/Phi-4-mini-instruct"][key]


def test_phis_original_length_is_4096_where_it_is_not_given() -> None:
    config = dict(PUBLISHED["microsoft/Phi-4-mini-instruct"])
    del config["original_max_position_embeddings"]
    assert read(config).rotaries[0].limit == 4096


@pytest.mark.parametrize(
    ("name", "scaling", "longest"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", None, 32768),
        (
            "Qwen/Qwen2.5-7B-Instruct",
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            131072,
        ),
        ("zai-org/GLM-4-32B-0414", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ("meta-llama/Llama-2-7b-hf", {"type": "linear", "factor": 2.0}, 8192),
        ("meta-llama/Llama-2-7b-hf", {"type": "dynamic", "factor": 2.0}, 8192),
        # These name the length that they reach.
        ("meta-llama/Llama-3.1-8B-Instruct", PUBLISHED["meta-llama/Llama-3.1-8B-Instruct"]["rope_scaling"], 131072),
        ("google/gemma-3-1b-it", {"rope_type": "linear", "factor": 8.0}, 32768),
    ],
)
def test_a_scaling_makes_documents_longer(name: str, scaling: dict[str, Any] | None, longest: int) -> None:
    assert read({**PUBLISHED[name], "rope_scaling": scaling}).positions == longest


def test_a_model_of_text_and_images_is_refused_by_what_it_is() -> None:
    config = {"model_type": "gemma3", "text_config": PUBLISHED["google/gemma-3-1b-it"], "vision_config": {}}
    with pytest.raises(sft.UsageError, match="model_type 'gemma3' reads more than text"):
        read(config)


@pytest.mark.parametrize("is_same", [True, False])
def test_a_head_beside_a_tied_embedding_counts_only_if_it_is_the_same(
    paddle: Any, tmp_path: Path, is_same: bool
) -> None:
    from sft.models.loading import load_model, open_model

    tensors = load_file(FIXTURES / "families" / "qwen3" / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, 5] += 0.0 if is_same else 1.0
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY["qwen3"]))
    if not is_same:
        with pytest.raises(sft.UsageError, match=r"hold another lm_head\.weight; set tie_word_embeddings false"):
            load_model(open_model(tmp_path))
        (tmp_path / "config.json").write_text(json.dumps({**TINY["qwen3"], "tie_word_embeddings": False}))
    model = load_model(open_model(tmp_path))
    found = model.lm_head.weight.numpy()
    np.testing.assert_array_equal(found if is_same else found.T, head)


def test_a_mistral_with_layer_types_has_windows_in_those_alone() -> None:
    """transformers takes its class Ministral for it."""
    kinds = ["full_attention", "sliding_attention"]
    config = {**TINY["mistral-window"], "num_hidden_layers": 2, "sliding_window": 4}
    assert [block.window for block in read(config).blocks] == [4, 4]
    assert [block.window for block in read({**config, "layer_types": kinds}).blocks] == [None, 4]


@pytest.mark.parametrize("name", sorted(TINY))
def test_heads_that_turn_in_part_are_refused_where_transformers_turns_whole_ones(name: str) -> None:
    """Of its classes those of Phi-3 and GLM-4 alone read the setting; others compute as if it were not there."""
    config = dict(TINY[name])
    config.pop("rope_parameters", None)
    config.update(partial_rotary_factor=0.5, rope_theta=1e4)
    if config["model_type"] in ("phi3", "glm4"):
        assert read(config).rotaries[0].size == read(config).head_size // 2
        return
    with pytest.raises(sft.UsageError, match=r"partial_rotary_factor = 0\.5 is not computed in this family"):
        read(config)


def test_gemma_3_caps_no_scores() -> None:
    with pytest.raises(sft.UsageError, match=r"attn_logit_softcapping = 50\.0 is not computed"):
        read({**TINY["gemma3"], "attn_logit_softcapping": 50.0})


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_more_experts_a_token_than_there_are_are_refused(name: str) -> None:
    with pytest.raises(sft.UsageError, match="num_experts_per_tok as at most the number of experts, 4, not 5"):
        read({**TINY[name], "num_experts_per_tok": 5})

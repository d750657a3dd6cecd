"""Models made up: config.json, weights and their indexes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from bad_inputs.case import MODELS
from hypothesis import strategies as st

from fuzzing.made_up import as_json, mutated, numbers, objects, values, words
from fuzzing.trial import Target

BASE = MODELS / "llama-tied-gqa"
_CONFIG_KEYS = (
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"),
    *("num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "hidden_activation", "sliding_window"),
    *("use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern", "no_rope_layers"),
    *("num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"),
    *("mlp_only_layers", "partial_rotary_factor", "query_pre_attn_scalar", "attn_logit_softcapping", "logits_scaling"),
    *("rope_scaling_type", "rope_scaling_factor", "original_max_position_embeddings", "rope_local_base_freq"),
)
_ROPE = objects(
    ("rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor",
     "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "attention_factor", "truncate"),
    numbers | st.sampled_from(["linear", "dynamic", "llama3", "yarn", "longrope", "default"]) | values,
)  # fmt: skip


def _families() -> list[str]:
    from sft.models.families.known import FAMILIES

    return sorted(FAMILIES)


def read_config(folder: Path, changes: dict[str, Any]) -> Any:
    from sft.models.config import hf_config, with_one_spelling
    from sft.models.config import read_config as read
    from sft.models.families.known import family_of

    config = {**json.loads((BASE / "config.json").read_text()), **changes}
    (folder / "config.json").write_bytes(as_json(config))
    found = read(folder)
    family = family_of(found, folder)
    family.architecture(found, folder)
    family.architecture(with_one_spelling(found), folder)
    return hf_config(found, "float32", family)


def read_weights(folder: Path, content: bytes) -> Any:
    from sft.models.families.known import FAMILIES
    from sft.models.source import ModelFolder, Weights

    (folder / "model.safetensors").write_bytes(content)
    weights = Weights(ModelFolder(folder), FAMILIES["llama"])
    return [weights.read(name) for name in weights]


def _tensors() -> bytes:
    import numpy as np
    from safetensors.numpy import save

    return save({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)}, {"x": "y"})


@st.composite
def headers(draw: Any) -> bytes:
    """A safetensors file whose header is made up."""
    entry = objects(("dtype", "shape", "data_offsets"), values | st.sampled_from(["F32", "I8", "F8_E4M3", "BOOL"]))
    header = draw(st.dictionaries(words, entry | values, max_size=3))
    text = as_json(header)
    size = draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    return struct.pack("<Q", size) + text + bytes(draw(st.integers(0, 64)))


def read_index(folder: Path, content: bytes) -> Any:
    from sft.models.source import ModelFolder, weight_files

    (folder / "model.safetensors.index.json").write_bytes(content)
    return weight_files(ModelFolder(folder))


TARGETS: dict[str, Target] = {
    "config.json": Target(
        objects(_CONFIG_KEYS, numbers | _ROPE | values).flatmap(
            lambda found: st.sampled_from(_families()).map(lambda family: {**found, "model_type": family})
        ),
        read_config,
    ),
    "safetensors, bytes changed": Target(mutated(_tensors()), read_weights),
    "safetensors, header made up": Target(headers(), read_weights),
    "index of weights": Target(
        (objects(("weight_map",), st.dictionaries(words, values, max_size=3) | values)).map(as_json)
        | mutated(b'{"weight_map": {"a": "b.safetensors"}}'),
        read_index,
    ),
}

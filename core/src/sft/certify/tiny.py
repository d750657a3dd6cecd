"""Tiny models of every family that the core knows, of random weights, and a few records to learn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sft.files import save_tensors, write_json
from sft.models.families.known import FAMILIES
from sft.models.loading import build_model, open_model

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

# What each family's config must say beside its shape; a window of a few tokens, and caps that bend, show themselves.
_OWN: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "gemma": {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "gemma2": {**_GEMMA, "sliding_window": 7, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {**_GEMMA, "sliding_window": 7, "sliding_window_pattern": 2},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 48, **_EXPERTS},
    "qwen3_moe": {"num_experts": 4, "norm_topk_prob": True, **_EXPERTS},
    "smollm3": {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
}


def families() -> list[str]:
    """The ``model_type`` of each family that the core has."""
    return list(FAMILIES)


def make(folder: Path, family: str = "llama", seed: int = 0, **config: Any) -> Path:
    """Write a model of ``family`` with float32 weights, the demo's tokenizer and its chat template; ``folder``.

    ``config`` overrides keys of its ``config.json``.
    """
    origin = Path(__file__).parents[1] / "demo" / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(origin / name, folder / name)
    demo = json.loads((origin / "config.json").read_text(encoding="utf-8"))
    values = {key: demo[key] for key in ("vocab_size", "eos_token_id", "pad_token_id")}
    values.update({"model_type": family, "architectures": [FAMILIES[family].causal_lm], "torch_dtype": "float32"})
    values.update({**_SHAPE, **_OWN.get(family, {}), **config})
    write_json(folder / "config.json", values)
    source = open_model(folder, weights=False)
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, parameter in build_model(source).named_parameters():
        weight = _weight(generator, name, tuple(parameter.shape))
        if source.family.is_transposed(name, weight.ndim):
            weight = np.ascontiguousarray(weight.T)
        tensors[source.to_file(name)] = weight
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def _weight(generator: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Large enough that logits differ, and norms and biases that are no norms and biases of nothing."""
    drawn = generator.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return drawn * np.float32(0.1) + np.float32(not name.endswith(".bias"))
    return drawn / np.float32(np.sqrt(_SHAPE["hidden_size"]))


RECORDS = [
    {"src": f"type#{kind}" + "*warm" * (number % 3), "tgt": f"A {kind}" + " for you" * (number % 4) + "."}
    for number, kind in enumerate(["coat", "shirt", "dress", "skirt"] * 3)
]


def write_data(folder: Path, records: Iterable[Mapping[str, Any]] = RECORDS) -> Path:
    """A data set of ``records``; by itself 12 of several lengths. What is learned is measured too."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    for split in ("train", "dev"):
        (folder / f"{split}.json").write_text(text, encoding="utf-8")
    return folder

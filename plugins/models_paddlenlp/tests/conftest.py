"""Tiny checkpoints of the families, as Hugging Face has them, and PaddleNLP's own models of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from sft.files import save_tensors, write_json
from sft.testing import make_model

COMMON = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 2048, "torch_dtype": "float32"}
LATENT = {
    **COMMON,
    "architectures": ["DeepseekV2ForCausalLM"],
    **{"model_type": "deepseek_v2", "num_hidden_layers": 3, "intermediate_size": 40, "moe_intermediate_size": 16},
    **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12},
    **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    **{"max_position_embeddings": 128, "topk_method": "greedy", "routed_scaling_factor": 2.0},
    "rope_scaling": {
        **{"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1},
        **{"mscale": 0.7, "mscale_all_dim": 0.5},
    },
}
GLM = {
    **COMMON,
    **{"model_type": "chatglm", "num_layers": 2, "padded_vocab_size": 2048, "seq_length": 128, "kv_channels": 8},
    **{"ffn_hidden_size": 40, "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen": {
        **COMMON,
        "architectures": ["QWenLMHeadModel"],
        **{"model_type": "qwen", "num_hidden_layers": 2, "intermediate_size": 80, "kv_channels": 8, "seq_length": 128},
        **{"use_dynamic_ntk": True, "use_logn_attn": True, "no_bias": True, "layer_norm_epsilon": 1e-6},
    },
    "chatglm": GLM,
    "chatglm-plain": {**GLM, "multi_query_group_num": 4, "add_qkv_bias": False},
    "deepseek-v2-lite": {**LATENT, "q_lora_rank": None},
    "deepseek-v2": {
        **LATENT,
        **{"q_lora_rank": 24, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    },
}
CLASSES = {
    "qwen": ("qwen", "QWenForCausalLM"),
    "chatglm": ("chatglm_v2", "ChatGLMv2ForCausalLM"),
    "deepseek_v2": ("deepseek_v2", "DeepseekV2ForCausalLM"),
}


@pytest.fixture(scope="session")
def checkpoints(paddle: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case: its config, a tokenizer, and random weights under Hugging Face's names."""
    made: dict[str, Path] = {}

    def make(case: str) -> Path:
        if case not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / case
            make_model(folder)  # for its tokenizer
            write_json(folder / "config.json", CONFIGS[case])
            save_tensors(folder / "model.safetensors", _weights(folder, case), {"format": "pt"})
            made[case] = folder
        return made[case]

    return make


def _weights(folder: Path, case: str) -> dict[str, np.ndarray]:
    from sft.models.families.values import Values
    from sft_models_paddlenlp.families import FAMILIES

    family = FAMILIES[CONFIGS[case]["model_type"]]
    model = family.build(family.read(Values(CONFIGS[case], folder)))  # type: ignore[misc]
    generator = np.random.default_rng(7)
    tensors = {}
    for name, parameter in model.named_parameters():
        shape = list(parameter.shape)
        value = generator.standard_normal(shape, dtype=np.float32)
        value = 1.0 + 0.2 * value if "norm" in name or "ln_" in name else value / np.float32(np.sqrt(32))
        turned = value.T if family.is_transposed(name, len(shape)) else value
        tensors[name] = np.ascontiguousarray(turned.astype(np.float32))
    return tensors


@pytest.fixture(scope="session")
def theirs(checkpoints: Callable[[str], Path]) -> Callable[[str], Any]:
    """PaddleNLP's own model of a case, by its own reader of Hugging Face's files."""

    def load(case: str) -> Any:
        package, name = CLASSES[CONFIGS[case]["model_type"]]
        cls = getattr(importlib.import_module(f"paddlenlp.transformers.{package}.modeling"), name)
        folder = checkpoints(case)
        if package != "chatglm_v2":
            model = cls.from_pretrained(str(folder), convert_from_torch=True, dtype="float32")
        else:  # whose reader knows no files of Hugging Face's: names and layout by hand
            model = cls(cls.config_class.from_pretrained(str(folder)))
            tensors = load_file(folder / "model.safetensors")
            for parameter, value in model.named_parameters():
                tensor = tensors[parameter.replace("chatglm_v2.", "transformer.")]
                value.set_value(tensor.T if tensor.ndim == 2 and "word_embeddings" not in parameter else tensor)
        model.eval()
        return model

    return load


@pytest.fixture(scope="session")
def base_model(checkpoints: Callable[[str], Path]) -> Path:
    return checkpoints("qwen")


@pytest.fixture(scope="session")
def run_settings() -> dict[str, Any]:
    return {"learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1}

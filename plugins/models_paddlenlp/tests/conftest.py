"""Tiny checkpoints of the families, as Hugging Face has them, and PaddleNLP's own models of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_configs import CONFIGS

from sft.files import save_tensors, write_json
from sft.testing import make_model

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

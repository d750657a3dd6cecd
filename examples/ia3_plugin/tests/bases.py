"""The two base models of the fixtures: the same random weights wherever they are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from sft.testing import make_model


def write(case: str, folder: Path) -> Path:
    """The base of a case of make_peft.py: a Llama, or a Qwen2, whose q, k and v have biases."""
    if not case.startswith("qwen2"):
        return make_model(folder)
    make_model(folder, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    tensors, generator = load_file(folder / "model.safetensors"), np.random.default_rng(1)
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        bias = generator.standard_normal(tensors[name].shape[0], dtype=np.float32)
        tensors[name.replace(".weight", ".bias")] = bias
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder

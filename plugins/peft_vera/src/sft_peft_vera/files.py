"""VeRA adapters on disk, in Hugging Face PEFT's layout, the shared pair included."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from sft import AdapterFiles, UsageError, read_adapter

PREFIX = "base_model.model."
_KEY = re.compile(re.escape(PREFIX) + r"(?P<target>.+)\.vera_lambda_(?P<which>[bd])")


class VeraFolder:
    """An adapter folder: ``vectors`` target → (b [out], d [r]), and the pair a [in, r], b [r, out]; all float32."""

    def __init__(self, folder: Path) -> None:
        self.config, tensors = read_adapter(folder)
        if self.config.get("bias", "none") != "none" or self.config.get("modules_to_save"):
            raise UsageError(f"{folder}: biases or saved modules are more than VeRA; this plugin cannot read it.")
        if not {"base_model.vera_A", "base_model.vera_B"} <= set(tensors):
            raise UsageError(f"{folder} does not hold vera_A and vera_B; save the adapter with save_projection.")
        self.a, self.b = (tensors.pop(f"base_model.vera_{half}").astype(np.float32).T for half in "AB")
        found: dict[str, dict[str, np.ndarray]] = {}
        for key, tensor in tensors.items():
            match = _KEY.fullmatch(key)
            if match is None:
                raise UsageError(f"{folder}: tensor {key} is not a VeRA weight of the PEFT layout.")
            found.setdefault(match["target"], {})[match["which"]] = tensor.astype(np.float32)
        self.vectors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for target, both in found.items():
            if set(both) != {"b", "d"} or both["d"].shape != (self.a.shape[1],):
                raise UsageError(f"{folder}: the vectors of {target} are not complete.")
            self.vectors[target] = (both["b"], both["d"])


def adapter_files(
    vectors: dict[str, tuple[np.ndarray, np.ndarray]], a: np.ndarray, b: np.ndarray, options: Any, seed: int, base: str
) -> AdapterFiles:
    """The PEFT form of trained vectors and their shared pair a [in, r], b [r, out]."""
    config = {
        "peft_type": "VERA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": a.shape[1],
        "target_modules": sorted({target.rpartition(".")[2] for target in vectors}),
        "projection_prng_key": seed,
        "save_projection": True,
        "vera_dropout": options.vera_dropout,
        "d_initial": options.vera_d_initial,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    tensors = {"base_model.vera_A": np.ascontiguousarray(a.T), "base_model.vera_B": np.ascontiguousarray(b.T)}
    for target, (scale, shrink) in vectors.items():
        tensors[f"{PREFIX}{target}.vera_lambda_b"] = scale
        tensors[f"{PREFIX}{target}.vera_lambda_d"] = shrink
    return AdapterFiles(config, tensors)


class VeraMerger:
    """W' = W + (A ⊙ d · B ⊙ b)ᵀ in float32, for weights in Hugging Face's [out, in] layout."""

    def __init__(self, folder: Path) -> None:
        self._adapter = VeraFolder(folder)
        self._left = dict(self._adapter.vectors)

    def merge(self, name: str, weight: np.ndarray) -> np.ndarray:
        target = name.removesuffix(".weight")
        if target not in self._left:
            return weight
        b, d = self._left.pop(target)
        out, size = weight.shape
        if out != len(b) or size > len(self._adapter.a):
            raise UsageError(f"The adapter's {target} does not fit the model's {name}; it belongs to another model.")
        return weight + ((self._adapter.a[:size] * d) @ (self._adapter.b[:, :out] * b)).T

    def unused(self) -> list[str]:
        return sorted(self._left)

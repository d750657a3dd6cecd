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
        for key, plain in (("bias", "none"), ("fan_in_fan_out", False)):
            if self.config.get(key) not in (plain, None, []):
                raise UsageError(
                    f"{folder}: {key} = {self.config[key]!r} is more than VeRA; this plugin cannot read it."
                )
        if not {"base_model.vera_A", "base_model.vera_B"} <= set(tensors):
            raise UsageError(f"{folder} does not hold vera_A and vera_B; save the adapter with save_projection.")
        self.a, self.b = (tensors.pop(f"base_model.vera_{half}").astype(np.float32).T for half in "AB")
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[1] != self.b.shape[0]:
            raise UsageError(f"{folder}: the shapes of vera_A and vera_B do not belong together; copy it again.")
        if self.config.get("r", len(self.b)) != len(self.b):
            raise UsageError(
                f"{folder}: vera_A has rank {len(self.b)}, adapter_config.json says {self.config['r']}; copy it again."
            )
        found: dict[str, dict[str, np.ndarray]] = {}
        for key, tensor in tensors.items():
            match = _KEY.fullmatch(key)
            if match is None:
                raise UsageError(f"{folder}: tensor {key} is not a VeRA weight of the PEFT layout.")
            found.setdefault(match["target"], {})[match["which"]] = tensor.astype(np.float32)
        self.vectors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for target, both in found.items():
            if set(both) != {"b", "d"} or both["d"].shape != self.b.shape[:1] or both["b"].ndim != 1:
                raise UsageError(f"{folder}: the vectors of {target} are not complete.")
            self.vectors[target] = (both["b"], both["d"])
        if not self.vectors:
            raise UsageError(f"{folder} holds no VeRA vectors.")

    def fits(self, target: str, in_features: int, out_features: int) -> bool:
        """Whether a Linear of these sizes is what ``target`` was trained on."""
        wide = in_features <= self.a.shape[0] and out_features <= self.b.shape[1]
        return wide and len(self.vectors[target][0]) == out_features


def adapter_files(
    vectors: dict[str, tuple[np.ndarray, np.ndarray]],
    a: np.ndarray,
    b: np.ndarray,
    modules: list[str],
    options: Any,
    seed: int,
    base: str,
) -> AdapterFiles:
    """The PEFT form of trained vectors (b, d) and their shared pair a [in, r], b [r, out]."""
    config = {
        "peft_type": "VERA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": a.shape[1],
        "target_modules": modules,
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
    for target, (vector_b, vector_d) in vectors.items():
        tensors[f"{PREFIX}{target}.vera_lambda_b"] = vector_b
        tensors[f"{PREFIX}{target}.vera_lambda_d"] = vector_d
    return AdapterFiles(config, tensors)


class VeraMerger:
    """W' = W + (A ⊙ d · B ⊙ b)ᵀ in float32, for weights in Hugging Face's [out, in] layout."""

    def __init__(self, folder: Path) -> None:
        self._adapter = VeraFolder(folder)
        self._left = dict(self._adapter.vectors)

    def merge(self, name: str, weight: Any) -> Any:
        import paddle

        target = name.removesuffix(".weight")
        if target not in self._left:
            return weight
        out, size = weight.shape
        if not self._adapter.fits(target, size, out):
            raise UsageError(f"The adapter's {target} does not fit the model's {name}; it belongs to another model.")
        b, d = self._left.pop(target)
        left, right = (self._adapter.b[:, :out] * b).T, (self._adapter.a[:size] * d).T
        return weight + paddle.to_tensor(np.ascontiguousarray(left)) @ paddle.to_tensor(np.ascontiguousarray(right))

    def unused(self) -> list[str]:
        return sorted(self._left)

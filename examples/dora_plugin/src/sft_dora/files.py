"""DoRA adapters on disk, in Hugging Face PEFT's layout: a LoRA with ``use_dora``, and a magnitude for each target."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from sft import AdapterFiles, UsageError, read_adapter

PREFIX = "base_model.model."
KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_KEY = re.compile(re.escape(PREFIX) + r"(?P<target>.+\.layers\.\d+\..+)\.(?P<key>" + "|".join(KEYS.values()) + ")")

# What a config may hold of the settings that change what PEFT computes; one that is left out means the first.
_PLAIN = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    **{key: (None, {}) for key in ("rank_pattern", "alpha_pattern")},
    **dict.fromkeys(("fan_in_fan_out", "lora_bias", "use_qalora"), (False, None)),
    **{key: (None, []) for key in ("modules_to_save", "trainable_token_indices", "layer_replication")},
    **{key: (None, []) for key in ("target_parameters", "alora_invocation_tokens")},
}


class DoraFolder:
    """An adapter folder: for each target A [in, r], B [r, out] and m [out] (float32), and the scaling of all.

    Raises :class:`UsageError` for a folder that is damaged, or whose config asks for more than DoRA.
    """

    def __init__(self, folder: Path) -> None:
        self.config, tensors = read_adapter(folder)
        for key, plain in _PLAIN.items():
            if self.config.get(key, plain[0]) not in plain:
                raise UsageError(f"{folder}: plugin dora does not know {key} = {self.config[key]!r}.")
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, tensor in tensors.items():
            match = _KEY.fullmatch(name)
            if match is None:
                raise UsageError(f"{folder}: tensor {name} is not of a DoRA adapter of transformer blocks.")
            found.setdefault(match["target"], {})[match["key"]] = tensor.astype(np.float32)
        self.tensors: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.rank = int(self.config["r"])
        for target, parts in found.items():
            if set(parts) != set(KEYS.values()):
                raise UsageError(f"{folder}: the tensors of {target} are not complete.")
            a, b, magnitude = (parts[key] for key in KEYS.values())
            if not a.shape[0] == b.shape[1] == self.rank or magnitude.shape != b.shape[:1]:
                raise UsageError(f"{folder}: the shapes of {target} and rank {self.rank} do not belong together.")
            self.tensors[target] = (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), magnitude)
        if not self.tensors:
            raise UsageError(f"{folder} holds no DoRA weights.")
        root = self.rank**0.5 if self.config.get("use_rslora") else self.rank
        self.scaling = float(self.config["lora_alpha"]) / root


def adapter_files(
    tensors: dict[str, tuple[Any, Any, Any]], modules: list[str], rank: int, alpha: float, base: str
) -> AdapterFiles:
    """The PEFT form of trained A [in, r], B [r, out] and m [out] of each target; the scaling is α / r."""
    config = {
        "peft_type": "LORA",
        "use_dora": True,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    files = {}
    for target, (a, b, magnitude) in tensors.items():
        files[f"{PREFIX}{target}.lora_A.weight"] = np.ascontiguousarray(a.T)
        files[f"{PREFIX}{target}.lora_B.weight"] = np.ascontiguousarray(b.T)
        files[f"{PREFIX}{target}.lora_magnitude_vector"] = magnitude
    return AdapterFiles(config, files)


class DoraMerger:
    """W' = V ⊙ m/‖V‖ with V = W + s·(A·B)ᵀ, in float32, for weights in Hugging Face's [out, in] layout."""

    def __init__(self, folder: Path) -> None:
        self._adapter = DoraFolder(folder)
        self._left = dict(self._adapter.tensors)

    def merge(self, name: str, weight: Any) -> Any:
        import paddle

        target = name.removesuffix(".weight")
        if target not in self._left:
            return weight
        a, b, magnitude = map(paddle.to_tensor, self._left.pop(target))
        if tuple(weight.shape) != (b.shape[1], a.shape[0]):
            raise UsageError(f"The adapter's {target} does not fit the model's {name}; it belongs to another model.")
        v = weight + self._adapter.scaling * paddle.matmul(b, a, transpose_x=True, transpose_y=True)
        return v * (magnitude / v.square().sum(axis=1).sqrt()).unsqueeze(-1)

    def unused(self) -> list[str]:
        return sorted(self._left)

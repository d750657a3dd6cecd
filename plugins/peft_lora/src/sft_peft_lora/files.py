"""LoRA adapters on disk, in Hugging Face PEFT's layout: A [r, in] and B [out, r] for each target."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from sft import AdapterFiles, UsageError, read_adapter

PREFIX = "base_model.model."
_KEY = re.compile(re.escape(PREFIX) + r"(?P<target>.+)\.lora_(?P<half>[AB])\.weight")

# Settings of a PEFT LoRA config that change what the adapter computes, and the values that mean plain LoRA.
_PLAIN = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
}
# Initialisations of PEFT that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take from it
# what A and B begin with, and such an adapter means nothing over the original weights.
_OVER_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class LoraFolder:
    """An adapter folder: for each target its pair A [in, r], B [r, out] (float32) and its scaling.

    Raises :class:`UsageError` for a folder that is damaged, or whose config asks for more than plain LoRA.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, tensors = read_adapter(folder)
        for key, plain in _PLAIN.items():
            if self.config.get(key, plain[0]) not in (*plain, None):
                raise UsageError(
                    f"{folder}: {key} = {self.config[key]!r} is more than LoRA; this plugin cannot read it."
                )
        start = self.config.get("init_lora_weights")
        if (start.lower() if isinstance(start, str) else start) not in _OVER_THE_BASE:
            raise UsageError(
                f"{folder}: init_lora_weights = {start!r} changed the base that it was trained over; convert it to "
                "LoRA where it was trained (PEFT's save_pretrained with path_initial_model_for_weight_conversion)."
            )
        self.pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        halves: dict[str, dict[str, np.ndarray]] = {}
        for key, tensor in tensors.items():
            match = _KEY.fullmatch(key)
            if match is None:
                raise UsageError(f"{folder}: tensor {key} is not a LoRA weight of the PEFT layout.")
            halves.setdefault(match["target"], {})[match["half"]] = tensor.astype(np.float32)
        for target, found in halves.items():
            if set(found) != {"A", "B"} or found["A"].shape[0] != found["B"].shape[1]:
                raise UsageError(f"{folder}: the pair of lora_A and lora_B for {target} is not complete.")
            self.pairs[target] = (np.ascontiguousarray(found["A"].T), np.ascontiguousarray(found["B"].T))
        if not self.pairs:
            raise UsageError(f"{folder} holds no LoRA weights.")

    def scaling(self, target: str) -> float:
        """s of one target: α/r, or α/√r with ``use_rslora``; the pattern settings of PEFT count."""
        rank = self.pairs[target][0].shape[1]
        alpha = float(self._pattern("alpha_pattern", target, self.config.get("lora_alpha", rank)))
        declared = int(self._pattern("rank_pattern", target, self.config.get("r", rank)))
        if declared != rank:
            raise UsageError(f"{self.folder}: {target} has rank {rank}, adapter_config.json says {declared}.")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _pattern(self, key: str, target: str, default: Any) -> Any:
        for pattern, value in (self.config.get(key) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", target):
                return value
        return default


def adapter_files(
    pairs: dict[str, tuple[np.ndarray, np.ndarray]],
    modules: list[str],
    alpha: float,
    scaling: float,
    base: str,
    dropout: float,
) -> AdapterFiles:
    """The PEFT form of trained pairs A [in, r], B [r, out] that are scaled by ``scaling``.

    When the pairs' rank is not the one that α was scaled with, α is written so that PEFT computes ``scaling``.
    """
    rank = next(iter(pairs.values()))[0].shape[1]
    rs = not math.isclose(alpha / rank, scaling) and math.isclose(alpha / math.sqrt(rank), scaling)
    written = alpha if rs or math.isclose(alpha / rank, scaling) else scaling * rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(written) if float(written).is_integer() else written,
        "lora_dropout": dropout,
        "use_rslora": rs,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    tensors = {}
    for target, (a, b) in pairs.items():
        tensors[f"{PREFIX}{target}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{PREFIX}{target}.lora_B.weight"] = np.ascontiguousarray(b.T)
    return AdapterFiles(config, tensors)


class LoraMerger:
    """W' = W + s·(A·B)ᵀ in float32, for weights in Hugging Face's [out, in] layout."""

    def __init__(self, folder: Path) -> None:
        self._adapter = LoraFolder(folder)
        self._left = dict(self._adapter.pairs)

    def merge(self, name: str, weight: Any) -> Any:
        import paddle

        target = name.removesuffix(".weight")
        if target not in self._left:
            return weight
        a, b = self._left.pop(target)
        if tuple(weight.shape) != (b.shape[1], a.shape[0]):
            raise UsageError(
                f"The adapter's {target} is {b.shape[1]}x{a.shape[0]} and the model's {name} is "
                f"{'x'.join(map(str, weight.shape))}; it belongs to another model."
            )
        a, b = paddle.to_tensor(a), paddle.to_tensor(b)
        return weight + self._adapter.scaling(target) * paddle.matmul(b, a, transpose_x=True, transpose_y=True)

    def unused(self) -> list[str]:
        return sorted(self._left)

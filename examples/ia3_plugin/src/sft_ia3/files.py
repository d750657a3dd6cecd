"""(IA)³ adapters on disk, in Hugging Face PEFT's layout: for each target ``ia3_l``, [out, 1], or [1, in] of those in
``feedforward_modules``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from sft import AdapterFiles, UsageError, read_adapter

PREFIX = "base_model.model."
_KEY = re.compile(re.escape(PREFIX) + r"(?P<target>.+\.layers\.\d+\..+)\.ia3_l")

# Settings that change what PEFT computes, and the values of them that mean nothing; one that is left out means them.
_PLAIN = {"fan_in_fan_out": (False, None)}


class Ia3Folder:
    """An adapter folder: for each target its scale, float32, and whether it scales the inputs.

    Raises :class:`UsageError` for a folder that is damaged, or whose config asks for more than (IA)³.
    """

    def __init__(self, folder: Path) -> None:
        config, tensors = read_adapter(folder)
        for key, plain in _PLAIN.items():
            if config.get(key, plain[0]) not in plain:
                raise UsageError(f"{folder}: plugin ia3 does not know {key} = {config[key]!r}.")
        feeding = config.get("feedforward_modules")
        if not isinstance(feeding, list):
            raise UsageError(
                f"{folder}: plugin ia3 needs feedforward_modules as a list of names, not {feeding!r:.100}."
            )
        self.scales: dict[str, tuple[np.ndarray, bool]] = {}
        for name, tensor in tensors.items():
            match = _KEY.fullmatch(name)
            if match is None:
                raise UsageError(f"{folder}: tensor {name} is not of an (IA)³ adapter of transformer blocks.")
            target = match["target"]
            feeds = any(target == module or target.endswith(f".{module}") for module in feeding)
            if tensor.ndim != 2 or tensor.shape[0 if feeds else 1] != 1:
                raise UsageError(
                    f"{folder}: {name} is {'x'.join(map(str, tensor.shape))}, and feedforward_modules of its config "
                    f"say that it scales {'inputs' if feeds else 'outputs'}; copy the adapter again."
                )
            self.scales[target] = (np.ascontiguousarray(tensor.astype(np.float32).reshape(-1)), feeds)
        if not self.scales:
            raise UsageError(f"{folder} holds no (IA)³ weights.")


def adapter_files(scales: dict[str, np.ndarray], modules: list[str], feeding: list[str], base: str) -> AdapterFiles:
    """The PEFT form of trained scales: of those in ``feeding`` over inputs, of the other ``modules`` over outputs."""
    config = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": modules,
        "feedforward_modules": feeding,
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    feeds = {name: any(name == one or name.endswith(f".{one}") for one in feeding) for name in scales}
    tensors = {
        f"{PREFIX}{name}.ia3_l": scale.reshape([1, -1] if feeds[name] else [-1, 1]) for name, scale in scales.items()
    }
    return AdapterFiles(config, tensors)


class Ia3Merger:
    """W' = W·diag(l), or diag(l)·W and l ⊙ b, in float32, for weights in Hugging Face's [out, in] layout."""

    def __init__(self, folder: Path) -> None:
        self._scales = Ia3Folder(folder).scales
        self._left = set(self._scales)

    def merge(self, name: str, weight: Any) -> Any:
        import paddle

        target, _, kind = name.rpartition(".")
        scale, feeds = self._scales.get(target, (None, False))
        if scale is None or (kind == "bias" and feeds):
            return weight
        if len(scale) != weight.shape[1 if feeds else 0]:
            raise UsageError(f"The adapter's {target} does not fit the model's {name}; it belongs to another model.")
        self._left.discard(target)
        factors = paddle.to_tensor(scale)
        return weight * (factors if feeds or kind == "bias" else factors.unsqueeze(-1))

    def unused(self) -> list[str]:
        return sorted(self._left)

"""LoRA adapters on disk, in Hugging Face PEFT's layout: A [r, in] and B [out, r] for each target."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft import AdapterFiles, UsageError, matches, module_names, read_adapter
from sft_peft_lora.options import LARGEST, SMALLEST

if TYPE_CHECKING:
    from sft_peft_lora.hooks import LoraForm

PREFIX = "base_model.model."
_PAIR = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
"""What follows a target's name in the file, and the layer's attribute."""

# What PEFT keeps of a target, of a Linear or of an embedding; a target outside the blocks keeps its base, too.
_OF_A_TARGET = re.compile(re.escape(PREFIX) + r"(?P<target>.+?)\.(lora_\w+|base_layer)(\..+)?")
_IN_A_BLOCK = re.compile(r".+\.\d+\..+")  # blocks are numbered, whatever a family calls them

# Settings of a PEFT LoRA config that change what the adapter computes, and the values that mean plain LoRA.
_PLAIN = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
}
# Initialisations of PEFT that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take from it
# what A and B begin with, and such an adapter means nothing over the original weights.
_OVER_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class LoraFolder:
    """An adapter folder: for each target its pair A [in, r], B [r, out] (float32), its scaling, and its ``further``
    tensors (float32, by attribute of the layer) where a refinement's ``form`` has some.

    Raises :class:`UsageError` for a folder that is damaged, or whose config asks for anything but LoRA of that form.
    """

    def __init__(self, folder: Path, form: LoraForm | None = None) -> None:
        self.folder = folder
        formed = {} if form is None else form.config
        self.config, tensors = read_adapter(folder)
        if self.config["peft_type"] != "LORA":
            raise UsageError(
                f"{folder} is a {self.config['peft_type']} adapter, and plugin lora reads LORA alone; give "
                "another folder."
            )
        for key, value in formed.items():
            if self.config.get(key) != value:
                raise UsageError(
                    f"{folder}: its config has {key} = {self.config.get(key)!r}, and an active plugin that refines "
                    f"lora reads adapters with {key} = {value!r}; leave that plugin out, or give another adapter."
                )
        for key, plain in _PLAIN.items():
            if key not in formed and self.config.get(key, plain[0]) not in (*plain, None):
                raise UsageError(
                    f"{folder}: {key} = {self.config[key]!r} is more than LoRA, and no active plugin reads it; add one "
                    "that does (sft plugins lists them), or give another adapter."
                )
        if not isinstance(self.config.get("use_rslora"), (bool, type(None))):
            raise UsageError(f"{folder}: adapter_config.json must give use_rslora as true or false.")
        start = self.config.get("init_lora_weights")
        if (start.lower() if isinstance(start, str) else start) not in _OVER_THE_BASE:
            raise UsageError(
                f"{folder}: init_lora_weights = {start!r} changed the base that it was trained over; convert it to "
                "LoRA where it was trained (PEFT's save_pretrained with path_initial_model_for_weight_conversion)."
            )
        targets = {match["target"]: None for match in map(_OF_A_TARGET.fullmatch, tensors) if match is not None}
        outside = [target for target in targets if not _IN_A_BLOCK.fullmatch(target)]
        if outside:
            raise UsageError(
                f"{folder} adapts {' and '.join(outside)}, and plugin lora adapts Linears of the transformer blocks "
                "alone; train the adapter with other target_modules."
            )
        self.pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.further: dict[str, dict[str, np.ndarray]] = {}
        tensors_of_form = {} if form is None else form.tensors
        endings = {**_PAIR, **{name: attribute for attribute, (name, _) in tensors_of_form.items()}}
        found: dict[str, dict[str, np.ndarray]] = {}
        for key, tensor in tensors.items():
            ending = next((ending for ending in endings if key.endswith(f".{ending}")), None)
            if ending is None or not key.startswith(PREFIX):
                raise UsageError(f"{folder}: tensor {key} is not a LoRA weight of the PEFT layout.")
            attribute = endings[ending]
            dimensions = len(tensors_of_form[attribute][1]) if attribute in tensors_of_form else 2
            if tensor.ndim != dimensions:
                raise UsageError(
                    f"{folder}: tensor {key} has {tensor.ndim} dimensions, and LoRA's have {dimensions} there."
                )
            target = key[len(PREFIX) : -len(ending) - 1]
            found.setdefault(target, {})[attribute] = np.ascontiguousarray(tensor.astype(np.float32).T)
        for target, parts in found.items():
            if not {"lora_A", "lora_B"} <= set(parts) or not _fit(parts["lora_A"], parts["lora_B"]):
                raise UsageError(f"{folder}: the pair of lora_A and lora_B for {target} is not complete.")
            a, b = self.pairs[target] = parts.pop("lora_A"), parts.pop("lora_B")
            lengths = {"in": a.shape[0], "out": b.shape[1], None: b.shape[0]}
            for attribute, (name, sides) in tensors_of_form.items():
                shape = tuple(lengths[side] for side in sides)
                if attribute not in parts or parts[attribute].shape != shape:
                    said = ", ".join(f"{key} = {value!r}" for key, value in formed.items())
                    raise UsageError(
                        f"{folder}: its config has {said}, and {name} of {target} is not there, or does not fit its "
                        "lora_A and lora_B; copy the adapter again."
                    )
            self.further[target] = parts
        if not self.pairs:
            raise UsageError(f"{folder} holds no LoRA weights.")
        for target in self.pairs:
            self.alpha(target)

    def alpha(self, target: str) -> float:
        """α of one target; the pattern settings of PEFT count."""
        rank = self.pairs[target][0].shape[1]
        declared = self._number("r", "rank_pattern", target)
        if declared not in (None, rank):
            raise UsageError(f"{self.folder}: {target} has rank {rank}, adapter_config.json says {declared:g}.")
        alpha = self._number("lora_alpha", "alpha_pattern", target)
        return float(rank if alpha is None else alpha)

    def scaling(self, target: str) -> float:
        """s of one target: α/r, or α/√r with ``use_rslora``."""
        rank = self.pairs[target][0].shape[1]
        return self.alpha(target) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _number(self, key: str, patterns: str, target: str) -> float | None:
        """What the config says of ``target`` under ``key``, or in its ``patterns``; None where it says nothing."""
        exceptions = self.config.get(patterns) or {}
        if not isinstance(exceptions, dict):
            raise UsageError(
                f"{self.folder}: adapter_config.json must give {patterns} as an object of names and numbers, not "
                f"{exceptions!r:.100}."
            )
        whose = f"{self.folder}: in adapter_config.json, {patterns}"
        for pattern, value in exceptions.items():
            if matches(rf"(.*\.)?({pattern})", target, whose):
                return self._checked(f"{patterns} of {pattern}", value)
        return self._checked(key, self.config[key]) if key in self.config else None

    def _checked(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not SMALLEST <= value <= LARGEST:
            raise UsageError(
                f"{self.folder}: adapter_config.json must give {key} as a number from {SMALLEST:g} to {LARGEST:g}, "
                f"not {value!r:.100}."
            )
        return value


def _fit(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape[1] == b.shape[0] and bool(b.shape[0])


def adapter_files(
    pairs: dict[str, tuple[np.ndarray, np.ndarray]],
    modules: list[str],
    alphas: dict[str, float],
    scalings: dict[str, float],
    base: str,
    dropout: float,
    form: LoraForm | None = None,
    further: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> AdapterFiles:
    """The PEFT form of trained pairs A [in, r], B [r, out], each scaled by its own of ``scalings``; with a ``form``
    also of the ``further`` tensors of each target by attribute.

    Where a pair's rank is not the one that its α was scaled with, α is written so that PEFT computes the scaling.
    """
    ranks = {target: int(a.shape[1]) for target, (a, _) in pairs.items()}
    plain, rooted = (
        {target: math.isclose(alphas[target] / root(rank), scalings[target]) for target, rank in ranks.items()}
        for root in (float, math.sqrt)
    )
    rs = not all(plain.values()) and all(rooted.values())
    written = {}
    for target, rank in ranks.items():
        kept = rooted[target] if rs else plain[target]
        alpha = alphas[target] if kept else scalings[target] * (math.sqrt(rank) if rs else rank)
        written[target] = int(alpha) if float(alpha).is_integer() else alpha
    rank, other_ranks = _patterns(ranks)
    alpha, other_alphas = _patterns(written)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "rank_pattern": other_ranks,
        "lora_alpha": alpha,
        "alpha_pattern": other_alphas,
        "lora_dropout": dropout,
        "use_rslora": rs,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        **({} if form is None else form.config),
    }
    tensors = {}
    for target, (a, b) in pairs.items():
        tensors[f"{PREFIX}{target}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{PREFIX}{target}.lora_B.weight"] = np.ascontiguousarray(b.T)
        for attribute, (name, _) in ({} if form is None else form.tensors).items():
            tensors[f"{PREFIX}{target}.{name}"] = np.ascontiguousarray((further or {})[target][attribute].T)
    return AdapterFiles(config, tensors)


def _patterns(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The value that most targets have, and PEFT's patterns for the others."""
    counts = Counter(values.values())
    common = counts.most_common(1)[0][0]
    patterns = {}
    for value in sorted(set(counts) - {common}):
        for name in module_names([target for target, own in values.items() if own == value], values):
            patterns[name] = value
    return common, patterns


class LoraMerger:
    """W' = W + s·(A·B)ᵀ in float32, or what a ``form`` makes of the two, for weights in Hugging Face's [out, in]
    layout."""

    def __init__(self, folder: Path, form: LoraForm | None = None) -> None:
        self._adapter, self._form = LoraFolder(folder, form), form
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
        update = self._adapter.scaling(target) * paddle.matmul(b, a, transpose_x=True, transpose_y=True)
        if self._form is None:
            return weight + update
        further = {name: paddle.to_tensor(values) for name, values in self._adapter.further[target].items()}
        return self._form.merged(weight, update, further)

    def unused(self) -> list[str]:
        return sorted(self._left)

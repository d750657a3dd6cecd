"""LoRA adapters on disk, in Hugging Face PEFT's layout: A [r, in] and B [out, r] for each target."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft import AdapterFiles, UsageError, matches, module_names, read_adapter
from sft_peft_lora.names import EMBEDDING, HEAD, OUTER
from sft_peft_lora.options import LARGEST, SMALLEST

if TYPE_CHECKING:
    from sft_peft_lora.hooks import LoraForm

PREFIX = "base_model.model."
_PAIR = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
"""What follows a target's name in the file, and the layer's attribute."""
_PAIR_OF_EMBEDDING = {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}
_BASE = "base_layer.weight"
"""PEFT writes the frozen matrix of an adapted embedding, or head, into the file too."""

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
        unknown = [target for target in outside if target not in OUTER or form is not None]
        if unknown:
            what = (
                "Linears of the blocks, the embedding and lm_head" if form is None else "refined Linears of the blocks"
            )
            raise UsageError(
                f"{folder} adapts {' and '.join(unknown)}, and plugin lora reads adapters of {what} alone; train the "
                "adapter with other target_modules."
            )
        self.pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.further: dict[str, dict[str, np.ndarray]] = {}
        self.bases: dict[str, np.ndarray] = {}
        """The frozen matrices of adapted embeddings and heads that are in the file, in its layout."""
        tensors_of_form = {} if form is None else form.tensors
        endings = {**_PAIR, **{name: attribute for attribute, (name, _) in tensors_of_form.items()}}
        found: dict[str, dict[str, np.ndarray]] = {}
        for key, tensor in tensors.items():
            if key.removeprefix(PREFIX).removesuffix(f".{_BASE}") in outside and key.endswith(f".{_BASE}"):
                self.bases[key[len(PREFIX) : -len(_BASE) - 1]] = tensor
                continue
            known = _PAIR_OF_EMBEDDING if key.startswith(f"{PREFIX}{EMBEDDING}.") else endings
            ending = next((ending for ending in known if key.endswith(f".{ending}")), None)
            if ending is None or not key.startswith(PREFIX):
                raise UsageError(f"{folder}: tensor {key} is not a LoRA weight of the PEFT layout.")
            attribute = known[ending]
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
        self.ties = self.config.get("ensure_weight_tying") is True and EMBEDDING in self.pairs
        """Whether the head has the embedding's update, as it has its matrix."""
        if self.ties and HEAD in self.pairs:
            self._drop_head()
        for target in self.pairs:
            self.alpha(target)

    def _drop_head(self) -> None:
        """Of a tied base PEFT writes the update twice."""
        (a, b), (inputs, outputs) = self.pairs[EMBEDDING], self.pairs.pop(HEAD)
        if not np.array_equal(inputs, b.T) or not np.array_equal(outputs, a.T):
            raise UsageError(
                f"{self.folder} says that embedding and head are one (ensure_weight_tying), and has different updates "
                "of the two; train it again with PEFT 0.18 or later, or over a base whose tie_word_embeddings is false."
            )

    def check_outer(self, tied: bool, where: Any) -> None:
        """Refuse an adapter of an embedding or a head where the base ``where`` has the two as one matrix and the
        adapter does not, or the other way round."""
        if not any(target in OUTER for target in self.pairs):
            return
        if tied and not self.ties:
            raise UsageError(
                f"{self.folder} adapts the embedding and the head apart, and in {where} they are one matrix; train it "
                "with PEFT's ensure_weight_tying, or over a base whose tie_word_embeddings is false."
            )
        if self.ties and not tied:
            raise UsageError(
                f"{self.folder} has one update for embedding and head (ensure_weight_tying), and in {where} they are "
                "two matrices; give the base that it was trained over."
            )

    def check_matrix(self, target: str, weight: Callable[[], np.ndarray]) -> None:
        """Refuse a base whose embedding, or head, is not the one in the file; ``weight`` gives it as files have it."""
        if target not in self.bases:
            return
        here, there = weight(), self.bases[target]
        if here.shape != there.shape or not np.array_equal(here.astype(np.float32), there.astype(np.float32)):
            raise UsageError(
                f"{self.folder} was trained over another matrix of {target} than this model has (new tokens, perhaps); "
                "give that base, or fold the adapter in with PEFT (merge_and_unload)."
            )

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
        names = _PAIR_OF_EMBEDDING if target == EMBEDDING else _PAIR
        for name, matrix in zip(names, (a, b), strict=True):
            tensors[f"{PREFIX}{target}.{name}"] = np.ascontiguousarray(matrix.T)
        for attribute, (name, _) in ({} if form is None else form.tensors).items():
            tensors[f"{PREFIX}{target}.{name}"] = np.ascontiguousarray((further or {})[target][attribute].T)
    return AdapterFiles(config, tensors)


def with_tied_head(files: AdapterFiles) -> AdapterFiles:
    """The files of an adapter of a tied embedding as PEFT has them: they have its update for the head too."""
    config, tensors = {**files.config, "ensure_weight_tying": True}, dict(files.tensors)
    a, b = (tensors[f"{PREFIX}{EMBEDDING}.{name}"] for name in _PAIR_OF_EMBEDDING)
    for name, matrix in zip(_PAIR, (b, a), strict=True):
        tensors[f"{PREFIX}{HEAD}.{name}"] = np.ascontiguousarray(matrix.T)
    for key in ("rank_pattern", "alpha_pattern"):  # what holds of the one must hold of the other
        names = [name for name in config[key] if name in (EMBEDDING, EMBEDDING.rpartition(".")[2])]
        config[key] = {**config[key], **({HEAD: config[key][names[0]]} if names else {})}
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
        self._has_head = False

    def merge(self, name: str, weight: Any) -> Any:
        import paddle

        target = name.removesuffix(".weight")
        self._has_head |= target == HEAD
        if target not in self._left:
            return weight
        a, b = self._left.pop(target)
        shape = (a.shape[0], b.shape[1]) if target == EMBEDDING else (b.shape[1], a.shape[0])
        if tuple(weight.shape) != shape:
            raise UsageError(
                f"The adapter's {target} is {shape[0]}x{shape[1]} and the model's {name} is "
                f"{'x'.join(map(str, weight.shape))}; it belongs to another model."
            )
        self._adapter.check_matrix(target, lambda: weight.numpy())
        a, b = paddle.to_tensor(a), paddle.to_tensor(b)
        if target == EMBEDDING:
            return weight + self._adapter.scaling(target) * paddle.matmul(a, b)
        update = self._adapter.scaling(target) * paddle.matmul(b, a, transpose_x=True, transpose_y=True)
        if self._form is None:
            return weight + update
        further = {name: paddle.to_tensor(values) for name, values in self._adapter.further[target].items()}
        return self._form.merged(weight, update, further)

    def unused(self) -> list[str]:
        self._adapter.check_outer(not self._has_head, "the model")
        return sorted(self._left)

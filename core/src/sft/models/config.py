"""``config.json`` as it is read (Hugging Face 4 or 5, or PaddleNLP), and as it is written."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.errors import UsageError
from sft.models.families.family import Family
from sft.models.families.known import family_of
from sft.small_files import is_there, read_object

OF_THE_WEIGHTS = ("model_type", "architectures", "dtype", "torch_dtype")
"""What a config says of the weights that there are, and no plugin changes."""


def read_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json`` as it stands."""
    path = folder / "config.json"
    if not is_there(path):
        raise UsageError(f"{folder} has no config.json; give a model directory in Hugging Face or Paddle layout.")
    return read_object(path)


def with_one_spelling(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``values`` in which the rotary embedding stands in ``rope_theta``, ``rope_scaling`` (null, or an object
    with ``rope_type``) and ``partial_rotary_factor``, whatever the file calls them. Where a file tells layer types
    apart, it stays as it is."""
    kept = copy.deepcopy(dict(values))
    scaling = kept.get("rope_scaling") or kept.get("rope_parameters") or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        return kept
    scaling = dict(scaling)
    for name in ("rope_theta", "partial_rotary_factor"):
        given = scaling.pop(name, None)
        if given is not None:
            kept[name] = given
    kind = scaling.pop("type", None)
    kind = scaling.pop("rope_type", None) or kind or "default"
    own = [kept.pop(name, None) for name in ("rope_parameters", "rope_scaling_type", "rope_scaling_factor")]
    if own[1]:  # PaddleNLP's
        kind, scaling = own[1], {"factor": own[2] if own[2] is not None else 1.0}
    kept["rope_scaling"] = {"rope_type": kind, **scaling} if kind != "default" else None
    return kept


def hf_config(values: Mapping[str, Any], dtype: str, family: Family | None = None) -> dict[str, Any]:
    """``values`` for a Hugging Face directory of ``dtype`` weights that transformers 4, 5 and PaddleNLP read alike."""
    family = family or family_of(values, "config.json")
    left_out = ("dtype", "paddlenlp_version", "quantization_config", "rope_scaling_type", "rope_scaling_factor")
    kept = {key: value for key, value in values.items() if key not in left_out}
    kept.update(architectures=[family.causal_lm], torch_dtype=dtype)
    if family.build is not None:  # its class reads what was there
        return kept
    architecture = family.architecture(values, "config.json")
    rotary = architecture.rotaries[0]
    kept["rope_theta"] = rotary.base
    kept.pop("rope_scaling", None)
    scaling = {"rope_type": rotary.kind, **rotary.values}
    if rotary.kind == "longrope":  # transformers 4 takes these three names alone, and the length from beside them
        kept["original_max_position_embeddings"] = rotary.limit
        apart = ("rope_type", "original_max_position_embeddings")
        kept["rope_scaling"] = {"type": "longrope", **{key: scaling[key] for key in scaling if key not in apart}}
    elif rotary.kind != "default":
        kept["rope_scaling"] = scaling
    if rotary.size != architecture.head_size:
        kept["partial_rotary_factor"] = rotary.size / architecture.head_size
    if len(architecture.rotaries) > 1:  # Gemma 3's for windows, as transformers 4 calls it
        kept["rope_local_base_freq"] = architecture.rotaries[1].base
    found = values.get("rope_parameters")
    if isinstance(found, dict) and not any(isinstance(value, dict) for value in found.values()):
        kept["rope_parameters"] = {**found, **scaling, "rope_theta": rotary.base}
        kept["rope_parameters"].pop("type", None)
    return kept

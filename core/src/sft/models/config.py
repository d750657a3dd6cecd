"""``config.json`` as it is read (Hugging Face 4 or 5, or PaddleNLP), and as it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.errors import UsageError
from sft.models.families import family_of


def read_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json`` as it stands."""
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} has no config.json; give a model directory in Hugging Face or Paddle layout.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}); correct or replace it.") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold one JSON object.")
    return values


def hf_config(values: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """``values`` for a Hugging Face directory of ``dtype`` weights that transformers 4, 5 and PaddleNLP read alike."""
    family = family_of(values, "config.json")
    rotary = family.architecture(values, "config.json").rotaries[0]
    left_out = ("dtype", "paddlenlp_version", "quantization_config", "rope_scaling_type", "rope_scaling_factor")
    kept = {key: value for key, value in values.items() if key not in left_out}
    kept.update(architectures=[family.causal_lm], torch_dtype=dtype, rope_theta=rotary.base)
    kept.pop("rope_scaling", None)
    scaling = {"rope_type": rotary.kind, **rotary.values}
    if rotary.kind != "default":
        kept["rope_scaling"] = scaling
    found = values.get("rope_parameters")
    if isinstance(found, dict) and not any(isinstance(value, dict) for value in found.values()):
        kept["rope_parameters"] = {**found, **scaling, "rope_theta": rotary.base}
        kept["rope_parameters"].pop("type", None)
    return kept

"""From a ``config.json`` (Hugging Face 4 or 5, or PaddleNLP) to a PaddleNLP config that means the same.

PaddleNLP silently ignores what it does not know: transformers 5's ``rope_parameters``, an explicit
``head_dim``, biases in Llama, sliding windows, most rotary scalings. What it would get wrong is translated
where it can be, and refused where it cannot.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft.errors import UsageError
from sft.models.families import Family, family_of


def read_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json`` as it stands."""
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} has no config.json; give a model directory in Hugging Face or Paddle layout.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}); correct or replace it.") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold one JSON object.")
    return values


def rope_of(values: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Base and scaling of the rotary embedding from ``rope_parameters`` or ``rope_theta`` + ``rope_scaling``.

    The scaling's ``rope_type`` is "default" when there is none.
    """
    # transformers lets a non-empty rope_scaling win over rope_parameters, and a theta in it over the top-level one.
    scaling = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    theta = scaling.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type") or "default"
    if values.get("rope_scaling_type"):  # PaddleNLP's own spelling
        scaling = {"rope_type": values["rope_scaling_type"], "factor": values.get("rope_scaling_factor", 1.0)}
    return float(theta), scaling


def paddle_config(values: dict[str, Any], where: Any) -> tuple[Family, Any]:
    """The family and a PaddleNLP config for float32 training on one device.

    Raises :class:`UsageError` for a setting that PaddleNLP's model would silently ignore.
    """
    family = checked_family(values, where)
    theta, scaling = rope_of(values)
    kind = scaling["rope_type"]
    if any(isinstance(value, dict) for value in scaling.values()) or scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(f"{where}: rotary settings by layer type or for part of a head are not supported.")
    if kind not in family.rope_types:
        raise UsageError(
            f"{where}: rotary scaling {kind!r} is not computed by PaddleNLP's {family.model_class}; "
            f"it knows {', '.join(family.rope_types)}."
        )
    left_out = {
        "rope_parameters",
        "rope_scaling",
        "torch_dtype",
        "dtype",
        "architectures",
        "quantization_config",
        "pad_token_id",  # all it does is zero that row of the embedding in PaddleNLP's Mistral; transformers keeps it
    }
    kept = {key: value for key, value in values.items() if key not in left_out}
    kept["rope_theta"] = theta
    if kind == "llama3":
        kept["rope_scaling"] = scaling
    elif kind == "linear":
        kept.update(rope_scaling_type="linear", rope_scaling_factor=float(scaling["factor"]))
    if family.default_window is not None:
        kept["max_position_embeddings"] = positions_in_window(values, family.default_window)
    config_class, _ = family.classes()
    config = config_class(**kept)
    config.dtype = "float32"
    for name in ("use_flash_attention", "fuse_attention_qkv", "fuse_attention_ffn"):
        setattr(config, name, False)
    return family, config


def checked_family(values: dict[str, Any], where: Any) -> Family:
    """The family of a ``config.json`` whose sizes are numbers and whose switches PaddleNLP's model honours."""
    family = family_of(values, where)
    _refuse_ignored(values, family, where)
    return family


def positions_in_window(values: dict[str, Any], default: int) -> int:
    """How long a document may be: PaddleNLP knows no window, so no further than where the window would be felt.

    The defaults are those of transformers, where only null is no window.
    """
    positions, window = values.get("max_position_embeddings") or 131072, values.get("sliding_window", default)
    return int(positions if window is None else min(positions, window))


def _refuse_ignored(values: dict[str, Any], family: Family, where: Any) -> None:
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(values.get(name), int) or values[name] < 1:
            raise UsageError(f"{where}: config.json must give {name} as a whole number, not {values.get(name)!r}.")
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"):
        if values.get(name) is not None and (not isinstance(values[name], int) or values[name] < 1):
            raise UsageError(f"{where}: config.json must give {name} as a whole number or null, not {values[name]!r}.")
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    activations = (None, family.activation, *family.also_activation)
    ignored = {
        "head_dim": not family.has_head_dim and values.get("head_dim") not in (None, hidden // heads),
        "attention_bias": not family.has_attention_bias and bool(values.get("attention_bias")),
        "mlp_bias": bool(values.get("mlp_bias")),
        "hidden_act": values.get("hidden_act") not in activations,
        "hidden_activation": values.get("hidden_activation") not in (None, family.activation),
        "use_sliding_window": bool(values.get("use_sliding_window")),
        "use_bidirectional_attention": bool(values.get("use_bidirectional_attention")),
        "tie_word_embeddings": not family.can_tie and bool(values.get("tie_word_embeddings")),
        "quantization_config": bool(values.get("quantization_config")),
    }
    for name, is_ignored in ignored.items():
        if is_ignored:
            raise UsageError(
                f"{where}: {name} = {values.get(name)!r} is ignored by PaddleNLP's {family.model_class}, which "
                "would compute something else; use a model without it."
            )


def hf_config(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """``values`` for a Hugging Face directory of ``dtype`` weights that transformers 4, 5 and PaddleNLP read alike."""
    family = family_of(values, "config.json")
    theta, scaling = rope_of(values)
    kept = {k: v for k, v in values.items() if k not in ("dtype", "paddlenlp_version", "quantization_config")}
    kept.update(architectures=[family.model_class], torch_dtype=dtype, rope_theta=theta)
    kept.pop("rope_scaling_type", None)
    kept.pop("rope_scaling_factor", None)
    if scaling["rope_type"] == "default":
        kept.pop("rope_scaling", None)
    else:
        kept["rope_scaling"] = scaling
    if "rope_parameters" in kept:
        kept["rope_parameters"] = {**scaling, "rope_theta": theta}
    return kept

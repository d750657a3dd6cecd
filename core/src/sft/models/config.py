"""From a ``config.json`` (Hugging Face 4 or 5, or PaddleNLP) to a PaddleNLP config that means the same.

PaddleNLP silently ignores what it does not know: transformers 5's ``rope_parameters``, an explicit
``head_dim``, biases in Llama, sliding windows, most rotary scalings. What it would get wrong is translated
where it can be, and refused where it cannot.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

from sft.errors import UsageError
from sft.models.families import Family, family_of

_WAYS = ("use_flash_attention", "fuse_attention_qkv", "fuse_attention_ffn")
"""Ways of computing that are decided here."""
_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The numbers that a kind of scaling needs."""
_PADDLE_SCALING = ("rope_scaling_type", "rope_scaling_factor")
"""How PaddleNLP's config spells a linear scaling of the rotary embedding."""


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
    """The family and a PaddleNLP config for float32 training on one device; raises as :func:`checked_settings` does."""
    family, settings = checked_settings(values, where)
    config_class, _ = family.classes()
    try:
        # PaddleNLP keeps how it computed beside what it computed; how this process does is decided here.
        config = config_class(**{key: value for key, value in settings.items() if key not in _ways()})
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(
            f"{where}: PaddleNLP's {family.config_class} does not take what config.json says ({cause}); correct it."
        ) from error
    config.dtype = "float32"
    for name in _WAYS:
        setattr(config, name, False)
    return family, config


def checked_settings(values: dict[str, Any], where: Any) -> tuple[Family, dict[str, Any]]:
    """The family and what its PaddleNLP config is made with; paddle is not imported.

    Raises :class:`UsageError` for a setting that PaddleNLP's model would silently ignore.
    """
    family = checked_family(values, where)
    theta, scaling = _checked_rope(values, where)
    kind = scaling["rope_type"]
    if any(isinstance(value, dict) for value in scaling.values()) or scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(f"{where}: rotary settings by layer type or for part of a head are not supported.")
    if not isinstance(kind, str) or kind not in family.rope_types:
        raise UsageError(
            f"{where}: rotary scaling {kind!r} is not computed by PaddleNLP's {family.model_class}; "
            f"it knows {', '.join(family.rope_types)}."
        )
    for name in _NEEDS.get(kind, ()):
        if isinstance(scaling.get(name), bool) or not isinstance(scaling.get(name), (int, float)):
            raise UsageError(f"{where}: {kind} rotary scaling needs the number {name}, not {scaling.get(name)!r}.")
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
    return family, kept


def _checked_rope(values: dict[str, Any], where: Any) -> tuple[float, dict[str, Any]]:
    try:
        theta, scaling = rope_of(values)
        if not 0 < theta < math.inf:
            raise ValueError(f"rope_theta is {theta}")
        return theta, scaling
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(
            f"{where}: config.json describes the rotary embedding by something else than numbers above 0 and an object "
            f"of them ({error}); correct rope_theta, rope_scaling or rope_parameters."
        ) from error


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
    epsilon = values.get("rms_norm_eps", 1e-6)
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 < epsilon < math.inf:
        raise UsageError(f"{where}: config.json must give rms_norm_eps as a number above 0, not {epsilon!r}.")
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
    for name in ("use_long_sequence_strategies", "alibi"):
        if values.get(name):
            raise UsageError(
                f"{where}: {name} = {values[name]!r} makes PaddleNLP compute another model, which has not been "
                "verified here; use a model without it."
            )
    for name, is_ignored in ignored.items():
        if is_ignored:
            raise UsageError(
                f"{where}: {name} = {values.get(name)!r} is ignored by PaddleNLP's {family.model_class}, which "
                "would compute something else; use a model without it."
            )


def says(config: Any) -> dict[str, Any]:
    """A copy of what PaddleNLP's config says of a model, without what PaddleNLP itself counts as the way of computing
    it."""
    ways = _ways()
    return {key: copy.deepcopy(value) for key, value in vars(config).items() if key not in ways}


def _ways() -> set[str]:
    """Names in PaddleNLP's config that say how a model is computed, and nothing of what it is."""
    from paddlenlp.transformers.configuration_utils import LlmMetaConfig

    return {*LlmMetaConfig._get_defaults(), *_WAYS}


def changed_values(values: dict[str, Any], before: dict[str, Any], config: Any, who: str, where: Any) -> dict[str, Any]:
    """``values`` (a ``config.json``) with what ``who`` changed in PaddleNLP's config since it said ``before``, in
    Hugging Face's terms; :class:`UsageError` where they do not have it: the saved model would be another one.
    """
    after = says(config)
    changed = {key: value for key, value in after.items() if key not in before or before[key] != value}
    rope = {key: changed.pop(key) for key in ("rope_theta", "rope_scaling", *_PADDLE_SCALING) if key in changed}
    new = {**values, **changed}
    if rope:
        theta, scaling = rope_of(values)
        theta = rope.get("rope_theta", theta)
        if "rope_scaling" in rope:
            scaling = rope_of({"rope_scaling": rope["rope_scaling"]})[1]
        elif set(rope) & set(_PADDLE_SCALING):
            kind, factor = (after.get(key) for key in _PADDLE_SCALING)
            scaling = {"rope_type": kind, "factor": factor} if kind else {"rope_type": "default"}
        for key in ("rope_parameters", "rope_scaling", *_PADDLE_SCALING):
            new.pop(key, None)
        new["rope_theta"] = theta
        if scaling["rope_type"] != "default":
            new["rope_scaling"] = scaling
        if "rope_parameters" in values:
            new["rope_parameters"] = {**scaling, "rope_theta": theta}
    again = says(paddle_config(new, f"{where}, as {who} changes it")[1])
    lost = sorted(key for key in changed | rope if again.get(key) != after.get(key))
    if lost:
        raise UsageError(
            f"{who} sets {lost[0]} of the model's config to {after.get(lost[0])!r}, which config.json has no way to "
            "say, so the result would be read as another model; leave the plugin out."
        )
    return new


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

"""The model families: what ``model_type`` in a ``config.json`` means. One that is not here, nor a plugin's, is refused,
not guessed.

A family is listed when its logits, gradients and greedy answers equal those of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft.errors import UsageError
from sft.models.families import readers
from sft.models.families.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", readers.llama, "llama"),
        Family("qwen2", "Qwen2ForCausalLM", readers.qwen2, "qwen2"),
        Family("mistral", "MistralForCausalLM", readers.mistral, "mistral"),
        Family("gemma", "GemmaForCausalLM", readers.gemma, "gemma"),
        Family("qwen3", "Qwen3ForCausalLM", readers.qwen3),
        Family("gemma2", "Gemma2ForCausalLM", readers.gemma2),
        Family("gemma3_text", "Gemma3ForCausalLM", readers.gemma3),
        Family("phi3", "Phi3ForCausalLM", readers.phi3),
        Family("smollm3", "SmolLM3ForCausalLM", readers.smollm3),
        Family("granite", "GraniteForCausalLM", readers.granite),
        Family("olmo2", "Olmo2ForCausalLM", readers.olmo2),
        Family("glm4", "Glm4ForCausalLM", readers.glm4),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            readers.mixtral,
            renamed=(
                ("block_sparse_moe", "mlp"),
                ("w1", "gate_proj"),
                ("w2", "down_proj"),
                ("w3", "up_proj"),
            ),
        ),
        Family("qwen2_moe", "Qwen2MoeForCausalLM", readers.qwen2_moe),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", readers.qwen3_moe),
    )
}


def family_of(config: Mapping[str, Any], where: Any, offered: Mapping[str, Family] | None = None) -> Family:
    """The family of a ``config.json``. ``offered``: those that plugins have for it, by what a message calls the plugin.

    Raises :class:`UsageError` where nobody has one, with those that there are, and where more than one has.
    """
    model_type = config.get("model_type")
    own = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    candidates = {**({} if own is None else {"sft itself": own}), **(offered or {})}
    if not candidates and isinstance(config.get("text_config"), dict):
        raise UsageError(
            f"{where}: model_type {model_type!r} reads more than text (its config has a text_config of its own), and "
            "only models of text alone are known here; use one, such as google/gemma-3-1b-it."
        )
    if not candidates:
        raise UsageError(
            f"{where}: model_type {model_type!r} is not a family that is known here; use one of {', '.join(FAMILIES)}, "
            "or a plugin that reads it (--plugin NAME)."
        )
    if len(candidates) > 1:
        raise UsageError(
            f"{where}: {' and '.join(candidates)} both read model_type {model_type!r}; leave a plugin out."
        )
    return next(iter(candidates.values()))

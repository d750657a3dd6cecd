"""The model families: what ``model_type`` in a ``config.json`` means. One that is not here is refused, not guessed.

A family is listed when its logits, gradients and greedy answers equal those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sft.errors import UsageError
from sft.models.architecture import Architecture
from sft.models.families import readers
from sft.models.families.values import Values


@dataclass(frozen=True)
class Family:
    """How a family's checkpoints are read and written."""

    model_type: str
    causal_lm: str
    """Its class in transformers, which ``architectures`` of a config names."""
    read: Callable[[Values], Architecture]
    paddle_prefix: str | None = None
    """The backbone's name in PaddleNLP's layout; None: PaddleNLP has no such family."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Names in Hugging Face's files and what they are called here, as pairs of parts of names."""

    def architecture(self, values: Mapping[str, Any], where: Any) -> Architecture:
        """What a ``config.json`` describes; :class:`UsageError` naming ``where`` for what cannot be computed."""
        return self.read(Values(values, where))

    def from_file(self, name: str, layout: str) -> str:
        """A tensor's name in a file of ``layout`` ("hf" or "paddle") → its parameter's."""
        if layout == "paddle":
            return _swap(name, f"{self.paddle_prefix}.", "model.")
        for theirs, ours in self.renamed:
            name = name.replace(theirs, ours)
        return name

    def to_file(self, name: str, layout: str) -> str:
        """A parameter's name → its tensor's in a file of ``layout``."""
        if layout == "paddle":
            return _swap(name, "model.", f"{self.paddle_prefix}.")
        for theirs, ours in self.renamed:
            name = name.replace(ours, theirs)
        return name


def _swap(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name.startswith(old) else name


def is_transposed(name: str, dimensions: int) -> bool:
    """Whether files in Hugging Face's layout hold a tensor as [out, in] that is [in, out] here: every matrix but the
    embedding is a Linear's."""
    return dimensions == 2 and not name.endswith("embed_tokens.weight")


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
                (".block_sparse_moe.", ".mlp."),
                (".w1.weight", ".gate_proj.weight"),
                (".w2.weight", ".down_proj.weight"),
                (".w3.weight", ".up_proj.weight"),
            ),
        ),
        Family("qwen2_moe", "Qwen2MoeForCausalLM", readers.qwen2_moe),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", readers.qwen3_moe),
    )
}


def family_of(config: Mapping[str, Any], where: Any) -> Family:
    """The family of a ``config.json``; :class:`UsageError` with those there are, if it is none of them."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UsageError(
            f"{where}: model_type {model_type!r} is not a family that is known here; use one of {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]

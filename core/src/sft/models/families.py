"""The model families whose weights, seams and logits are verified. Another one is refused, not guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sft.errors import UsageError
from sft.models import corrections


@dataclass(frozen=True)
class Family:
    """How PaddleNLP's classes of one ``model_type`` relate to Hugging Face's names and settings."""

    model_type: str
    config_class: str
    model_class: str
    prefix: str
    """The backbone's name in paddle; Hugging Face calls it ``model``."""
    rope_types: tuple[str, ...]
    """Rotary scalings that PaddleNLP's class computes as Hugging Face does."""
    mask_argument: str = "attn_mask_startend_row_indices"
    """The backbone's argument that carries ``startend_row_indices`` to the layers; see ``attention.py``."""
    activation: str = "silu"
    norm_offset: float = 0.0
    """What RMSNorm adds to its weight before it multiplies."""
    has_head_dim: bool = False
    """Whether PaddleNLP's class reads ``head_dim`` from the config; others have hidden size / heads."""
    has_attention_bias: bool = False
    """Whether PaddleNLP's class has the biases that ``attention_bias`` asks for."""
    can_tie: bool = True
    """Whether PaddleNLP's class ties lm_head to the embedding when the config says so."""
    also_activation: tuple[str, ...] = ()
    """Other words of ``hidden_act`` that mean ``activation``."""
    default_window: int | None = None
    """``sliding_window`` where the config does not give one; None: the family has no windows."""
    scales_embeddings: bool = False
    """Whether the backbone multiplies what goes into its first block by √hidden."""
    correct: Callable[[Any], None] | None = None
    """Puts right on the instance what PaddleNLP's class computes or names otherwise than Hugging Face's."""

    def to_hf(self, name: str) -> str:
        """A parameter's paddle name → its Hugging Face name."""
        return "model." + name[len(self.prefix) + 1 :] if name.startswith(self.prefix + ".") else name

    def to_paddle(self, name: str) -> str:
        """A parameter's Hugging Face name → its paddle name."""
        return self.prefix + "." + name[len("model.") :] if name.startswith("model.") else name

    @staticmethod
    def is_transposed(name: str, dimensions: int) -> bool:
        """Whether the two layouts hold this tensor transposed: every matrix but the embedding is a Linear's."""
        return dimensions == 2 and not name.endswith("embed_tokens.weight")

    def classes(self) -> tuple[Any, Any]:
        """PaddleNLP's config and causal-LM classes (imports paddle)."""
        from paddlenlp import transformers

        return getattr(transformers, self.config_class), getattr(transformers, self.model_class)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaConfig", "LlamaForCausalLM", "llama", ("default", "linear", "llama3")),
        Family("qwen2", "Qwen2Config", "Qwen2ForCausalLM", "qwen2", ("default",), has_attention_bias=True),
        Family(
            "mistral",
            "MistralConfig",
            "MistralForCausalLM",
            "mistral",
            ("default",),
            mask_argument="attention_mask",
            can_tie=False,
            default_window=4096,
        ),
        Family(
            "gemma",
            "GemmaConfig",
            "GemmaForCausalLM",
            "gemma",
            ("default",),
            mask_argument="attention_mask",
            activation="gelu_pytorch_tanh",
            also_activation=("gelu",),  # the first releases say so and mean the tanh form, as transformers reads it
            correct=corrections.gemma,
            scales_embeddings=True,
            norm_offset=1.0,
            has_head_dim=True,
        ),
    )
}


def family_of(config: dict[str, Any], where: Any) -> Family:
    """The family of a ``config.json``; :class:`UsageError` with those there are, if it is none of them."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UsageError(
            f"{where}: model_type {model_type!r} has not been verified here; use one of {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]

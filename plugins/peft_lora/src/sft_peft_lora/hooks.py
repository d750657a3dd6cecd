"""The hooks that plugin ``lora`` publishes for its refinements. Each has one provider at most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import sft


class LoraForm(Protocol):
    """What is more than W + s·A·B in the layers of a refinement: further tensors of each layer, and another way of
    computing with all of them. It is asked for before there is a model, without paddle.

    Attributes:
        config: Entries of ``adapter_config.json`` by which PEFT knows such an adapter (``{"use_dora": True}``). They
            are written, and an adapter without them is not read as one.
        tensors: What trains beside A and B, by attribute of the layer: how the file calls it after the target's name,
            and what each dimension follows: "in" the Linear's inputs, "out" its outputs, None the rank. Float32, zero
            where an adapter begins; matrices lie in files as [out, in].
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[str | None, ...]]]

    def layer(self, base: type) -> type:
        """The class of layers: a subclass of ``base``, whose docstring says what it has for one
        (:class:`sft_peft_lora.layer.LoraLinear`). It keeps to :class:`sft.AdapterLayer`. With a method
        ``begin(weight)``, that gets the Linear's whole weight, float32 [in, out], when A and B have begun."""
        ...

    def merged(self, weight: Any, update: Any, tensors: Mapping[str, Any]) -> Any:
        """The merged weight of a Linear, float32 [out, in], of the base's and of s·(A·B)ᵀ. ``tensors`` are the further
        ones by attribute, as the layer holds them."""
        ...


@sft.single
def lora_scaling(rank: int, alpha: float) -> float:
    """The factor s of s·A·B. Without a provider: α / r (arXiv 2106.09685, section 4.1)."""


@sft.single
def lora_default_alpha(rank: int) -> float:
    """α where ``lora_alpha`` is unset. Without a provider: 2·r, as PaddleNLP's script has it."""


@sft.single
def lora_initialize(layer: Any, name: str, rng: Any) -> bool:
    """Set ``layer.lora_A`` [in, r] and ``layer.lora_B`` [r, out] (and the base, if it must change); return True.

    ``layer`` is a :class:`sft_peft_lora.layer.LoraLinear` over its base, ``name`` the target's Hugging Face name,
    ``rng`` a numpy Generator that depends on the seed and the name alone. Without a provider: A Kaiming-uniform, B 0.
    """


@sft.single
def lora_export(layer: Any) -> tuple[Any, Any]:
    """The pair (A [in, r'], B [r', out]), float32 numpy, that adds the same to the ORIGINAL base as the trained
    layer does to its own. Without a provider: the layer's A and B."""


@sft.single
def lora_form() -> LoraForm:
    """How layers compute that are more than W + s·A·B, and what they hold and save for it: :class:`LoraForm`.
    Called wherever an adapter is made, planned, read or merged. Without a provider: plain LoRA."""

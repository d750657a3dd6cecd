"""Plugin ``dora``: LoRA of directions, and a magnitude for each output (arXiv 2402.09353)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import sft

if TYPE_CHECKING:
    from sft_peft_lora.hooks import LoraForm


class Dora(sft.Plugin):
    """y = x·V ⊙ m/‖V‖ + b with V = W + s·A·B. ‖V‖ [out] is the norm of each output's weights over all inputs, and
    trainable m [out] begins as ‖W‖, so that y begins as x·W + b."""

    name = "dora"
    api_version = ">=1.1,<2"
    summary = "Train the magnitude of each output's weights beside LoRA's update of their direction."
    reference = "arXiv 2402.09353"
    requires = ("lora",)

    config: Mapping[str, Any] = MappingProxyType({"use_dora": True})
    tensors: Mapping[str, tuple[str, tuple[str | None, ...]]] = MappingProxyType(
        {"magnitude": ("lora_magnitude_vector", ("out",))}
    )

    @sft.hookimpl
    def lora_form(self) -> LoraForm:
        return self

    def layer(self, base: type) -> type:
        """DoRA's layers, derived from LoRA's."""
        from sft_peft_lora.dora_layer import dora_linear

        return dora_linear(base)

    def merged(self, weight: Any, update: Any, tensors: Mapping[str, Any]) -> Any:
        """V ⊙ m/‖V‖, float32 [out, in]."""
        from sft_peft_lora.dora_layer import SMALLEST

        directed = weight + update
        norm = sft.row_sums(directed.square()).clip(min=SMALLEST).sqrt()
        return directed * (tensors["magnitude"].unsqueeze(-1) / norm)

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: Any) -> None:
        for linear in outline.targets():
            if any(weight.name == "lora_A" for weight in linear.weights):
                # lora has added the magnitude, as it adds what a form declares. For its gradient x·V is kept.
                # Squares of V's rows are added up over the ranks that divide these; those of W's stay.
                linear.add("squares", (linear.out_features,), ("out",), trains=False)
                linear.kept_outputs += linear.out_features
                linear.summed += linear.out_features

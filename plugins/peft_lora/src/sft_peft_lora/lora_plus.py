"""Plugin ``lora-plus``: B learns faster than A (arXiv 2402.12354)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import sft

if TYPE_CHECKING:
    from sft import ParameterGroup, Run

_OF_EMBEDDING = "model.embed_tokens.lora_B"
"""An embedding begins the other way round, with A zero."""


@dataclass
class LoraPlusOptions:
    lora_plus_scale: float = sft.option(16.0, "learning rate of B divided by that of A", above=0)


class LoraPlus(sft.Plugin):
    """lr(B) = λ · lr(A), in parameter groups of their own."""

    name = "lora-plus"
    api_version = 1
    summary = "Train LoRA's B with a larger learning rate than its A."
    reference = "arXiv 2402.12354"
    requires = ("lora",)
    Options = LoraPlusOptions

    @sft.hookimpl
    def sft_parameter_groups(self, run: Run, groups: list[ParameterGroup]) -> None:
        for group in list(groups):
            names = [name for name in group.parameters if name.endswith(".lora_B") and name != _OF_EMBEDDING]
            faster = {name: group.parameters[name] for name in names}
            if not faster:
                continue
            for name in faster:
                del group.parameters[name]
            scaled = group.learning_rate * self.options.lora_plus_scale
            groups.append(replace(group, name=f"{group.name}_lora_B", parameters=faster, learning_rate=scaled))
        groups[:] = [group for group in groups if group.parameters]

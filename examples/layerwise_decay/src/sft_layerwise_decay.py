"""Plugin ``layerwise-decay``: layers near the input learn more slowly (arXiv 1801.06146, 2003.10555)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sft


@dataclass
class Options:
    layerwise_decay_factor: float = sft.option(
        0.9, "learning rate of a block divided by that of the block after it", above=0, maximum=1
    )


class LayerwiseDecay(sft.Plugin):
    """Parameters after the blocks: rate r. Block k of n: r·ξ^(n-1-k), k from 0. The embeddings: r·ξ^n, also where
    they are the head too."""

    name = "layerwise-decay"
    api_version = ">=1.1,<2"
    summary = "Layers near the input learn more slowly."
    reference = "arXiv 1801.06146"
    Options = Options

    @sft.hookimpl
    def sft_parameter_groups(self, run, groups):
        factor, divided = self.options.layerwise_decay_factor, []
        shape = run.model.architecture
        embeddings = {id(parameter) for parameter in run.model.get_input_embeddings().parameters()}

        def level(name, parameter):
            """0: before the blocks; 1 to n: in the block, from the first; n too for what comes after them."""
            if id(parameter) in embeddings:
                return 0
            if name.startswith(f"{shape.block_names}."):
                return int(name.removeprefix(f"{shape.block_names}.").partition(".")[0]) + 1
            return len(shape.blocks)

        for group in groups:
            levels = {}
            for name, parameter in group.parameters.items():
                levels.setdefault(level(name, parameter), {})[name] = parameter
            for number, parameters in sorted(levels.items()):
                rate = group.learning_rate * factor ** (len(shape.blocks) - number)
                divided.append(
                    replace(group, name=f"{group.name}_level_{number}", parameters=parameters, learning_rate=rate)
                )
        groups[:] = divided

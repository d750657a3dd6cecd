"""A third-party plugin, as docs/plugins.md shows it."""

from dataclasses import dataclass

import sft


@dataclass
class LastBlocksOptions:
    blocks: int = sft.option(1, "transformer blocks at the end that train", minimum=1)


class LastBlocks(sft.Plugin):
    """Trains the last transformer blocks and nothing else."""

    name = "last-blocks"
    api_version = ">=1,<2"
    summary = "Train the last transformer blocks alone."
    Options = LastBlocksOptions

    @sft.hookimpl
    def sft_check(self, run):
        adapter = run.plugins.provider("sft_export_adapter")
        if adapter is not None:  # over a quantized model there always is one
            raise sft.UsageError(
                f"last-blocks trains the model itself, and {adapter} freezes it; leave one of them out."
            )

    @sft.hookimpl
    def sft_adapt_model(self, run, model):
        first = len(model.architecture.blocks) - self.options.blocks
        for parameter in model.parameters():
            parameter.stop_gradient = True
        for target in sft.target_layers(model):
            if int(target.name.split(".")[2]) >= first:
                target.layer.weight.stop_gradient = False

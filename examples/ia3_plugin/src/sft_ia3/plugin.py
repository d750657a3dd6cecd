"""Plugin ``ia3``: keys, values and what is inside the MLP, each scaled by a vector that trains (arXiv 2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sft

if TYPE_CHECKING:
    from sft import AdapterFiles, AdapterMerger, Run


@dataclass
class Ia3Options:
    ia3_target_modules: list[str] = sft.option(
        ["k_proj", "v_proj", "down_proj"], "layer names (q_proj) or regular expressions over whole names"
    )
    ia3_feedforward_modules: list[str] = sft.option(
        ["down_proj"], "those of the targets whose inputs are scaled, by name; of the others it is the outputs"
    )


class Ia3(sft.Plugin):
    """y = l ⊙ (x·W + b), or y = (l ⊙ x)·W + b; l begins as ones, so that the model begins as its base."""

    name = "ia3"
    api_version = 1
    summary = "Scale keys, values and inner activations by learned vectors ((IA)³)."
    reference = "arXiv 2205.05638"
    conflicts = ("lora", "vera")
    Options = Ia3Options

    def __init__(self, options: Ia3Options) -> None:
        super().__init__(options)
        self.layers: dict[str, Any] = {}
        """The adapted layers by their target's Hugging Face name."""
        self.targets: list[str] = []
        """Names of all layers that could have been adapted."""

    @sft.hookimpl
    def sft_check(self, run: Run) -> None:
        missing = set(self.options.ia3_feedforward_modules) - set(self.options.ia3_target_modules)
        if missing:
            raise sft.UsageError(
                f"ia3_feedforward_modules names {', '.join(sorted(missing))}, which ia3_target_modules does not; add "
                "it there, or leave it out."
            )

    @sft.hookimpl
    def sft_adapt_model(self, run: Run, model: Any) -> None:
        self.targets = [target.name for target in sft.target_layers(model)]
        for target in sft.target_layers(model, self.options.ia3_target_modules):
            self._wrap(target, self._feeds(target.name))
        run.say(f"ia3: {len(self.layers)} layers")

    @sft.hookimpl(optionalhook=True)  # of parallel-4d, which need not be installed
    def parallel_outline(self, outline: Any) -> None:
        for linear in outline.targets(self.options.ia3_target_modules):
            side = "in" if self._feeds(linear.name) else "out"
            length = linear.in_features if side == "in" else linear.out_features
            linear.add("scale", (length,), (side,))
            linear.kept += length  # what is scaled, for the gradient of the scale

    @sft.hookimpl
    def sft_export_adapter(self, run: Run, model: Any) -> AdapterFiles:
        from sft_ia3.files import adapter_files

        feeding = [name for name in self.layers if self._feeds(name)]
        modules = [sft.module_names(names, self.targets) for names in (self.layers, feeding)]
        scales = {name: layer.scale.numpy() for name, layer in self.layers.items()}
        return adapter_files(scales, *modules, base=str(run.settings.model.model_name_or_path))

    @sft.hookimpl
    def sft_import_adapter(self, model: Any, folder: Path) -> bool:
        from sft_ia3.files import Ia3Folder

        targets = {target.name: target for target in sft.target_layers(model)}
        for name, (scale, feeds) in Ia3Folder(folder).scales.items():
            target = targets.get(name)
            if target is None or len(scale) != (target.in_features if feeds else target.out_features):
                raise sft.UsageError(f"The adapter in {folder} has weights for {name}, which do not fit this model.")
            self._wrap(target, feeds).scale.set_value(scale)
        return True

    @sft.hookimpl
    def sft_adapter_merger(self, folder: Path) -> AdapterMerger:
        from sft_ia3.files import Ia3Merger

        return Ia3Merger(folder)

    def _feeds(self, name: str) -> bool:
        """Whether the inputs of a target are scaled."""
        return name.rpartition(".")[2] in self.options.ia3_feedforward_modules

    def _wrap(self, target: Any, feeds: bool) -> Any:
        from sft_ia3.layer import ScaledInputs, ScaledOutputs

        kind, length = (ScaledInputs, target.in_features) if feeds else (ScaledOutputs, target.out_features)
        layer = kind(target.layer, length)
        target.replace(layer)
        self.layers[target.name] = layer
        return layer

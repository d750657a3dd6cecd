"""Plugin ``dora``: a direction and a magnitude for each weight (arXiv 2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sft

if TYPE_CHECKING:
    from sft import AdapterFiles, AdapterMerger, Run


@dataclass
class DoraOptions:
    dora_rank: int = sft.option(8, "rank r of the update of the direction", minimum=1)
    dora_alpha: float | None = sft.option(None, "α; the update is scaled by α/r; unset: 2·r", above=0)
    dora_target_modules: list[str] = sft.option(
        [], "layer names (q_proj) or regular expressions over whole names; unset: every Linear of the blocks"
    )


class Dora(sft.Plugin):
    """y = x·V ⊙ m/‖V‖, V = W + s·A·B; A is Kaiming-uniform, B zero, and m begins as ‖W‖, so that y begins as x·W."""

    name = "dora"
    api_version = 1
    summary = "Weight-decomposed low-rank adaptation (DoRA)."
    reference = "arXiv 2402.09353"
    conflicts = ("lora",)
    Options = DoraOptions

    def __init__(self, options: DoraOptions) -> None:
        super().__init__(options)
        self.layers: dict[str, Any] = {}
        """The adapted layers by their target's Hugging Face name."""
        self.targets: list[str] = []
        """Names of all layers that could have been adapted."""

    @sft.hookimpl
    def sft_adapt_model(self, run: Run, model: Any) -> None:
        rank = self.options.dora_rank
        self.targets = [target.name for target in sft.target_layers(model)]
        for target in sft.target_layers(model, self.options.dora_target_modules):
            layer = self._wrap(target, rank, self._alpha / rank)
            bound = target.in_features**-0.5
            a = run.rng(target.name).uniform(-bound, bound, (target.in_features, rank))
            layer.lora_A.set_value(a.astype("float32"))
            weight = run.strategy.linear_weight(target.layer)  # the whole of it, where processes share it
            layer.magnitude.set_value(weight.square().sum(axis=0).sqrt())
        run.say(f"dora: {len(self.layers)} layers, rank {rank}")

    @sft.hookimpl(optionalhook=True)  # of parallel-4d, which need not be installed
    def parallel_outline(self, outline: Any) -> None:
        rank = self.options.dora_rank
        for linear in outline.targets(self.options.dora_target_modules):
            linear.add("lora_A", (linear.in_features, rank), ("in", None))
            linear.add("lora_B", (rank, linear.out_features), (None, "out"))
            linear.add("magnitude", (linear.out_features,), ("out",))
            linear.kept += rank + linear.out_features  # x·A, and x·V for the gradient of m

    @sft.hookimpl
    def sft_export_adapter(self, run: Run, model: Any) -> AdapterFiles:
        from sft_dora.files import adapter_files

        tensors = {
            name: (layer.lora_A.numpy(), layer.lora_B.numpy(), layer.magnitude.numpy())
            for name, layer in self.layers.items()
        }
        base, modules = str(run.settings.model.model_name_or_path), sft.module_names(self.layers, self.targets)
        return adapter_files(tensors, modules, self.options.dora_rank, self._alpha, base)

    @sft.hookimpl
    def sft_import_adapter(self, model: Any, folder: Path) -> bool:
        from sft_dora.files import DoraFolder

        adapter = DoraFolder(folder)
        targets = {target.name: target for target in sft.target_layers(model)}
        for name, (a, b, magnitude) in adapter.tensors.items():
            target = targets.get(name)
            if target is None or (target.in_features, target.out_features) != (a.shape[0], b.shape[1]):
                raise sft.UsageError(f"The adapter in {folder} has weights for {name}, which do not fit this model.")
            layer = self._wrap(target, adapter.rank, adapter.scaling)
            layer.lora_A.set_value(a)
            layer.lora_B.set_value(b)
            layer.magnitude.set_value(magnitude)
        return True

    @sft.hookimpl
    def sft_adapter_merger(self, folder: Path) -> AdapterMerger:
        from sft_dora.files import DoraMerger

        return DoraMerger(folder)

    @property
    def _alpha(self) -> float:
        return 2.0 * self.options.dora_rank if self.options.dora_alpha is None else float(self.options.dora_alpha)

    def _wrap(self, target: Any, rank: int, scaling: float) -> Any:
        from sft_dora.layer import DoraLinear

        layer = DoraLinear(target.layer, target.in_features, target.out_features, rank, scaling)
        target.replace(layer)
        self.layers[target.name] = layer
        return layer

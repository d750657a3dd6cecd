"""Plugin ``vera``: one shared random pair for all layers; two vectors a layer train (arXiv 2310.11454)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sft
from sft import AdapterFiles, UsageError

if TYPE_CHECKING:
    import numpy as np

    from sft import AdapterMerger, Run

EVERY = [".+"]
"""A pattern that routers of experts match too, which are adapted where they are named."""


@dataclass
class VeraOptions:
    vera_rank: int = sft.option(8, "rank r of the shared pair", minimum=1, maximum=65536)
    vera_d_initial: float = sft.option(0.1, "initial value of the vectors d")
    vera_dropout: float = sft.option(0.0, "dropout on the update's input, training only", minimum=0, maximum=0.99)
    vera_target_modules: list[str] = sft.option(
        [], "layer names (q_proj) or regular expressions over whole names; unset: every Linear of the blocks"
    )


class Vera(sft.Plugin):
    """y = x·W + ((x·A) ⊙ d)·B ⊙ b; A and B are Kaiming-uniform, frozen, and sliced to each layer's shape."""

    name = "vera"
    api_version = 1
    summary = "Vector-based random adaptation: two vectors a layer over one shared frozen pair."
    reference = "arXiv 2310.11454"
    conflicts = ("lora",)
    Options = VeraOptions

    def __init__(self, options: VeraOptions) -> None:
        super().__init__(options)
        self.layers: dict[str, Any] = {}
        """The adapted layers by their target's Hugging Face name."""
        self.targets: list[str] = []
        """Names of all layers that could have been adapted."""
        self.pair: Any = None

    @sft.hookimpl
    def sft_adapt_model(self, run: Run, model: Any) -> None:
        from sft_peft_vera.layer import SharedPair

        self.targets = [target.name for target in sft.target_layers(model, EVERY)]
        targets = sft.target_layers(model, self.options.vera_target_modules)
        rank, rng = self.options.vera_rank, run.rng("vera projections")
        widest = max(target.in_features for target in targets), max(target.out_features for target in targets)
        self.pair = SharedPair(_kaiming(rng, (rank, widest[0]), widest[0]).T, _kaiming(rng, (widest[1], rank), rank).T)
        self._wrap(targets)
        count = sum(layer.vera_d.size + layer.vera_b.size for layer in self.layers.values())
        run.say(f"vera: {len(self.layers)} layers, rank {rank}, {int(count):,} trainable parameters")

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: Any) -> None:
        targets = outline.targets(self.options.vera_target_modules)
        rank = self.options.vera_rank
        for linear in targets:
            linear.add("vera_d", (rank,), (None,))
            linear.add("vera_b", (linear.out_features,), ("out",))
            # x·A and (x·A) ⊙ d, and with dropout its input too; B ⊙ b.
            linear.kept += 2 * rank + (linear.in_features if self.options.vera_dropout else 0)
            linear.kept_once += rank * linear.out_features
        # The pair of the widest layer; all others see the beginning of its memory.
        widest = max(linear.in_features for linear in targets), max(linear.out_features for linear in targets)
        outline.share("vera_A", (widest[0], rank), (None, None), trains=False)
        outline.share("vera_B", (rank, widest[1]), (None, None), trains=False)

    @sft.hookimpl
    def sft_export_adapter(self, run: Run, model: Any) -> AdapterFiles:
        from sft_peft_vera.files import adapter_files

        vectors = {name: (layer.vera_b.numpy(), layer.vera_d.numpy()) for name, layer in self.layers.items()}
        seed, base = run.settings.training.seed, str(run.settings.model.model_name_or_path)
        pair, modules = (self.pair.a.numpy(), self.pair.b.numpy()), sft.module_names(self.layers, self.targets)
        return adapter_files(vectors, *pair, modules, self.options, seed, base)

    @sft.hookimpl
    def sft_state(self, run: Run) -> dict[str, Any]:
        return {"A": self.pair.a.numpy(), "B": self.pair.b.numpy()}

    @sft.hookimpl
    def sft_restore(self, run: Run, state: dict[str, Any]) -> None:
        # Drawn again they should be the same; the vectors are worth nothing over others.
        self.pair.set(state["A"], state["B"])

    @sft.hookimpl
    def sft_import_adapter(self, model: Any, folder: Path) -> bool:
        from sft_peft_vera.files import VeraFolder
        from sft_peft_vera.layer import SharedPair

        adapter = VeraFolder(folder)
        self.pair = SharedPair(adapter.a, adapter.b)
        targets = {target.name: target for target in sft.target_layers(model, EVERY)}
        for name in adapter.vectors:
            target = targets.get(name)
            if target is None or not adapter.fits(name, target.in_features, target.out_features):
                raise UsageError(f"The adapter in {folder} has vectors for {name}, which do not fit this model.")
        self._wrap([targets[name] for name in adapter.vectors])
        for name, (b, d) in adapter.vectors.items():
            self.layers[name].vera_b.set_value(b)
            self.layers[name].vera_d.set_value(d)
        return True

    @sft.hookimpl
    def sft_adapter_merger(self, folder: Path) -> AdapterMerger:
        from sft_peft_vera.files import VeraMerger

        return VeraMerger(folder)

    def _wrap(self, targets: list[Any]) -> None:
        from sft_peft_vera.layer import VeraLinear

        for target in targets:
            layer = VeraLinear(
                target.layer,
                target.in_features,
                target.out_features,
                self.pair,
                self.options.vera_d_initial,
                self.options.vera_dropout,
            )
            target.replace(layer)
            self.layers[target.name] = layer


def _kaiming(rng: np.random.Generator, shape: tuple[int, int], fan: int) -> np.ndarray:
    """Kaiming-uniform: U(±√(6 / fan)), float32."""
    bound = math.sqrt(6.0 / fan)
    return rng.uniform(-bound, bound, shape).astype("float32")

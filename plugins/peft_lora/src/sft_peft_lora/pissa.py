"""Plugin ``pissa``: LoRA that begins at the principal part of each weight (arXiv 2404.02948)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sft

if TYPE_CHECKING:
    import numpy as np

    from sft import Run


@dataclass
class PissaOptions:
    pissa_niter: int = sft.option(8, "iterations of the randomized SVD; 0: the exact SVD", minimum=0)


class Pissa(sft.Plugin):
    """W = U S Vᵀ; A₀ = U_r √S_r / √s, B₀ = √S_r V_rᵀ / √s train from there, over the frozen W − s·A₀·B₀.

    The base is left as it is and s·x·A₀·B₀ is subtracted, which is the same and needs no second copy of W, quantized or
    not. What is saved is the equivalent LoRA of rank 2r over the original base: A' = [A, A₀], B' = [B; −B₀].
    """

    name = "pissa"
    api_version = 1
    summary = "Start LoRA from the principal singular vectors of each weight."
    reference = "arXiv 2404.02948"
    requires = ("lora",)
    Options = PissaOptions

    def __init__(self, options: PissaOptions) -> None:
        super().__init__(options)
        self.layers: dict[str, Any] = {}
        self.run: Run | None = None

    @sft.hookimpl
    def sft_check(self, run: Run) -> None:
        self.run = run

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: Any) -> None:
        for linear in outline.targets():
            pair = [weight for weight in linear.weights if weight.name in ("lora_A", "lora_B")]
            for weight in pair:
                linear.add(f"pissa_{weight.name[-1]}", weight.shape, weight.sides, trains=False)
            linear.kept += sum(weight.shape[1] for weight in pair[:1])

    @sft.hookimpl
    def lora_initialize(self, layer: Any, name: str, rng: np.random.Generator) -> bool:
        a, b = self._principal(layer, rng)
        root = layer.scaling**0.5
        layer.lora_A.set_value(a / root)
        layer.lora_B.set_value(b / root)
        layer.subtract(a / root, b / root)
        self.layers[name] = layer
        return True

    def _principal(self, layer: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A₀ and B₀ but for √s; where a checkpoint brings both pairs, nothing is decomposed for them."""
        import numpy as np

        from sft_peft_lora.svd import principal

        if self.run is not None and self.run.resumes:
            shapes = (layer.in_features, layer.rank), (layer.rank, layer.out_features)
            return np.zeros(shapes[0], np.float32), np.zeros(shapes[1], np.float32)
        read = sft.linear_weight if self.run is None else self.run.strategy.linear_weight
        weight = read(layer.base).numpy()
        return principal(weight, layer.rank, self.options.pissa_niter, rng)

    @sft.hookimpl
    def lora_export(self, layer: Any) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        a, b = layer.subtracted()
        return np.concatenate([layer.lora_A.numpy(), a], axis=1), np.concatenate([layer.lora_B.numpy(), -b], axis=0)

    @sft.hookimpl
    def sft_state(self, run: Run) -> dict[str, np.ndarray]:
        """The subtracted pair, B₀ with the sign that it has in what is exported, so that a checkpoint keeps it once."""
        state = {}
        for name, layer in self.layers.items():
            state[f"{name}.A"], b = layer.subtracted()
            state[f"{name}.minus_B"] = -b
        return state

    @sft.hookimpl
    def sft_restore(self, run: Run, state: dict[str, Any]) -> None:
        for name, layer in self.layers.items():
            older = f"{name}.B" in state  # checkpoints of before have B₀ itself
            layer.subtract(state[f"{name}.A"], state[f"{name}.B"] if older else -state[f"{name}.minus_B"])

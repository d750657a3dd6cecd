"""Plugin ``pissa``: LoRA that begins at the principal part of each weight (arXiv 2404.02948)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import sft
from sft import Run, UsageError


@dataclass
class PissaOptions:
    pissa_niter: int = sft.option(8, "iterations of the randomized SVD; 0: the exact SVD", minimum=0)


class Pissa(sft.Plugin):
    """W = U S Vᵀ; A₀ = U_r √S_r / √s, B₀ = √S_r V_rᵀ / √s train from there, over the frozen W − s·A₀·B₀.

    The base is left as it is and s·x·A₀·B₀ is subtracted, which is the same and needs no second copy of W, quantized or
    not. What is saved is the equivalent LoRA of rank 2r over the original base: A' = [A, A₀], B' = [B; −B₀].
    """

    name = "pissa"
    summary = "Start LoRA from the principal singular vectors of each weight."
    reference = "arXiv 2404.02948"
    requires = ("lora",)
    Options = PissaOptions

    def __init__(self, options: PissaOptions) -> None:
        super().__init__(options)
        self.layers: dict[str, Any] = {}

    @sft.hookimpl
    def sft_check(self, run: Run) -> None:
        if run.settings.options["lora"].lora_path is not None:
            raise UsageError("pissa initialises what lora_path would load; leave one of them out.")

    @sft.hookimpl
    def lora_initialize(self, layer: Any, name: str, rng: np.random.Generator) -> bool:
        weight = layer.base.dequantize() if hasattr(layer.base, "dequantize") else layer.base.weight
        a, b = principal(weight.numpy(), layer.rank, self.options.pissa_niter, rng)
        root = np.float32(np.sqrt(layer.scaling))
        layer.lora_A.set_value(a / root)
        layer.lora_B.set_value(b / root)
        layer.subtract(a / root, b / root)
        self.layers[name] = layer
        return True

    @sft.hookimpl
    def lora_export(self, layer: Any) -> tuple[np.ndarray, np.ndarray]:
        a, b = layer.subtracted()
        return np.concatenate([layer.lora_A.numpy(), a], axis=1), np.concatenate([layer.lora_B.numpy(), -b], axis=0)

    @sft.hookimpl
    def sft_state(self, run: Run) -> dict[str, np.ndarray]:
        pairs = {name: layer.subtracted() for name, layer in self.layers.items()}
        return {f"{name}.{half}": pairs[name][half == "B"] for name in pairs for half in "AB"}

    @sft.hookimpl
    def sft_restore(self, run: Run, state: dict[str, Any]) -> None:
        for name, layer in self.layers.items():
            layer.subtract(state[f"{name}.A"], state[f"{name}.B"])


def principal(
    weight: np.ndarray, rank: int, iterations: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The best rank-r factors of ``weight`` [in, out]: U_r √S_r [in, r] and √S_r V_rᵀ [r, out], float32.

    With ``iterations`` > 0 by randomized block Krylov SVD (Musco and Musco 2015, arXiv 1504.05477, algorithm 2) with
    r + 8 samples: a power iteration that keeps its blocks, at the same number of products with ``weight``. With 0, or
    where the blocks would be as wide as the weight, by LAPACK.
    """
    if rank > min(weight.shape):
        raise UsageError(
            f"pissa: lora_rank {rank} is more than a weight of {weight.shape[0]}x{weight.shape[1]} has; give at most "
            f"{min(weight.shape)}, or name larger layers in lora_target_modules."
        )
    samples = rank + 8
    if not iterations or (iterations + 1) * samples >= min(weight.shape):
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
    else:
        blocks = [np.linalg.qr(weight @ rng.standard_normal((weight.shape[1], samples), dtype=np.float32))[0]]
        for _ in range(iterations):
            blocks.append(np.linalg.qr(weight @ (weight.T @ blocks[-1]))[0])
        basis = np.linalg.qr(np.concatenate(blocks, axis=1))[0]
        u, s, vt = np.linalg.svd(basis.T @ weight, full_matrices=False)
        u = basis @ u
    root = np.sqrt(s[:rank])
    return (u[:, :rank] * root).astype(np.float32), (root[:, None] * vt[:rank]).astype(np.float32)

"""The principal part of a matrix."""

from __future__ import annotations

import numpy as np

from sft import UsageError


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

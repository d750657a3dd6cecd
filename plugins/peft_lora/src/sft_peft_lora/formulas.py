"""The formulas of the papers, tried by `sft certify` on a small run: the group ``sft.certify`` in pyproject.toml."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

import sft

PREFIX = "base_model.model."


def _near(found: Any, expected: Any, what: str, tolerance: float = 1e-5) -> None:
    off, largest = float(np.abs(found - expected).max()), float(np.abs(expected).max())
    assert off <= tolerance * largest, f"{what}: {off:.2e} apart, where the largest value is {largest:.2e}"


Formula = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""The output of a layer, of x, W, A·B [in, out] and one more of the file's tensors, in float64."""


def _check_layers(lab: Any, ending: str, formula: Formula, more: str = "") -> None:
    """Each adapted layer of rank 4 and α 12 computes ``formula`` of what the file has of it: A and B, and the tensor
    whose name has this ``ending``. ``more`` is said where it does not."""
    import paddle

    outcome = lab.run(started=lambda run: run.model, lora_rank=4, lora_alpha=12.0)
    _, tensors = sft.read_adapter(outcome.folder)
    layers = dict(outcome.started.named_sublayers())
    stems = [name.removesuffix(ending) for name in tensors if name.endswith(ending)]
    assert stems, f"nothing is written whose name ends with {ending}"
    for stem in stems:
        layer = layers[stem.removeprefix(PREFIX)]
        own, a, b = (tensors[stem + end].astype(np.float64) for end in (ending, ".lora_A.weight", ".lora_B.weight"))
        weight = sft.linear_weight(layer.base).numpy().astype(np.float64)
        x = np.random.default_rng(0).standard_normal((5, weight.shape[0])).astype(np.float32)
        _near(layer(paddle.to_tensor(x)).numpy(), formula(x, weight, a.T @ b.T, own), f"{stem}{ending}{more}")


def _check_scaling(lab: Any, scaling: float) -> None:
    def formula(x: np.ndarray, weight: np.ndarray, update: np.ndarray, _: np.ndarray) -> np.ndarray:
        return np.asarray(x @ weight + scaling * x @ update)

    _check_layers(lab, ".lora_A.weight", formula, f", with s = {scaling:g}")


def check_adds_its_update(lab: Any) -> None:
    """y = x·W + s·x·A·B with s = α/r (arXiv 2106.09685, equation 3), of the files' A and B."""
    _check_scaling(lab, 3.0)


def check_begins_as_the_paper_says(lab: Any) -> None:
    """A is drawn from U(±1/√in), Kaiming-uniform with a = √5, and B is zero."""

    def look(run: sft.Run) -> dict[str, np.ndarray]:
        return {name: one.numpy() for name, one in run.model.named_parameters() if "lora_" in name}

    drawn = []
    for name, value in lab.run(started=look, lora_rank=8).started.items():
        if name.endswith("lora_B"):
            assert not value.any(), f"{name} is not zero"
        else:
            drawn.append(value.reshape(-1) * math.sqrt(value.shape[0]))
    values = np.concatenate(drawn)
    assert np.abs(values).max() <= 1 + 1e-6, f"√in · A reaches {np.abs(values).max():.3f}, and 1 is the most"
    assert abs(values.std() * math.sqrt(3) - 1) < 0.05, f"√(3·in) times the deviation of A is {values.std():.3f}, not 1"


def check_scales_by_the_root_of_the_rank(lab: Any) -> None:
    """s = α/√r (arXiv 2312.03732)."""
    _check_scaling(lab, 6.0)


def check_b_learns_faster(lab: Any) -> None:
    """The learning rate of B is λ times the schedule's (arXiv 2402.12354): the first step of Adam moves each value of a
    B by that."""
    before: dict[str, np.ndarray] = {}

    def look(run: sft.Run) -> Any:
        before.update({name: one.numpy() for name, one in run.model.named_parameters() if name.endswith("lora_B")})
        return run.model

    rate, ratio = 1e-4, 8.0
    settings = {"learning_rate": rate, "lr_scheduler_type": "constant", "max_steps": 1, "lora_plus_scale": ratio}
    model = lab.run(started=look, **settings).started
    after = {name: one.numpy() for name, one in model.named_parameters() if name in before}
    moved = float(np.median(np.concatenate([np.abs(after[name] - before[name]).reshape(-1) for name in before])))
    assert abs(moved / (rate * ratio) - 1) < 0.02, f"B moves by {moved:.2e}, and λ times the rate is {rate * ratio:.2e}"


def check_begins_at_the_principal_part(lab: Any) -> None:
    """s·A₀·B₀ is the best approximation of W of rank r, and A₀ = U√S/√s, B₀ = √S·Vᵀ/√s (arXiv 2404.02948)."""
    rank, alpha = 4, 12.0

    def look(run: sft.Run) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
        return [
            (name, layer.lora_A.numpy(), layer.lora_B.numpy(), sft.linear_weight(layer.base).numpy())
            for name, layer in run.model.named_sublayers()
            if hasattr(layer, "lora_A")
        ]

    for name, a, b, weight in lab.run(started=look, lora_rank=rank, lora_alpha=alpha).started:
        u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        _near(alpha / rank * a.astype(np.float64) @ b, best, f"s·A₀·B₀ of {name}", 1e-3)
        _near(
            (a.astype(np.float64) ** 2).sum(0), s[:rank] * rank / alpha, f"the squares of A₀'s columns of {name}", 1e-3
        )


def check_turns_and_scales(lab: Any) -> None:
    """y = x·V ⊙ m/‖V‖ with V = W + s·A·B and ‖V‖ over the inputs of each output (arXiv 2402.09353, equation 5), of the
    files' A, B and m."""

    def formula(x: np.ndarray, weight: np.ndarray, update: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        v = weight + 3.0 * update
        return np.asarray(x @ v * magnitude / np.sqrt((v**2).sum(0)))

    _check_layers(lab, ".lora_magnitude_vector", formula)


LORA = (check_adds_its_update, check_begins_as_the_paper_says)
RSLORA = (check_scales_by_the_root_of_the_rank,)
LORA_PLUS = (check_b_learns_faster,)
DORA = (check_turns_and_scales,)
PISSA = (check_begins_at_the_principal_part,)

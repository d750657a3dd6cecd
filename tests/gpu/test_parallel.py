"""On GPUs: what parallel-4d keeps on the host, and what processes tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft.testing import needs, read_metrics
from sft.training.adamw import AdamW

pytestmark = [pytest.mark.gpu, needs("parallel-4d")]

Row = Callable[..., None]
KEPT = ("moment1", "moment2")


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_offload(
    train: Any, tmp_path: Path, on_gpu: bool, row: Row, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """One process: what is stepped, its gradients and its moments are on the host, computed with there, and a run
    learns what it learns without."""
    places: dict[str, set[str]] = {}
    stepped = AdamW.adam

    def noted(self: Any, values: list[Any], gradients: list[Any], kept: list[dict[str, Any]], *more: Any) -> None:
        stepped(self, values, gradients, kept, *more)
        moments = [one[kind] for one in kept for kind in KEPT]
        for what, tensors in (("pieces", values), ("gradients", gradients), ("moments", moments)):
            seen = {"host" if tensor.place.is_cpu_place() else "device" for tensor in tensors}
            places.setdefault(what, set()).update(seen)

    monkeypatch.setattr(AdamW, "adam", noted)
    common = {"plugin": ["parallel-4d"], "device": "gpu" if on_gpu else "cpu", "max_steps": 2, "logging_steps": 1}
    common |= {"do_eval": False, "learning_rate": 1e-3}
    losses, weights = [], []
    for name, sharding in (("device", None), ("host", f"{stage} offload")):
        places.clear()
        train(f"{stage}-{name}", sharding=sharding, **common)
        expected = "host" if name == "host" or not on_gpu else "device"
        assert places == {what: {expected} for what in ("pieces", "gradients", "moments")}
        losses.append([line["loss"] for line in read_metrics(tmp_path / f"{stage}-{name}")])
        weights.append(saved(tmp_path / f"{stage}-{name}"))
    row(f"{stage} offload: pieces, gradients and moments", "on the host", "exact")
    row("… losses of 2 steps, to without", float(np.abs(np.divide(*losses) - 1).max()), 1e-5)
    away = max(float(np.abs(weights[0][name] - weights[1][name]).max()) for name in weights[0])
    row("… weights after them, to without", away, 1e-5)
    assert len(losses[0]) == 2


def saved(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    found: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        found.update(load_file(path))
    assert found
    return found


@pytest.mark.timeout(300)
def test_each_collective_on_whole_numbers(paddle: Any, on_gpu: bool, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """By NCCL on GPUs, of every type that a run sends; by gloo where a CPU is forced."""
    from sft_parallel_4d.launch import start

    count = min(4, paddle.device.cuda.device_count()) if on_gpu else 2
    if count < 2:
        pytest.skip("there is one GPU")
    folder, said = str(Path(__file__).parent), list[str]()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")])))
    start(["collectives", "gpu" if on_gpu else "cpu"], count, said.append, on_cpu=not on_gpu)
    for line in said:
        row(f"{count} processes", line, "exact")
    assert len(said) == (5 if on_gpu else 3)

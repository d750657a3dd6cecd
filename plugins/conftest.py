"""What the tests of the distributions share, beside sft's testing kit: the core's tiny models, and adapters of PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sft
from sft.testing import forward


@pytest.fixture(scope="session")
def models() -> Path:
    """The tiny base models of the core's tests, with reference values."""
    return Path(__file__).parents[1] / "core" / "tests" / "fixtures" / "models"


@pytest.fixture(scope="session")
def base_model(models: Path) -> Path:
    return models / "llama-tied-gqa"


@pytest.fixture(scope="session")
def input_ids(base_model: Path) -> np.ndarray:
    """int64 [2, 17], of the base model's reference values."""
    return np.asarray(load_file(base_model / "reference.safetensors")["input_ids"])


@pytest.fixture
def peft(request: pytest.FixtureRequest) -> Path:
    """Adapters as HF PEFT wrote them, with what PEFT computes; see make_peft.py there."""
    return request.path.parent / "fixtures"


@pytest.fixture
def adapter_variant(peft: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of one of PEFT's adapters; keyword arguments change its config, ``change`` its tensors."""

    def make(case: str, change: Callable[[dict[str, np.ndarray]], Any] | None = None, **changes: Any) -> Path:
        folder = tmp_path / "adapter"
        shutil.copytree(peft / case, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        if change is not None:
            tensors = load_file(folder / "adapter_model.safetensors")
            change(tensors)
            save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return make


@pytest.fixture
def looking(input_ids: np.ndarray) -> tuple[type[sft.Plugin], list[np.ndarray]]:
    """A plugin, and the list into which it puts the trained model's logits."""
    found: list[np.ndarray] = []

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
            found.append(forward(run.model, input_ids))

    return Look, found

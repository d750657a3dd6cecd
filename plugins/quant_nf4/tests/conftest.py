"""What the tests of this distribution share: tiny models, what bitsandbytes computes, and small runs."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft


@pytest.fixture(scope="session")
def models() -> Path:
    """The tiny base models of the core's tests."""
    return Path(__file__).parents[3] / "core" / "tests" / "fixtures" / "models"


@pytest.fixture(scope="session")
def bitsandbytes() -> dict[str, np.ndarray]:
    """Weights, and what bitsandbytes makes of them; see make_bitsandbytes.py."""
    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
    from safetensors.numpy import load_file

    return load_file(Path(__file__).parent / "fixtures" / "bitsandbytes.safetensors")


@pytest.fixture(scope="session")
def paddle() -> Any:
    """paddle, imported as a run imports it."""
    from sft import runtime

    runtime.prepare()
    return importlib.import_module("paddle")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 train and 4 dev records."""
    folder = tmp_path_factory.mktemp("data")
    for name, numbers in (("train", range(12)), ("dev", range(12, 16))):
        records = [{"src": f"type#{n}", "tgt": "A coat" + " for you" * (n % 4) + "."} for n in numbers]
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture
def train(paddle: Any, models: Path, dataset: Path, tmp_path: Path) -> Callable[..., Any]:
    """Run ``sft.run`` quietly with small settings; ``output_dir`` is a name in the test's own folder."""

    def run(output_dir: str = "out", plugins: tuple[type, ...] = (), **settings: Any) -> sft.Summary:
        defaults = {
            "model_name_or_path": str(models / "llama-tied-gqa"),
            "dataset_name_or_path": str(dataset),
            "learning_rate": 1e-2,
            "max_steps": 4,
            "logging_steps": 1,
            "disable_tqdm": True,
            "output_dir": str(tmp_path / output_dir),
        }
        return sft.run({**defaults, **settings}, plugins=plugins, say=lambda text: None)

    return run

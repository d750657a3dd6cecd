"""What the tests of this distribution share: base models, adapters that HF PEFT wrote, and small runs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
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
def peft() -> Path:
    """Adapters as HF PEFT wrote them, with what PEFT computes; see make_peft.py."""
    return Path(__file__).parent / "fixtures"


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
    """Run ``sft.run`` with plugin vera, quietly; ``output_dir`` is a name in the test's own folder."""

    def run(output_dir: str = "out", plugins: tuple[type, ...] = (), say: Any = None, **settings: Any) -> sft.Summary:
        defaults = {
            "plugin": ["vera"],
            "model_name_or_path": str(models / "llama-tied-gqa"),
            "dataset_name_or_path": str(dataset),
            "learning_rate": 1e-1,
            "max_steps": 3,
            "disable_tqdm": True,
            "output_dir": str(tmp_path / output_dir),
        }
        return sft.run({**defaults, **settings}, plugins=plugins, say=say or (lambda text: None))

    return run


@pytest.fixture
def adapt(train: Callable[..., Any]) -> Callable[..., sft.Run]:
    """A run that stands before its first step: its model is adapted and has learned nothing."""

    class ReadyError(Exception):
        pass

    def make(*plugins: type, **settings: Any) -> sft.Run:
        caught: list[sft.Run] = []

        class Catch(sft.Plugin):
            name = "catch"

            @sft.hookimpl
            def sft_run_started(self, run: sft.Run) -> None:
                caught.append(run)
                raise ReadyError

        with pytest.raises(ReadyError):
            train("adapted", (*plugins, Catch), overwrite_output_dir=True, do_eval=False, **settings)
        return caught[0]

    return make


@pytest.fixture(scope="session")
def logits_of() -> Callable[..., Any]:
    """float32 logits [B, S, V] of ``input_ids`` through PaddleNLP's own forward."""

    def compute(model: Any, input_ids: Any) -> Any:
        import paddle

        ids = paddle.to_tensor(input_ids)
        with paddle.no_grad():
            found = model(input_ids=ids, attention_mask=paddle.ones_like(ids))
        return (found[0] if isinstance(found, tuple) else found).numpy()

    return compute


@pytest.fixture
def fresh_logits(tmp_path: Path) -> Callable[..., np.ndarray]:
    """Logits of a model and an adapter that a process of its own loads."""

    def compute(model: Path, adapter: Path | None, ids: np.ndarray) -> np.ndarray:
        given, found = tmp_path / "ids.npy", tmp_path / "logits.npy"
        np.save(given, ids)
        line = [sys.executable, "-c", _FRESH, str(model), str(adapter or ""), str(given), str(found)]
        subprocess.run(line, check=True, capture_output=True, timeout=100)
        return np.asarray(np.load(found))

    return compute


_FRESH = """
import sys
from pathlib import Path
import numpy as np
from sft import adapters
model, adapter, given, found = sys.argv[1:]
loaded, _ = adapters.load_for_inference(model, Path(adapter) if adapter else None, lambda text: None)
import paddle
ids = paddle.to_tensor(np.load(given))
with paddle.no_grad():
    logits = loaded(input_ids=ids, attention_mask=paddle.ones_like(ids))
np.save(found, (logits[0] if isinstance(logits, tuple) else logits).numpy())
"""

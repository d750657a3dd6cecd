"""What the tests of this distribution share: base models and small runs."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft


@pytest.fixture(scope="session")
def models() -> Path:
    """The tiny base models of the core's tests."""
    return Path(__file__).parents[3] / "core" / "tests" / "fixtures" / "models"


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
    """Run ``sft.run`` with plugin neftune, quietly; ``output_dir`` is a name in the test's own folder."""

    def run(output_dir: str = "out", plugins: tuple[type, ...] = (), say: Any = None, **settings: Any) -> sft.Summary:
        defaults = {
            "plugin": ["neftune"],
            "model_name_or_path": str(models / "llama-tied-gqa"),
            "dataset_name_or_path": str(dataset),
            "learning_rate": 1e-3,
            "max_steps": 3,
            "disable_tqdm": True,
            "output_dir": str(tmp_path / output_dir),
        }
        return sft.run({**defaults, **settings}, plugins=plugins, say=say or (lambda text: None))

    return run


@pytest.fixture
def adapt(train: Callable[..., Any]) -> Callable[..., sft.Run]:
    """A run that stands before its first step: nothing has been learned."""

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

"""Pipelines whose stages have several parts of the model, more stages than two, and stages that learn little: each
learns what one process learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainings import PLANS, Plan, Trainings, assert_equal, pipeline

from sft.testing import make_model, needs

pytestmark = pytest.mark.slow
LORA = {"plugin": ["lora"], "lora_rank": 4}
PACKED = {"plugin": ["greedy-zero-padding", "flashmask"]}
DEEP = {
    "pp4-virtual": Plan(4, 1, pipeline(4, virtual_pp_degree=2)),
    "pp3-virtual": Plan(3, 1, pipeline(3, virtual_pp_degree=2)),
    "pp2-virtual4": Plan(2, 1, pipeline(2, virtual_pp_degree=4)),
    "pp3": Plan(3, 1, pipeline(3)),
}


@pytest.fixture(scope="session")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of eight blocks, with tied embeddings."""
    return make_model(tmp_path_factory.mktemp("deep"), num_hidden_layers=8)


@pytest.mark.parametrize(
    ("plan", "settings"),
    [
        ("pp4-virtual", {}),
        pytest.param("pp4-virtual", {**LORA, "plugin": ["lora", *PACKED["plugin"]]}, marks=needs("lora")),
        # One row a micro-batch: as many micro-batches as the schedule takes, none of them idle.
        ("pp4-virtual", {"per_device_train_batch_size": 1}),
        ("pp3-virtual", {"per_device_train_batch_size": 1}),
        ("pp2-virtual4", {"recompute": True}),
        ("pp3", PACKED),
    ],
)
def test_deep_models(trainings: Trainings, deep_model: Path, plan: str, settings: dict[str, Any]) -> None:
    settings = {**settings, "model_name_or_path": str(deep_model)}
    one = trainings.one(**settings)
    assert_equal(one, trainings.many(DEEP[plan], **settings)[0])


@pytest.mark.parametrize("family", ["mistral", "gemma", "qwen2"])
def test_families_interleaved(trainings: Trainings, model_of: Callable[..., Path], models: Path, family: str) -> None:
    settings = {"model_name_or_path": str(model_of(family)), "tokenizer_name_or_path": str(models / "llama-tied-gqa")}
    assert_equal(trainings.one(**settings), trainings.many(PLANS["pp2-virtual"], **settings)[0])


@needs("lora")
@pytest.mark.parametrize("plan", ["pp2", "pp4", "pp2-virtual"])
@pytest.mark.parametrize("block", [0, 3])
def test_a_stage_may_have_nothing_that_learns(trainings: Trainings, plan: str, block: int) -> None:
    """Neither in front of all that learns, where no gradient is needed, nor behind it."""
    settings = {**LORA, "lora_target_modules": [f"model.layers.{block}.mlp.up_proj"]}
    assert_equal(trainings.one(**settings), trainings.many(PLANS[plan], **settings)[0])

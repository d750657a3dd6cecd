"""Memory on paper against what paddle's CPU allocator counts in real forward and backward passes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.models import attention, norms
from sft.models.loading import _share_rotary_tables, open_model
from sft.plugins import import_plugin
from sft.training.optimizer import Optimizer, default_groups
from sft.training.strategy import batch_loss, grad_norm
from sft_parallel_4d import activations
from sft_parallel_4d.activations import Shape
from sft_parallel_4d.memory import Calculator
from sft_parallel_4d.model_size import Precision
from sft_parallel_4d.plans import Plan

FAMILIES = ["llama", "qwen2", "mistral", "gemma"]
ROWS, LENGTH = 2, 64


class Allocator:
    """Bytes that paddle's CPU allocator has handed out."""

    def __init__(self) -> None:
        from paddle.base import core

        gc.collect()
        self._core, self._start = core, 0
        self._start = self.now()

    def now(self) -> int:
        return int(self._core.host_memory_stat_current_value("Allocated", 0)) - self._start

    def peak(self) -> int:
        return int(self._core.host_memory_stat_peak_value("Allocated", 0)) - self._start

    def forget(self) -> None:
        self._core.host_memory_stat_reset_peak_value("Allocated", 0)


def build(folder: Path, recompute: bool = False, backend: Any = None) -> Any:
    """A model of random weights, prepared as a run prepares it."""
    source = open_model(folder)
    model = source.family.classes()[1](source.config)
    _share_rotary_tables(model)
    if source.family.correct is not None:
        source.family.correct(model)
    norms.install(model, source.family.norm_offset)
    attention.install(model, backend or attention.DefaultAttention())
    if recompute:
        model.recompute_enable()
    model.train()
    return model


def batch(rows: int, length: int, vocabulary: int) -> sft.Batch:
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, length))
    positions, ends = np.tile(np.arange(length), (rows, 1)), np.full((rows, 1, length, 1), length, np.int32)
    return sft.Batch(ids, ids, positions, ends, ((length,),) * rows)


def kept(model: Any, tokens: sft.Batch) -> int:
    attention.hidden_states(model, tokens)
    memory = Allocator()
    states = attention.hidden_states(model, tokens)
    found = memory.now()
    assert states is not None
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_keeps_what_is_said(
    paddle: Any, config_of: Any, outline_of: Callable[..., sft.Outline], family: str, recompute: bool
) -> None:
    measured = [
        kept(build(config_of(family, num_hidden_layers=layers), recompute), batch(ROWS, LENGTH, 512))
        for layers in (1, 2)
    ]
    outline, shape = outline_of(family), Shape(ROWS, LENGTH, ROWS * LENGTH)
    expected = activations.boundary if recompute else lambda *args: activations.block_kept(args[0], 0, *args[1:])
    # paddle's allocator gives each tensor a whole number of 64 or 256 bytes.
    assert measured[1] - measured[0] == pytest.approx(expected(outline, shape, Precision()), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_in_blocks(paddle: Any, config_of: Any, family: str) -> None:
    backend = import_plugin("flashmask")(None).sft_attention_backend(run=None, config=None)
    measured = [
        kept(build(config_of(family, num_hidden_layers=layers), backend=backend), batch(ROWS, LENGTH, 512))
        for layers in (1, 2)
    ]
    settings = {"model_name_or_path": str(config_of(family)), "plugin": ["flashmask"]}
    expected = activations.block_kept(sft.outline(settings).outline, 0, Shape(ROWS, LENGTH, 0), Precision())
    sums = 4 * 8 * ROWS * LENGTH  # kernels on GPUs keep one a row and head; this implementation computes them again
    assert measured[1] - measured[0] == pytest.approx(expected - sums, rel=1e-3)


@pytest.mark.parametrize(
    ("family", "changes", "rows", "length", "recompute"),
    [
        ("llama", {}, 2, 128, False),
        ("llama", {"num_hidden_layers": 6}, 2, 128, True),
        ("qwen2", {"vocab_size": 40000}, 8, 64, False),  # several chunks of logits
        ("gemma", {}, 2, 256, False),
        ("gemma", {"num_hidden_layers": 6, "num_key_value_heads": 1}, 2, 256, True),
        ("mistral", {"num_key_value_heads": 8}, 4, 64, False),
    ],
)
def test_peak_of_real_steps(
    paddle: Any, config_of: Any, family: str, changes: dict[str, Any], rows: int, length: int, recompute: bool
) -> None:
    folder = config_of(family, **changes)
    memory = Allocator()
    model = build(folder, recompute)
    parameters = dict(model.named_parameters())
    optimizer = Optimizer(default_groups(parameters, 0.0), sft.settings.TrainingArguments())
    tokens = batch(rows, length, model.config.vocab_size)
    for _ in range(2):
        memory.forget()
        batch_loss(model, tokens).backward()
        grad_norm(list(parameters.values()))
        optimizer.step(1e-3, 0.5)
    outline = sft.outline({"model_name_or_path": str(folder)}).outline
    found = Calculator(outline, Precision(), rows, length).fullest(Plan(recompute=recompute))
    assert found.peak == pytest.approx(memory.peak(), rel=0.15)
    # The part that is not simply the model, too, and not only because the model outweighs it.
    fixed = found.weights + found.gradients + found.optimizer
    assert found.peak - fixed == pytest.approx(memory.peak() - fixed, rel=0.08)


def test_peak_of_an_adapter_run(adapt: Callable[..., sft.Run], config_of: Any, tmp_path: Path) -> None:
    from sft.testing import make_model

    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5}
    folder = make_model(tmp_path / "model", **sizes)
    for recompute in (False, True):
        settings = {"plugin": ["lora"], "lora_rank": 4, "model_name_or_path": str(folder), "recompute": recompute}
        run = adapt(**settings)
        run.model.train()
        memory = Allocator()
        before = sum(int(p.size) * 4 for p in run.model.parameters())
        tokens = batch(2, 128, run.model.config.vocab_size)
        batch_loss(run.model, tokens).backward()
        memory = Allocator()
        memory.forget()
        batch_loss(run.model, tokens).backward()
        found = Calculator(sft.outline(settings).outline, Precision(), 2, 128).fullest(Plan(recompute=recompute))
        tables = activations.tables(sft.outline(settings).outline)
        assert found.weights == before + tables
        fixed = found.weights + found.gradients + found.optimizer
        assert found.peak - fixed == pytest.approx(memory.peak(), rel=0.15)


def test_shards_divide_what_their_stage_divides(outline_of: Callable[..., sft.Outline]) -> None:
    calculator = Calculator(outline_of(num_hidden_layers=24), Precision(16, 16), 1, 64)
    whole = calculator.fullest(Plan())
    one, two, three = (calculator.fullest(Plan(sharding=4, stage=stage)) for stage in (1, 2, 3))
    assert (one.weights, one.gradients, one.optimizer) == (whole.weights, whole.gradients, whole.optimizer // 4)
    assert two.weights == whole.weights
    assert whole.gradients / 4 < two.gradients < whole.gradients / 2.5
    assert whole.weights / 4 < three.weights < whole.weights / 2
    # 16 bits: 2 bytes of weight; gradient 2 and its float32 copy 4; two moments and a master, 12 (and the two powers).
    values = calculator.stages(1, 1)[0].size.values
    assert whole.gradients == 6 * values
    assert 12 * values < whole.optimizer < 12.1 * values


def test_a_pipeline_keeps_as_many_micro_batches_as_it_has_stages(outline_of: Callable[..., sft.Outline]) -> None:
    calculator = Calculator(outline_of(), Precision(), 2, 64)
    plan = Plan(pipeline=4, accumulation=8)
    per_block = activations.block_kept(calculator.outline, 0, calculator.shape(plan), Precision())
    ranks = [calculator.rank(plan, n, stage) for n, stage in enumerate(calculator.stages(1, 4))]
    assert [ranks[n].activations - ranks[n + 1].activations for n in (0, 1)] == [per_block, per_block]
    few = Plan(pipeline=4, accumulation=2)
    assert calculator.fullest(few).activations < calculator.fullest(plan).activations

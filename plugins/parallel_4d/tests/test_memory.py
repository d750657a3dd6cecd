"""Memory on paper against what paddle's CPU allocator counts in real forward and backward passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from measuring import PLAIN, Allocator, full_batch

import sft
from sft.models.decoder import CausalLM
from sft.models.forward import hidden_states
from sft.testing import make_model, needs
from sft.training.adamw import AdamW
from sft.training.groups import default_groups
from sft.training.loss import batch_loss
from sft.training.strategy import squared_gradients
from sft_parallel_4d import activations
from sft_parallel_4d.activations import Shape
from sft_parallel_4d.memory import Calculator
from sft_parallel_4d.model_size import Precision
from sft_parallel_4d.outline import Outline
from sft_parallel_4d.paper import outline as on_paper
from sft_parallel_4d.plans import Plan

pytestmark = pytest.mark.sweep  # as far as its tests are slow

FIXTURES = Path(__file__).parents[3] / "core" / "tests" / "fixtures" / "families"
QUICK = ["llama", "gemma2", "olmo2", "phi3", "mixtral"]
"""What differs most: caps and windows, norms over all heads, fused matrices, experts."""
SLOW = sorted({"qwen2", "mistral", "gemma", *(path.name for path in FIXTURES.iterdir() if path.is_dir())} - set(QUICK))
ROWS, LENGTH = 2, 64


def paper(folder: Path, **settings: Any) -> Outline:
    return on_paper({"model_name_or_path": str(folder), **settings}).outline


def described(config_of: Callable[..., Path], case: str, **changes: Any) -> Path:
    """A directory with the ``config.json`` of a family, or of one of the core's fixtures, in the sizes of ``config_of``
    (a window of 20 tokens, where there is one)."""
    path = FIXTURES / case / "config.json"
    values = json.loads(path.read_text()) if path.is_file() else {"model_type": case}
    if values.get("sliding_window"):
        changes = {"sliding_window": 20, **changes}
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    fixed = (*sizes, "vocab_size", "max_position_embeddings", *changes)
    kept = {name: value for name, value in values.items() if name not in fixed}
    for name in {"layer_types", "no_rope_layers"} & set(kept):
        kept[name] = (kept[name] * 8)[:8]
    return config_of(**{"sliding_window": None, **kept, **changes})


def build(folder: Path, recompute: bool) -> Any:
    """A model of random weights, prepared as a run prepares it."""
    model = CausalLM(paper(folder).architecture)
    model.recompute = recompute
    model.train()
    return model


def kept(model: Any, tokens: sft.Batch) -> int:
    hidden_states(model, tokens)
    memory = Allocator()
    states = hidden_states(model, tokens)
    found = memory.now()
    assert states is not None
    return found


@pytest.mark.parametrize(
    ("family", "recompute"),
    [
        *((family, False) for family in QUICK),
        ("llama", True),  # what a recomputed block keeps, its input, is the same for all of them
        *(pytest.param(family, True, marks=pytest.mark.slow) for family in QUICK[1:]),
        *(pytest.param(family, recompute, marks=pytest.mark.slow) for family in SLOW for recompute in (False, True)),
    ],
)
def test_a_block_keeps_what_is_said(paddle: Any, config_of: Any, family: str, recompute: bool) -> None:
    measured = []
    for layers in (4, 5):  # of every kind of window that there is, the first four have one
        folder = described(config_of, family, num_hidden_layers=layers)
        measured.append(kept(build(folder, recompute), full_batch(ROWS, LENGTH, 112)))
    outline, shape = paper(folder), Shape(ROWS, LENGTH, ROWS * LENGTH)
    expected = (
        activations.boundary(outline, shape, Precision())
        if recompute
        else activations.block_kept(outline, 4, shape, Precision())
    )
    # paddle's allocator gives each tensor a whole number of 64 or 256 bytes.
    assert measured[1] - measured[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("family", "changes", "rows", "length", "recompute"),
    [
        ("llama", {}, 2, 128, False),
        ("qwen2", {"vocab_size": 40000}, 8, 64, False),  # several chunks of logits
        ("gemma", {"num_hidden_layers": 6, "num_key_value_heads": 1}, 2, 256, True),
        ("mixtral", {}, 2, 256, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("gemma2", {"vocab_size": 4096}, 4, 64, False),
                ("phi3", {}, 2, 128, False),
                ("olmo2", {}, 2, 128, True),
                ("llama", {"num_hidden_layers": 6}, 2, 128, True),
                ("gemma", {}, 2, 256, False),
                ("mistral", {"num_key_value_heads": 8}, 4, 64, False),
                ("gemma3", {}, 2, 256, True),
                ("qwen3-moe", {}, 2, 256, True),
            )
        ),
    ],
)
def test_peak_of_real_steps(
    paddle: Any, config_of: Any, family: str, changes: dict[str, Any], rows: int, length: int, recompute: bool
) -> None:
    folder = described(config_of, family, **changes)
    memory = Allocator()
    model = build(folder, recompute)
    parameters = dict(model.named_parameters())
    optimizer = AdamW(default_groups(parameters, 0.0), sft.settings.arguments.TrainingArguments())
    tokens = full_batch(rows, length, model.architecture.vocabulary)
    for _ in range(2):
        memory.forget()
        batch_loss(model, tokens).backward()
        squared_gradients(parameters.values())
        optimizer.step(1e-3, 0.5)
    outline = on_paper({"model_name_or_path": str(folder)}).outline
    found = Calculator(outline, Precision(), rows, length).fullest(Plan(recompute=recompute))
    assert found.peak == pytest.approx(memory.peak(), rel=0.05)
    # The part that is not simply the model, too, and not only because the model outweighs it.
    fixed = found.weights + found.optimizer
    assert found.peak - fixed == pytest.approx(memory.peak() - fixed, rel=0.08)


@needs("lora")
def test_peak_of_an_adapter_run(adapt: Callable[..., sft.Run], config_of: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5}
    folder = make_model(tmp_path / "model", **sizes)
    for recompute in (False, True):
        settings = {
            "plugin": ["lora", *PLAIN],
            "lora_rank": 4,
            "model_name_or_path": str(folder),
            "recompute": recompute,
        }
        run = adapt(**settings)
        run.model.train()
        memory = Allocator()
        before = sum(int(p.size) * 4 for p in run.model.parameters())
        tokens = full_batch(2, 128, run.model.architecture.vocabulary)
        batch_loss(run.model, tokens).backward()
        memory = Allocator()
        memory.forget()
        batch_loss(run.model, tokens).backward()
        plan = Plan(recompute=recompute, accumulation=2)
        found = Calculator(on_paper(settings).outline, Precision(), 2, 128).fullest(plan)
        assert found.weights == before
        fixed = found.weights + found.gradients + found.optimizer
        assert found.peak - fixed == pytest.approx(memory.peak(), rel=0.05)


def test_shards_divide_what_their_stage_divides(outline_of: Callable[..., Outline]) -> None:
    calculator = Calculator(outline_of(num_hidden_layers=24), Precision(16, 16), 1, 64)
    size = calculator.stages(Plan())[0].size
    whole = calculator.held(Plan(), calculator.stages(Plan())[0])
    # 16 bits: 2 bytes of weight, 4 of its gradient's sum; two moments and a master, 12 (and the two powers).
    assert (whole.parameters, whole.pieces, whole.gradients) == (2 * size.values, 0, 4 * size.values)
    assert 12 * size.values < whole.optimizer < 12.1 * size.values
    vectors = 2 * 24 + 1
    filled = size.values + vectors * (512 - 64)  # a slice of each begins at 256 bytes, and there are four
    block = (size.values - 2 * 512 * 64 - vectors * 64) // 24
    for stage in (1, 2, 3):
        plan = Plan(sharding=4, stage=stage)
        held = calculator.held(plan, calculator.stages(plan)[0])
        assert held.parameters == 2 * (filled if stage < 3 else 512 * vectors)
        assert held.pieces == (0 if stage < 3 else 2 * (size.values - 64 * vectors) / 4)
        assert held.gradients == 4 * filled / (1 if stage == 1 else 4)
        # A gradient on its way, as backward gives it and as it is added: the embedding's; or a bucket of all with its
        # slice; or those of two blocks and of all vectors, and a gradient of an MLP.
        sent = {1: 6 * 512 * 64, 2: 5 * filled, 3: 4 * (2 * block + 512 * vectors) + 6 * 64 * 160}[stage]
        assert held.passing == sent
        assert held.optimizer == 12 * size.values / 4 + (whole.optimizer - 12 * size.values)


def test_small_gradients_are_those_of_the_norm_of_the_core() -> None:
    """On paper nothing imports paddle, so the plan has numbers of its own."""
    from sft.models import sums
    from sft.training import strategy
    from sft_parallel_4d import memory, model_size

    assert (model_size.FEW, memory.LOT) == (sums.FEW, strategy.LOT)


def test_offload_takes_pieces_from_the_device(outline_of: Callable[..., Outline]) -> None:
    calculator = Calculator(outline_of(num_hidden_layers=24), Precision(), 1, 64)
    for stage in (1, 2, 3):
        plan = Plan(sharding=4, stage=stage, accumulation=2)
        here, there = calculator.fullest(plan), calculator.fullest(replace(plan, offload=True))
        held = calculator.held(plan, calculator.stages(plan)[0])
        assert here.peak - there.peak == held.pieces + held.optimizer
        assert (there.optimizer, here.host) == (0, 0)
        slices = calculator.stages(plan)[0].size
        assert there.host >= held.optimizer + slices.piece_gradients + max(held.pieces, slices.pieces * (stage < 3))


def test_a_pipeline_keeps_as_many_micro_batches_as_it_has_stages(outline_of: Callable[..., Outline]) -> None:
    calculator = Calculator(outline_of(), Precision(), 2, 64)
    plan = Plan(pipeline=4, accumulation=8)
    kept = activations.block_kept(calculator.outline, 0, calculator.shape(plan), Precision())
    kept += activations.boundary(calculator.outline, calculator.shape(plan), Precision())  # what it has received
    kept += activations.reading_kept(calculator.outline, calculator.shape(plan))
    ranks = [calculator.rank(plan, n, stage) for n, stage in enumerate(calculator.stages(plan))]
    assert ranks[1].activations - ranks[2].activations == kept
    few = Plan(pipeline=4, accumulation=2)
    assert calculator.fullest(few).activations < calculator.fullest(plan).activations


def test_a_chunk_of_logits_is_what_the_core_makes_of_a_device(paddle: Any) -> None:
    from sft.training.loss import chunk_bytes

    for memory in (None, 1 << 30, 8 << 30, 80 << 30):
        assert activations.chunk_bytes(memory) == chunk_bytes(memory)


def test_a_float32_base_keeps_a_narrow_copy_of_each_matrix(outline_of: Callable[..., Outline]) -> None:
    """With O1; a frozen base in 16 bits keeps none, and of an adapter in float32 both keep one."""
    outline = outline_of(num_hidden_layers=1)
    outline.freeze()
    shape = Shape(1, 64, 64)
    linears = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 160

    def kept(*precision: int) -> int:
        return activations.block_kept(outline, 0, shape, Precision(*precision))

    assert kept(32, 16, 32) - kept(32, 16, 16) == 2 * linears
    for linear in outline.targets():
        linear.add("lora_A", (linear.in_features, 4), ("in", None))
    adapters = 4 * (64 * 6 + 160)
    assert kept(32, 16, 32) - kept(32, 16, 16) == 2 * linears
    assert kept(32, 16, 16) - kept(16, 16, 16) == 0
    without = kept(32, 16, 16) - 2 * adapters
    outline.targets()[0].remove("lora_A")
    assert kept(32, 16, 16) == without + 2 * (adapters - 4 * 64)

"""A plan against real runs of it: each rank's bytes of model and optimizer, its peak of memory, and what it sends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from measuring import PLAIN
from processes import run_ranks

from sft.testing import needs, write_data
from sft_parallel_4d import communication
from sft_parallel_4d.memory import Calculator
from sft_parallel_4d.model_size import Precision
from sft_parallel_4d.paper import outline as on_paper
from sft_parallel_4d.passes import filled
from sft_parallel_4d.plans import Plan

pytestmark = pytest.mark.sweep  # as far as its tests are slow

LARGE = {"hidden_size": 128, "intermediate_size": 512, "tie_word_embeddings": True}
"""A model that outweighs what it keeps of a row of 32 tokens."""
LARGER = {"hidden_size": 256, "intermediate_size": 1024, "tie_word_embeddings": False}
"""One with several buckets a block."""
SMALL_BUCKETS = {"sharding_comm_buffer_size_MB": 1}
TENSOR, PIPELINE, SEQUENCE = {"tensor_parallel_degree": 2}, {"pipeline_parallel_degree": 2}, {"sequence_parallel": True}
CONTEXT, EXPERTS = {"context_parallel_degree": 2}, {"expert_parallel_degree": 2}
STAGE1, STAGE2, INTERLEAVED = {"sharding": "stage1"}, {"sharding": "stage2"}, {"virtual_pp_degree": 2}
PAIRS = {"sharding_parallel_degree": 2}
LORA, DORA = {"plugin": ["lora"]}, {"plugin": ["lora", "dora"]}
CASES: list[tuple[str, dict[str, Any], dict[str, Any], Plan]] = [
    ("llama", {}, {}, Plan(data=2, accumulation=2)),
    ("llama", {}, {"sharding": "stage1"}, Plan(sharding=2, stage=1)),
    ("llama", LARGE, {"sharding": "stage2"}, Plan(sharding=2, stage=2, accumulation=3)),
    ("mixtral", LARGER, SMALL_BUCKETS, Plan(data=2, accumulation=2)),
    ("llama", LARGER, {"sharding": "stage1"} | SMALL_BUCKETS, Plan(sharding=2, stage=1, accumulation=2)),
    ("llama", LARGER, {"sharding": "stage2"} | SMALL_BUCKETS, Plan(sharding=2, stage=2, accumulation=3)),
    ("mixtral", LARGER, {"sharding": "stage2"} | SMALL_BUCKETS, Plan(sharding=2, stage=2, accumulation=2)),
    ("mixtral", LARGER, {"sharding": "stage3"}, Plan(sharding=2, stage=3, accumulation=2)),
    ("llama", LARGE, {"sharding": "stage2 offload"}, Plan(sharding=2, stage=2, accumulation=3, offload=True)),
    ("llama", LARGE, {"sharding": "stage3"}, Plan(sharding=2, stage=3, accumulation=3)),
    ("llama", LARGE, {"sharding": "stage3", "recompute": True}, Plan(sharding=2, stage=3, recompute=True)),
    ("mistral", {}, TENSOR, Plan(tensor=2, accumulation=2)),
    ("qwen2", {}, TENSOR | SEQUENCE, Plan(tensor=2, sequence=True, accumulation=2)),
    ("gemma", {}, PIPELINE, Plan(pipeline=2, accumulation=3)),
    ("gemma", {}, PIPELINE | {"virtual_pp_degree": 2}, Plan(pipeline=2, accumulation=4, virtual=2)),
    ("gemma", {}, PIPELINE | {"virtual_pp_degree": 2}, Plan(pipeline=2, accumulation=1, virtual=2)),
    (
        *("mistral", {}, TENSOR | SEQUENCE | PIPELINE | {"virtual_pp_degree": 2}),
        Plan(tensor=2, sequence=True, pipeline=2, accumulation=3, virtual=2),
    ),
    ("llama", {}, PIPELINE | {"recompute": True}, Plan(pipeline=2, accumulation=3, recompute=True)),
    ("mistral", {}, TENSOR | PIPELINE, Plan(tensor=2, pipeline=2, accumulation=2)),
    ("llama", LARGE, TENSOR | {"sharding": "stage1"}, Plan(sharding=2, stage=1, tensor=2, accumulation=2)),
    ("llama", LARGE, TENSOR | {"sharding": "stage3"}, Plan(sharding=2, stage=3, tensor=2, accumulation=2)),
    (
        *("llama", LARGER, TENSOR | SEQUENCE | {"sharding": "stage2"} | SMALL_BUCKETS),
        Plan(sharding=2, stage=2, tensor=2, sequence=True, accumulation=2),
    ),
    ("llama", {}, CONTEXT, Plan(context=2, accumulation=2)),
    ("llama", LARGE, CONTEXT | {"sharding": "stage1"}, Plan(context=2, stage=1, accumulation=2)),
    ("llama", LARGE, CONTEXT | {"sharding": "stage3"}, Plan(context=2, stage=3, accumulation=2, recompute=False)),
    ("mistral", {}, CONTEXT | {"recompute": True}, Plan(context=2, accumulation=2, recompute=True)),
    ("gemma", {}, CONTEXT | TENSOR, Plan(context=2, tensor=2, accumulation=2)),
    ("qwen2", {}, CONTEXT | TENSOR | SEQUENCE, Plan(context=2, tensor=2, sequence=True, accumulation=2)),
    ("llama", {}, CONTEXT | PIPELINE, Plan(context=2, pipeline=2, accumulation=2)),
    ("llama", {}, LORA | CONTEXT, Plan(context=2, accumulation=2)),
    ("mixtral", {}, CONTEXT | EXPERTS, Plan(context=2, experts=2, accumulation=2)),
    ("olmo2", {}, TENSOR, Plan(tensor=2, accumulation=2)),
    ("phi3", {}, TENSOR | SEQUENCE | {"recompute": True}, Plan(tensor=2, sequence=True, recompute=True)),
    ("gemma3_text", {}, TENSOR | PIPELINE, Plan(tensor=2, pipeline=2, accumulation=2)),
    ("mixtral", {}, {"sharding": "stage2"}, Plan(sharding=2, stage=2, accumulation=2)),
    ("mixtral", {}, {"sharding": "stage3"}, Plan(sharding=2, stage=3, accumulation=2)),
    ("llama", {"num_key_value_heads": 1}, TENSOR, Plan(tensor=2, accumulation=2)),
    ("mixtral", {}, TENSOR | PIPELINE, Plan(tensor=2, pipeline=2, accumulation=2)),
    ("llama", {}, LORA | {"sharding": "stage3"}, Plan(sharding=2, stage=3, accumulation=2)),
    ("llama", {}, LORA | TENSOR | SEQUENCE | {"recompute": True}, Plan(tensor=2, sequence=True, recompute=True)),
    ("llama", {}, DORA | TENSOR, Plan(tensor=2, accumulation=2)),
    ("llama", {}, DORA | TENSOR | SEQUENCE | {"recompute": True}, Plan(tensor=2, sequence=True, recompute=True)),
    ("llama", {}, LORA | PIPELINE | {"recompute": True}, Plan(pipeline=2, recompute=True, accumulation=2)),
    ("llama", {}, {"plugin": ["label-smoothing"]} | TENSOR, Plan(tensor=2, accumulation=2)),
    ("llama", {}, LORA | TENSOR | PIPELINE, Plan(tensor=2, pipeline=2, accumulation=2)),
    ("gemma", {}, PIPELINE, Plan(data=2, pipeline=2, accumulation=2)),
    (
        *("gemma", LARGER | {"tie_word_embeddings": True}, PIPELINE | STAGE1 | SMALL_BUCKETS),
        Plan(sharding=2, stage=1, pipeline=2, accumulation=2),
    ),
    ("gemma", {}, PIPELINE | INTERLEAVED, Plan(data=2, pipeline=2, accumulation=4, virtual=2)),
    (
        *("gemma", {"vocab_size": 501}, PIPELINE | INTERLEAVED | STAGE1),
        Plan(sharding=2, stage=1, pipeline=2, accumulation=4, virtual=2),
    ),
    ("llama", {}, STAGE1 | PAIRS, Plan(data=2, sharding=2, stage=1, accumulation=2)),
    ("llama", LARGER, STAGE2 | PAIRS | SMALL_BUCKETS, Plan(data=2, sharding=2, stage=2)),
    (
        *("mixtral", LARGER, EXPERTS | STAGE1 | PAIRS | SMALL_BUCKETS),
        Plan(data=2, sharding=2, stage=1, experts=2, accumulation=2),
    ),
    ("mixtral", LARGER, EXPERTS | TENSOR, Plan(data=2, tensor=2, experts=2, accumulation=2)),
    ("mixtral", {}, LORA, Plan(data=2, accumulation=2)),
]


def name_of(value: Any) -> str:
    if isinstance(value, Plan):
        return f"{value.devices}ranks"
    return value if isinstance(value, str) else "-".join(f"{k[:6]}{v}" for k, v in value.items())


def case_of(*case: Any) -> Any:
    family, _, settings, plan = case
    is_quick = (
        not plan.recompute
        and plan.virtual == 1
        and plan.devices == 2
        and (family in ("olmo2", "gemma") or (plan.stage == 3 and family == "mixtral"))
    )
    return pytest.param(*case, marks=[needs(*settings.get("plugin", [])), *([] if is_quick else [pytest.mark.slow])])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "axis", "a_layer"),
    [
        ({}, "data", 0),
        ({"sharding": "stage1"}, "sharding", 0),
        ({"sharding": "stage2"}, "sharding", 0),
        # Each of two micro-batches gathers a block's matrices before it goes forward and before it goes backward, those
        # that train and those that rest, and then sums a block's gradients.
        ({"sharding": "stage3"}, "sharding", 3),
        pytest.param({"sharding": "stage3", **LORA}, "sharding", 5, marks=needs("lora")),
        (TENSOR | {"sharding": "stage1"}, "sharding", 0),
    ],
    ids=["data", "stage1", "stage2", "stage3", "stage3-lora", "tensor-stage1"],
)
def test_collectives_do_not_grow_with_the_number_of_tensors(
    model_of: Callable[..., Path], models: Path, tmp_path: Path, settings: dict[str, Any], axis: str, a_layer: int
) -> None:
    write_data(tmp_path, [{"src": "one", "tgt": "two"}] * 64)
    calls = []
    for layers in (2, 6):
        fixed = {
            "model_name_or_path": str(model_of("llama", num_hidden_layers=layers)),
            "tokenizer_name_or_path": str(models / "llama-tied-gqa"),
            "dataset_name_or_path": str(tmp_path),
            "output_dir": str(tmp_path / f"out-{layers}"),
            "max_length": 64,
            "gradient_accumulation_steps": 2,
        }
        plain = {"plugin": [*settings.get("plugin", []), *PLAIN]}
        ranks = run_ranks(
            4 if TENSOR.keys() <= settings.keys() else 2, "measuring:train", {**fixed, **settings, **plain}, 1, 32
        )
        calls.append(ranks[0].value["calls"][axis])
    assert calls[1] - calls[0] == 4 * 2 * a_layer, calls
    assert calls[0] - 2 * 2 * a_layer < 15


@pytest.mark.parametrize(
    ("family", "changes", "settings", "plan"),
    [case_of(*case) for case in CASES],
    ids=name_of,
)
def test_ranks_hold_need_and_send_what_is_planned(
    model_of: Callable[..., Path], models: Path, tmp_path: Path,
    family: str, changes: dict[str, Any], settings: dict[str, Any], plan: Plan,
) -> None:  # fmt: skip
    folder, (rows, length) = model_of(family, **changes), ((1, 32) if changes is LARGE else (2, 128))
    data = tmp_path / "data"
    data.mkdir()
    write_data(data, [{"src": "one", "tgt": "two"}] * 64)
    fixed = {
        "model_name_or_path": str(folder),
        "tokenizer_name_or_path": str(models / "llama-tied-gqa"),
        "dataset_name_or_path": str(data),
        "output_dir": str(tmp_path / "out"),
        "max_length": 64,
        "gradient_accumulation_steps": plan.accumulation,
    }
    plain = {"plugin": [*settings.get("plugin", []), *PLAIN]}
    ranks = [
        rank.value for rank in run_ranks(plan.devices, "measuring:train", {**fixed, **settings, **plain}, rows, length)
    ]
    paper = on_paper({"model_name_or_path": str(folder), **settings})
    outline, bucket = paper.outline, paper.run.settings.options["parallel-4d"].bucket
    calculator = Calculator(outline, Precision(), rows, length, bucket=bucket)
    stages = calculator.stages(plan)
    assert sorted({rank["stage"] for rank in ranks}) == list(range(plan.pipeline))
    for rank in ranks:
        stage = stages[rank["stage"]]
        held, memory = calculator.held(plan, stage), calculator.rank(plan, rank["stage"], stage)
        assert (rank["parameters"], rank["pieces"]) == (held.parameters, held.pieces)
        if plan.stage:  # a plan takes each slice to have its share of each tensor, and two powers of all
            alike = [one for one in ranks if one["stage"] == rank["stage"]]
            found = sum(one["optimizer"] + 8 * one["tensors_elsewhere"] for one in alike)
            assert found == len(alike) * held.optimizer
            assert rank["optimizer"] == pytest.approx(held.optimizer, rel=1e-2)
        else:
            assert rank["optimizer"] == held.optimizer
        if plan.stage < 3 and plan.copies * plan.pieces > 1:
            buckets = calculator.buckets(plan, stage)
            if not plan.stage and plan.copies == plan.experts:  # nobody has the same experts
                buckets = tuple(bucket for bucket in buckets if not bucket.of_experts)
            assert rank["buckets"] == [bucket.size(plan.pieces) for bucket in buckets]
        # Nothing else outlives a step, but scalars.
        fixed_bytes = held.parameters + held.pieces + rank["optimizer"]
        assert 0 <= rank["rests"] - fixed_bytes < 256
        if not plan.offload:  # what a CPU offloads stays where it was
            peak, beside = 0.04, 0.08
            # Of several parts a stage with few micro-batches, the last parts have come back before all are under way.
            if filled(plan.accumulation, plan.pipeline, plan.virtual) > plan.accumulation:
                peak, beside = 0.07, 0.1
            elif plan.experts > 1:  # a plan takes tokens to go to all alike
                peak, beside = 0.05, 0.1
            assert memory.peak == pytest.approx(rank["peak"], rel=peak)
            assert memory.peak - fixed_bytes == pytest.approx(rank["peak"] - fixed_bytes, rel=beside)
        sent = communication.rank(calculator, plan, rank["stage"], stage)
        planned = {"data": sent.data, "sharding": sent.sharding, "tensor": sent.tensor, "pipe": sent.pipeline}
        planned["context"] = sent.context
        found = {axis: rank["sent"].get(axis, 0) for axis in planned}
        if plan.stage:  # slices of a tied matrix's gradient, of which the last may be shorter
            found["pipe"] = max(one["sent"].get("pipe", 0) for one in ranks if one["stage"] == rank["stage"])
        assert found == planned

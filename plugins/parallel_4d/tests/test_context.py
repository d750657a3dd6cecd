"""Context parallelism: processes that share the tokens of each row learn what one process learns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from processes import run_ranks
from trainings import PLANS, Trainings, assert_equal

import sft
from sft.testing import needs, read_metrics
from sft_parallel_4d.context import ContextParallel

pytestmark = pytest.mark.sweep  # as far as its tests are slow

FULL: dict[str, Any] = {}
LORA: dict[str, Any] = {"plugin": ["lora"], "lora_rank": 4}
PACKED: dict[str, Any] = {"plugin": ["greedy-zero-padding", "flashmask"]}
BOTH: dict[str, Any] = {**LORA, "plugin": [*LORA["plugin"], *PACKED["plugin"]]}
WHATS = {"full": FULL, "lora": LORA, "packed": PACKED, "lora-packed": BOTH}
SHARING = [plan for plan in PLANS if plan.startswith("cp")]


def case(*case: Any, plugins: Any = (), slow: bool = True) -> Any:
    return pytest.param(*case, marks=[needs(*plugins), *([pytest.mark.slow] if slow else [])])


def crossed(plan: str, what: str, slow: bool = True) -> Any:
    return case(plan, what, plugins=WHATS[what].get("plugin", ()), slow=slow)


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        crossed("cp2", "lora-packed", slow=False),
        *(crossed(plan, what) for plan in SHARING for what in WHATS if (plan, what) != ("cp2", "lora-packed")),
    ],
)
def test_processes_that_share_rows_learn_what_one_learns(trainings: Trainings, plan: str, what: str) -> None:
    """The rows' lengths are not multiples of the processes. With cp4, and with cp2-tp2, key heads are fewer than
    processes."""
    settings = WHATS[what]
    assert_equal(trainings.one(**settings), trainings.many(PLANS[plan], **settings)[0])


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        crossed(plan, what)
        for plan in ("cp2", "cp2-tp2-sequence", "cp2-pp2", "cp2-stage3")
        for what in ("full", "lora-packed")
    ],
)
def test_blocks_are_computed_again_together(trainings: Trainings, plan: str, what: str) -> None:
    settings = {**WHATS[what], "recompute": True}
    assert_equal(trainings.one(**settings), trainings.many(PLANS[plan], **settings)[0])


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["cp2-dp2", "cp2-stage2", "cp2-stage3"])
def test_ranks_may_have_different_numbers_of_micro_batches(trainings: Trainings, uneven_data: Path, plan: str) -> None:
    settings = {"dataset_name_or_path": str(uneven_data)}
    assert_equal(trainings.one(**settings), trainings.many(PLANS[plan], **settings)[0])


@pytest.mark.parametrize(
    "plugins",
    [
        case(names, plugins=names)
        for names in (["vera"], ["lora", "dora"], ["lora", "nf4"], ["neftune"], ["label-smoothing"])
    ],
)
def test_techniques(trainings: Trainings, plugins: list[str]) -> None:
    """(Of NEFTune the lengths of documents; its noise is drawn in each process.)"""
    settings: dict[str, Any] = {"plugin": plugins, **({"neftune_noise_alpha": 1e-6} if "neftune" in plugins else {})}
    assert_equal(trainings.one(**settings), trainings.many(PLANS["cp2"], **settings)[0])


@pytest.mark.slow
def test_sixteen_bits(trainings: Trainings) -> None:
    settings = {**LORA, "bf16": True, "device": "cpu", "job": "jobs:train_in_16_bits"}
    found = [read_metrics(trainings.one(**settings)), read_metrics(trainings.many(PLANS["cp2"], **settings)[0])]
    losses = [[line["eval_loss"] for line in lines if "eval_loss" in line] for lines in found]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][-1] < losses[0][0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["keys", "gradient", "weight"])
def test_damage_on_one_rank_is_noticed(trainings: Trainings, kind: str) -> None:
    one = trainings.one(plugin=[])
    damaged, _ = trainings.many(PLANS["cp2"], damage=kind, plugin=[])
    with pytest.raises(AssertionError, match="is apart from"):
        assert_equal(one, damaged)


@pytest.mark.slow
def test_those_that_share_rows_draw_their_own(trainings: Trainings) -> None:
    """They have different tokens; tensor ranks have the same ones."""
    quiet = {"do_eval": False, "evaluation_strategy": "no"}
    for plan, different in (("cp2", 2), ("cp2-dp2", 4), ("cp2-tp2", 2), ("cp2-pp2", 4)):
        _, results = trainings.many(PLANS[plan], job="jobs:draw", **quiet)
        assert len({tuple(result.value["draws"]) for result in results}) == different, plan


# --- what of a row is where -----------------------------------------------------------------------------------


def shares(batch: sft.Batch, ranks: int, parts: int = 1) -> list[sft.Batch]:
    axes: list[Any] = [SimpleNamespace(rank=rank, size=ranks) for rank in range(ranks)]
    return [ContextParallel(axis, parts).share(batch) for axis in axes]


@pytest.mark.parametrize(("ranks", "parts"), [(2, 1), (3, 1), (2, 4)])
def test_shares_are_the_row_and_as_large_as_each_other(ranks: int, parts: int) -> None:
    rows = [[sft.Example(np.arange(n), np.where(np.arange(n) % 5 > 1, np.arange(n), -100)) for n in (7, 11, 5)]] * 2
    batch = sft.assemble(rows, 0)
    found = shares(batch, ranks, parts)
    length = found[0].startend_row_indices.shape[2]
    assert length % (ranks * parts) == 0
    assert 0 <= length - batch.input_ids.shape[1] < ranks * parts
    for name in ("input_ids", "labels", "position_ids"):
        whole = np.empty((2, length), np.int64)
        for share in found:
            whole[:, share.columns] = getattr(share, name)
        assert (whole[:, : batch.input_ids.shape[1]] == getattr(batch, name)).all(), name
    assert sum(share.tokens for share in found) == batch.tokens
    assert sum(share.padding_tokens for share in found) == 2 * length - batch.tokens
    assert sum(share.target_tokens for share in found) == batch.target_tokens
    assert {share.lengths for share in found} == {batch.lengths}


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "kept", "ranks"), [(4, 4, 2), (4, 2, 4), (12, 6, 4), (3, 1, 3)])
def test_attention_over_shares_is_that_over_rows(heads: int, kept: int, ranks: int) -> None:
    """Outputs and all three gradients, with a window and with documents, against float64."""
    for result in run_ranks(ranks, "part_jobs:attend_in_shares", heads, kept, timeout=60):
        assert max(result.value) < 1e-5, result.value

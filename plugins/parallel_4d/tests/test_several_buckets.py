"""Runs with many buckets learn what one process learns. In other tests all gradients of a small model are in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FOLDER
from processes import run_ranks
from trainings import ALL, TOLERANCE, Plan, Trainings, assert_equal, context, experts, pipeline, tensor

import sft
from sft.distributed.pieces import SavedState

pytestmark = pytest.mark.sweep  # as far as its tests are slow

SAVED = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 4, "max_steps": 3}
# Of the dense model a matrix has 2 to 6 kB and the embedding 262, of the mixture 2 to 5 kB each; a norm has 128 bytes.
SIZES = {"dense": 12_000, "experts": 6_000, "partial": 300}

PLANNED = {
    **ALL,
    "dp2-stage1-offload": Plan(4, 4, {"sharding": "stage1 offload", "sharding_parallel_degree": 2}),
    "tp2-sequence-stage2": Plan(4, 2, tensor(sharding="stage2", sequence_parallel=True)),
    "ep2-dp2-pp2": Plan(8, 4, experts() | pipeline()),
    "ep2-tp2-sequence-stage1": Plan(8, 4, experts() | tensor(sharding="stage1", sequence_parallel=True)),
    "cp2-ep2-tp2-sequence-pp2": Plan(8, 1, context() | experts() | tensor(sequence_parallel=True) | pipeline()),
    "cp2-ep2-tp2-sequence-stage1": Plan(
        8, 2, context() | experts() | tensor(sharding="stage1", sequence_parallel=True)
    ),
}


def size_for(kinds: str) -> int:
    """Bytes of which each of ``kinds`` fills several buckets."""
    return min(SIZES[kind] for kind in kinds.split())


def run(
    trainings: Trainings, plan: str, kinds: str, spoiled: str | None = None, late: bool = False, **settings: Any
) -> Path:
    """The output folder of a run under ``plan``, in which some rank has several buckets of each of ``kinds``."""
    values, size = trainings.settings(PLANNED[plan], **settings), size_for(kinds)
    results = run_ranks(PLANNED[plan].processes, "bucketed:train", values, size, spoiled, late, timeout=100)
    for kind in kinds.split():
        counts = [result.value["buckets"].get(kind, 0) for result in results]
        assert min(counts) > 1, f"{kind}: {counts} buckets"
    return Path(values["output_dir"])


def gradients(folder: Path) -> dict[str, np.ndarray]:
    """Those of the first step, clipped: AdamW's first mean is a tenth of them then."""
    state = SavedState(folder / "checkpoint-1" / "trainer", "optimizer", sft.AdamW.grains)
    return {key: 10.0 * state.whole(key) for key in state if key.endswith(".moment1")}


def assert_same_gradients(one: Path, other: Path) -> None:
    """To 1e-5 of the greatest value of each tensor."""
    wanted, found = gradients(one), gradients(other)
    assert set(wanted) == set(found)
    assert wanted
    for key, values in wanted.items():
        scale = float(np.abs(values).max())
        np.testing.assert_allclose(found[key], values, rtol=0, atol=TOLERANCE * scale, err_msg=key)


def test_losses_norms_and_weights(trainings: Trainings) -> None:
    assert_equal(trainings.one(plugin=[]), run(trainings, "stage2", "dense", plugin=[]))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("plan", "kinds"),
    [
        *((plan, "dense") for plan in ("dp2", "stage1", "stage2", "stage3", "stage1-offload", "stage2-offload")),
        *((plan, "dense") for plan in ("dp2-stage1", "dp2-stage2", "dp2-stage3")),
        *((plan, "dense") for plan in ("pp2-dp2", "pp2-stage1", "pp2-virtual-dp2", "cp2-dp2", "cp2-stage3")),
        *((plan, "partial") for plan in ("tp2-sequence", "tp2-sequence-pp2")),
        *((plan, "dense partial") for plan in PLANNED if plan.startswith("tp2-sequence-stage")),
    ],
)
def test_a_dense_model(trainings: Trainings, plan: str, kinds: str, recompute: bool) -> None:
    settings = {**SAVED, "recompute": recompute}
    one, many = trainings.one(**settings), run(trainings, plan, kinds, **settings)
    assert_equal(one, many)
    assert_same_gradients(one, many)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["stage1-offload", "stage2-offload", "cp2-stage2-offload", "dp2-stage1-offload"])
def test_copies_to_the_host_that_end_when_they_must(trainings: Trainings, plan: str) -> None:
    """As late as a GPU's may: what is copied has neither changed nor gone by then."""
    settings = {**SAVED, "max_grad_norm": 0.0}
    one, many = trainings.one(**settings), run(trainings, plan, "dense", late=True, **settings)
    assert_equal(one, many)
    assert_same_gradients(one, many)


def mixture(tokenizer: Path) -> dict[str, Any]:
    model = {"model_name_or_path": str(FOLDER / "mixtral"), "tokenizer_name_or_path": str(tokenizer)}
    return {**model, **SAVED, "max_length": 60, "src_length": 32}


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("plan", "kinds"),
    [
        *((plan, "dense") for plan in ("ep2", "ep2-offload", "ep2-pp2")),  # nobody else has the same experts
        *((plan, "dense experts") for plan in ("ep2-dp2", "ep2-stage1", "ep2-stage2", "ep2-stage3", "ep2-dp2-pp2")),
        *((plan, "dense experts") for plan in ("cp2-ep2-dp2", "cp4-ep2", "cp2-ep2-stage2", "cp2-ep2-stage3")),
        *((plan, "dense experts") for plan in ("stage1", "stage2", "stage3", "pp2-dp2")),  # each has all experts
        *((plan, "dense partial") for plan in ("ep2-tp2-sequence", "cp2-ep2-tp2-sequence-pp2")),
        *((plan, "dense partial experts") for plan in ("tp2-sequence-stage2", "ep2-tp2-sequence-stage1")),
        ("cp2-ep2-tp2-sequence-stage1", "dense partial experts"),
    ],
)
def test_a_mixture(trainings: Trainings, tokenizer: Path, plan: str, kinds: str, recompute: bool) -> None:
    settings = {**mixture(tokenizer), "recompute": recompute}
    one, many = trainings.one(**settings), run(trainings, plan, kinds, **settings)
    assert_equal(one, many)
    assert_same_gradients(one, many)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "partial", "experts"])
def test_a_bucket_that_is_wrong_is_noticed(trainings: Trainings, tokenizer: Path, kind: str) -> None:
    settings = mixture(tokenizer)
    one = trainings.one(**settings)
    spoiled = run(trainings, "tp2-sequence-stage2", "dense partial experts", kind, **settings)
    with pytest.raises(AssertionError, match="is apart from"):
        assert_equal(one, spoiled)
    with pytest.raises(AssertionError, match="moment1"):
        assert_same_gradients(one, spoiled)

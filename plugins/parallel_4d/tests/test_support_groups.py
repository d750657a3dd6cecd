"""The tests' process groups do what numpy does, in groups of fleet and in the world, and say who is missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from group_jobs import numbers
from groups import narrowed, reduced, widened
from processes import RankError, run_ranks

PLANS: dict[str, tuple[int, dict[str, int], list[str]]] = {
    "dp2": (2, {"dp_degree": 2}, ["data"]),
    "tp2-dp2": (4, {"mp_degree": 2, "dp_degree": 2}, ["data", "model"]),
    "pp2-sharding2": (4, {"pp_degree": 2, "sharding_degree": 2}, ["pipe", "sharding"]),
    "dp4": (4, {"dp_degree": 4}, ["data"]),
}


def values(count: int, target: str, *args: Any, **options: Any) -> list[Any]:
    return [result.value for result in run_ranks(count, f"group_jobs:{target}", *args, timeout=60, **options)]


@pytest.mark.parametrize("plan", PLANS)
def test_collectives(plan: str) -> None:
    count, degrees, kinds = PLANS[plan]
    for rank, found in enumerate(values(count, "collectives", degrees, kinds)):
        assert found["world"]["ranks"] == list(range(count))
        for kind, here in found.items():
            ranks = here.pop("ranks")
            assert rank in ranks
            assert len(ranks) == degrees.get(
                {"model": "mp", "pipe": "pp", "data": "dp"}.get(kind, kind) + "_degree", count
            )
            inputs = np.stack([numbers(member) for member in ranks])
            place = ranks.index(rank)
            total = sum(inputs[1:], inputs[0])  # float32, in the order of the ranks
            wanted = {
                **dict.fromkeys(["SUM", "calc_stream", "waited"], total),
                **{"MAX": inputs.max(0), "MIN": inputs.min(0), "list": inputs, "tensor": inputs.reshape(-1)},
                **dict.fromkeys(["scattered", "scattered list"], np.split(total, len(ranks))[place]),
                "swapped": inputs.reshape(len(ranks), len(ranks), -1)[:, place].reshape(-1),
                **{"broadcast": inputs[-1], "ring": inputs[place - 1]},
            }
            product = here.pop("PROD")
            assert product == np.multiply.reduce(inputs, 0).tolist()
            assert here.pop("objects") == [{"rank": member, "more": "x" * member} for member in ranks]
            assert here.pop("sent") == [f"from {ranks[-1]}", ranks[-1]]
            assert here == {name: value.tolist() for name, value in wanted.items()}, kind


def test_sums_repeat_and_round_once() -> None:
    in_order = [[1e8], [1.0], [-1e8], [1.0]]  # 1e8 + 1 is 1e8 in float32
    assert values(4, "sums", "float32", in_order) == [[1.0]] * 4
    # One after the other in bfloat16, 256 + 1 stays 256. float16 is the same at 2048.
    assert values(4, "sums", "bfloat16", [[256.0, 1.0], [1.0, 2.0], [1.0, 3.0], [0.0, 4.0]]) == [[258.0, 10.0]] * 4
    assert values(4, "sums", "float16", [[2048.0], [1.0], [1.0], [0.0]]) == [[2050.0]] * 4


def test_rounding_is_paddles(paddle: Any) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    numbers = np.concatenate([bits, ties]).view(np.float32)
    normal = np.isfinite(numbers) & (np.abs(numbers) >= np.finfo(np.float32).tiny)  # sft lets denormals be zero
    numbers = np.concatenate([numbers[normal], np.array([0, -0.0, np.inf, -np.inf, 3.4e38], np.float32)])
    cast = paddle.to_tensor(numbers).astype("bfloat16")
    assert (narrowed(numbers, "bfloat16").view(np.uint16) == cast.view("uint16").numpy()).all()
    assert (widened(narrowed(numbers, "bfloat16"), "bfloat16") == cast.astype("float32").numpy()).all()
    assert np.isnan(widened(narrowed(np.array([np.nan], np.float32), "bfloat16"), "bfloat16")).all()


def test_mean(paddle: Any) -> None:
    parts = [np.array([1, 2], np.float32).view(np.uint8), np.array([4, 8], np.float32).view(np.uint8)]
    mean = reduced(parts, "float32", paddle.base.core.ReduceOp.AVG)
    assert mean.view(np.float32).tolist() == [2.5, 5.0]


def test_tensors_are_written_where_they_lie() -> None:
    found = values(2, "places")
    assert [each["buffer"] for each in found] == [[1, 1, 3, 3, 1, 1, 1, 1], [2, 2, 3, 3, 2, 2, 2, 2]]
    assert found[0]["parameter"][0] == found[0]["parameter"][1] == found[1]["parameter"][1]
    assert found[0]["trained"]
    assert "contiguous" in found[0]["refused"]


def test_messages_arrive_in_order_whichever_is_waited_for() -> None:
    assert values(2, "late_waits")[1] == [[1, 1], [2, 2], [3, 3]]


def test_ranks_that_disagree() -> None:
    with pytest.raises(RankError, match=r"is at .* but rank \d at .*float32 \[3\]: group 0 \(ranks 0, 1\)"):
        values(2, "disagree")


def test_a_missing_rank_is_named() -> None:
    message = r"Rank 2 waited 1 s for rank 3: all_reduce SUM, float32 \[3\], group \d+ \(ranks 2, 3\)\."
    with pytest.raises(RankError, match=message) as caught:
        values(4, "miss", env={"RANK_GROUPS_TIMEOUT": "1"})
    assert caught.value.rank == 2


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (0, "Rank 1 waited 1 s for rank 0, which has not opened Paddle's store"),
        (1, "Rank 0 waited 1 s for member 1 of the 2 of group 0: it has not joined"),
    ],
)
def test_a_rank_that_never_joins_is_named(absent: int, message: str) -> None:
    with pytest.raises(RankError, match=message):
        values(2, "never_join", absent, env={"RANK_GROUPS_TIMEOUT": "1"})

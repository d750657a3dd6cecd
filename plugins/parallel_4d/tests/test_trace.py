"""When ranks of real runs send what, as they recorded it: in one order, during backward, and in whole buckets."""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from families import FOLDER
from processes import run_ranks
from trainings import ALL, PLANS, ROWS, Trainings

BUCKET = 60_000
"""Bytes of float32 gradients; the model has about six times as many."""
SCRIPTS = str(Path(__file__).parents[3] / "scripts")
QUIET = {"do_eval": False, "evaluation_strategy": "no", "max_steps": 2}


FILLED = {"pp2-virtual-dp2": 2 * 4}
"""How often a stage goes backward where that is not once a micro-batch: in two parts, and as often as fills up a
schedule."""


def mixture(plan: str, tokenizer: Path) -> dict[str, Any]:
    """The model that a plan needs which divides experts."""
    model = {"model_name_or_path": str(FOLDER / "mixtral"), "tokenizer_name_or_path": str(tokenizer)}
    return model if "ep2" in plan else {}


_KNOWN: dict[str, list[list[dict[str, Any]]]] = {}
_WAITS: dict[str, list[list[str]]] = {}


def recorded(trainings: Trainings, plan: str, **settings: Any) -> list[list[dict[str, Any]]]:
    """The events of the second step, of each rank, in order; each run is made once."""
    key = f"{plan} {settings}"
    if key in _KNOWN:
        return _KNOWN[key]
    values = trainings.settings(ALL[plan], **QUIET, **settings)
    ranks = run_ranks(ALL[plan].processes, "recording:record", values, BUCKET, timeout=100)
    events = ([event for event in rank.value["events"] if event["step"] == 2] for rank in ranks)
    _WAITS[key] = [[wait[2:] for wait in rank.value["waits"] if wait.startswith("2 ")] for rank in ranks]
    _KNOWN[key] = [sorted(own, key=lambda event: event["began"]) for own in events]
    return _KNOWN[key]


def sent(events: list[dict[str, Any]]) -> dict[tuple[int, ...], list[tuple[str, int]]]:
    """What, and how many bytes, in each group. (Of an exchange none: to experts each rank sends other tokens.)"""
    found: dict[tuple[int, ...], list[tuple[str, int]]] = defaultdict(list)
    for event in events:
        if "bytes" in event and event["what"] not in ("send", "recv"):
            size = 0 if event["what"] == "all_to_all" else event["bytes"]
            found[tuple(event["group"])].append((event["what"], size))
    return found


def assert_one_order(ranks: list[list[dict[str, Any]]]) -> None:
    """All members of each group have begun the same collectives, of the same bytes, in the same order."""
    for group in {group for events in ranks for group in sent(events)}:
        first, *others = (sent(ranks[member])[group] for member in group)
        assert first
        assert others == [first] * len(others)


@pytest.mark.parametrize(
    "plan",
    [
        "stage1",
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("dp2", "stage2", "stage3")),
        *(
            pytest.param(p, marks=pytest.mark.slow)
            for p in ("dp2-stage1", "tp2-dp2", "tp2-stage2", "tp2-sequence-stage1")
        ),
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("pp2-dp2", "pp2-stage1", "pp2-virtual-dp2")),
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("cp2-dp2", "cp2-stage1", "cp2-stage3")),
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("ep2-dp2", "ep2-stage1")),
    ],
)
def test_collectives_have_one_order_and_reductions_begin_before_backward_ends(
    trainings: Trainings, tokenizer: Path, plan: str
) -> None:
    ranks = recorded(trainings, plan, **mixture(plan, tokenizer))
    assert_one_order(ranks)
    for events in ranks:
        kind = "reduce_scatter" if "stage" in plan else "all_reduce"
        gradients = [event["began"] for event in events if event["what"] == kind and event["overlaps"]]
        backward = [(event["began"], event["ended"]) for event in events if event["what"] == "backward"]
        # Stages 2 and 3 send those of each micro-batch, the others the sums of all.
        sending = backward if "stage2" in plan or "stage3" in plan else backward[-1:]
        assert len(backward) == FILLED.get(plan, ROWS // (2 * ALL[plan].data))
        assert all(any(began < one < ended for one in gradients) for began, ended in sending)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["cp2-pp2", "tp2-pp2", "cp2-ep2-stage2"])
def test_collectives_have_one_order(trainings: Trainings, tokenizer: Path, plan: str) -> None:
    assert_one_order(recorded(trainings, plan, **mixture(plan, tokenizer)))


@pytest.mark.parametrize(
    ("plan", "kinds"),
    [
        ("stage1", 1),
        *(pytest.param(p, 1, marks=pytest.mark.slow) for p in ("dp2", "stage2", "cp2-stage1", "tp2-dp2")),
        # A tied matrix by itself; what tensor ranks add up; experts.
        *(pytest.param(p, 2, marks=pytest.mark.slow) for p in ("pp2-dp2", "pp2-stage1")),
        *(pytest.param(p, 2, marks=pytest.mark.slow) for p in ("tp2-sequence-stage1", "ep2-dp2", "ep2-stage1")),
    ],
)
def test_no_collective_carries_less_than_a_bucket_where_a_bucket_is_possible(
    trainings: Trainings, tokenizer: Path, plan: str, kinds: int
) -> None:
    """Of gradients: all have a bucket's bytes but for one of each kind, the last; of each micro-batch where they are
    sent by themselves. Of stepped values: as many as buckets, each all at once. Beside them a step has a few
    numbers."""
    name = "reduce_scatter" if "stage" in plan else "all_reduce"
    for events in recorded(trainings, plan, **mixture(plan, tokenizer)):
        sent = [event for event in events if event.get("overlaps") and event["bytes"] > 64]
        gradients = [event["bytes"] for event in sent if event["what"] == name]
        slices = [event["bytes"] for event in sent if event["what"] == "all_gather"]
        times = 2 if plan == "stage2" else 1  # micro-batches
        each = gradients[: len(gradients) // times]
        assert len(each) > 1
        assert gradients == each * times
        assert sum(size < BUCKET for size in each) <= kinds
        assert [2 * size for size in slices] == (each if "stage" in plan else [])


@pytest.mark.parametrize(
    "plan",
    [
        "stage1",
        *(
            pytest.param(p, marks=pytest.mark.slow)
            for p in ("dp2", "stage2", "stage3", "tp2-dp2", "tp2-sequence-stage1")
        ),
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("pp2-dp2", "pp2-virtual", "cp2-stage1")),
    ],
)
def test_a_step_reads_what_the_device_computed_once(trainings: Trainings, plan: str) -> None:
    """The loss with the gradient norm, whatever the micro-batches (here two)."""
    recorded(trainings, plan)
    assert _WAITS[f"{plan} {{}}"] == [["strategy.py outcome"]] * ALL[plan].processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "group"),
    [("dp2-stage1", [0, 2]), ("dp2-stage2", [0, 2]), ("dp2-stage3", [0, 2]), ("cp2-dp2-stage1", [0, 4])],
)
def test_sums_over_a_second_axis_begin_while_backward_goes_on(
    trainings: Trainings, plan: str, group: list[int]
) -> None:
    """Of slices over the data ranks beside sharding: each bucket's once a step, when all micro-batches are in it, and
    all but the last two before backward ends."""
    ranks = recorded(trainings, plan)
    assert_one_order(ranks)
    events = ranks[0]
    sums = [event["began"] for event in events if event["what"] == "all_reduce" and event["group"] == group]
    slices = [event for event in events if event["what"] == "reduce_scatter"]
    backward = [(event["began"], event["ended"]) for event in events if event["what"] == "backward"]
    assert len(sums) == len(slices) / (1 if "stage1" in plan else len(backward)) > 2
    began, ended = backward[-1]
    assert all(began < one < ended for one in sums[:-2])


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["stage1-offload", "stage2-offload", "cp2-stage2-offload"])
def test_gradients_go_to_the_host_while_backward_goes_on(trainings: Trainings, plan: str) -> None:
    """Each bucket once a step, when all micro-batches are in its sum: all but the last one before backward ends."""
    for events in recorded(trainings, plan):
        taken = [event["began"] for event in events if event["what"] == "take"]
        backward = [(event["began"], event["ended"]) for event in events if event["what"] == "backward"]
        sums = [event for event in events if event["what"] == "reduce_scatter"]
        assert len(backward) > 1
        assert len(taken) == len(sums) / (1 if plan == "stage1-offload" else len(backward)) > 2
        began, ended = backward[-1]
        assert all(began < one < ended for one in taken[:-1])


@pytest.mark.slow
def test_stage_3_asks_for_the_next_block_while_this_one_computes(trainings: Trainings) -> None:
    """Of each of two micro-batches weights are on their way while a block computes: of three blocks and lm_head
    forward, and of three blocks backward, where recomputation lets us see when a block computes."""
    for events in recorded(trainings, "stage3", recompute=True):
        blocks = [(event["began"], event["ended"]) for event in events if event["what"] == "block"]
        assert len(blocks) == 2 * 2 * 4
        gathers = [event for event in events if event["what"] == "all_gather" and event["overlaps"]]
        ahead = [one for one in gathers if any(one["began"] < began < ended < one["waited"] for began, ended in blocks)]
        assert len(ahead) == 2 * (4 + 3)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["pp2", "pp2-virtual", "dp2"])
def test_forward_and_backward_wait_for_the_device_once_however_many_micro_batches(
    trainings: Trainings, plan: str
) -> None:
    """When all of it is under way, for the sum of losses. In a pipeline no stage waits to be told a size."""
    waits = []
    for rows in (2, 1):
        values = trainings.settings(PLANS[plan], **QUIET, per_device_train_batch_size=rows)
        ranks = run_ranks(PLANS[plan].processes, "recording:record", values, timeout=100)
        waits.append([rank.value["waits"] for rank in ranks])
    assert waits[0] == waits[1]
    for own in waits[0]:
        assert [wait for wait in own if wait.startswith("2 ")] == ["2 strategy.py outcome"]


def test_the_picture_in_the_documentation_shows_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As scripts/parallel_timeline.py draws it; and in it gradients are under way before backward has ended."""
    monkeypatch.syspath_prepend(SCRIPTS)
    script = importlib.import_module("parallel_timeline")
    found = json.loads(script.PICTURE.with_suffix(".json").read_text(encoding="utf-8"))
    assert script.drawn(found) == script.PICTURE.read_text(encoding="utf-8")
    for ranks in found.values():
        for events in ranks:
            ends = max(event["ended"] for event in events if event["what"] == "backward")
            assert min(event["began"] for event in events if event["what"] == "reduce_scatter") < ends


@pytest.mark.slow
def test_the_table_of_figures_in_the_documentation_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As scripts/parallel_parity.py makes it. In a ring of two a rank sends as many bytes as an all-reduce has: of the
    gradients, of a few numbers besides, and of what fills parameters up to whole lines of memory."""
    monkeypatch.syspath_prepend(SCRIPTS)
    script = importlib.import_module("parallel_parity")
    found = script.measure(script.ROOT, ["data 2"], ["full"])
    (figures,) = found["data 2"].values()
    assert 0 < figures["losses"] < 1e-6
    assert 0 < figures["weights"] < 1e-6
    # Embedding, four blocks of 7 matrices and 2 norms, and the last norm.
    values = 2048 * 32 + 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert 4 * values < figures["bytes"] < 1.01 * 4 * values
    assert figures["calls"] == 2
    assert figures["waits"] == 1
    (line,) = script.table([{}, found]).splitlines()[2:]
    assert line.startswith("| data 2 | – → 0.")
    assert line.endswith("| – → 2 | – → 387 | – → 1 |")

"""The time that a plan is expected to take, against a simulation of events that knows none of its formulas."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from events import Operation, interleaved, one_forward_one_backward, simulate

import sft
from sft_parallel_4d import communication
from sft_parallel_4d.command import command, sent_in_words
from sft_parallel_4d.machines import MACHINES, Machine
from sft_parallel_4d.memory import Calculator
from sft_parallel_4d.model_size import Precision
from sft_parallel_4d.outline import Outline
from sft_parallel_4d.plans import Plan, legal_plans
from sft_parallel_4d.ranking import ranked
from sft_parallel_4d.timeline import schedule
from sft_parallel_4d.timing import Load, loads, seconds, time_of, way_of
from sft_parallel_4d.travel import Lane, Travel

PLAIN = Load(
    forward=1.0, backward=2.0, inline_forward={}, inline_backward={}, blocks=4, gather=0.0, scatter=0.0,
    buckets=Travel(), each=False, host=0.0, step=0.0, spread=0.0, hop=0.0,
)  # fmt: skip


def plan_of(of: Sequence[Load], micro: int) -> Plan:
    return Plan(pipeline=len(of), accumulation=micro)


def end_of(operations: list[Operation]) -> float:
    return max(end for _, end in simulate(operations).values())


def pipeline(of: Sequence[Load], micro: int) -> list[Operation]:
    forward, backward = [load.forward for load in of], [load.backward for load in of]
    return one_forward_one_backward(forward, backward, [load.hop for load in of], micro)


SIZES = [(1, 1), (1, 5), (2, 1), (2, 7), (4, 2), (4, 4), (4, 32), (8, 3), (8, 64)]


@pytest.mark.parametrize(("stages", "micro"), SIZES)
def test_pipelines_of_equal_stages(stages: int, micro: int) -> None:
    """(m + p - 1) / m of what is computed, to the last digits; with hops within 2 %."""
    of = [PLAIN] * stages
    assert seconds(plan_of(of, micro), of) == pytest.approx(end_of(pipeline(of, micro)), rel=1e-12)
    assert seconds(plan_of(of, micro), of) == pytest.approx(3.0 * (micro + stages - 1), rel=1e-12)
    of = [replace(PLAIN, hop=0.15)] * stages
    assert seconds(plan_of(of, micro), of) == pytest.approx(end_of(pipeline(of, micro)), rel=0.02)


@pytest.mark.parametrize(("stages", "micro"), SIZES)
def test_pipelines_of_unequal_stages(stages: int, micro: int) -> None:
    rng = np.random.default_rng(stages * 100 + micro)
    for _ in range(5):
        of = [replace(PLAIN, forward=f, backward=2 * f, hop=0.1) for f in rng.uniform(0.8, 1.2, stages)]
        assert seconds(plan_of(of, micro), of) == pytest.approx(end_of(pipeline(of, micro)), rel=0.03)


@pytest.mark.parametrize(
    ("stages", "parts", "micro"),
    [(2, 2, 1), (2, 2, 3), (2, 2, 4), (2, 2, 7), (4, 2, 3), (4, 2, 6), (4, 2, 8), (4, 3, 11), (4, 4, 5), (4, 4, 16),
     (8, 2, 8), (8, 2, 32)],
)  # fmt: skip
def test_stages_of_several_parts(stages: int, parts: int, micro: int) -> None:
    """Equal ones to the last digits, with hops too (within 2 % where micro-batches make no whole turns); the share of
    time that is idle is that of one part a stage, divided by the parts. Unequal ones within 10 %. Idle micro-batches
    cost nothing and are not drawn."""
    plan = Plan(pipeline=stages, accumulation=micro, virtual=parts)
    for hop in (0.0, 0.05):
        of = [replace(PLAIN, hop=hop)] * stages
        expected = end_of(interleaved([1.0] * stages, [2.0] * stages, hop, micro, parts))
        is_exact = not hop or micro < 2 * stages or micro % stages == 0
        assert seconds(plan, of) == pytest.approx(expected, rel=1e-12 if is_exact else 0.02)
    if not stages < micro < 2 * stages:
        through = micro + (stages - 1) / parts if micro >= stages else stages + (micro - 1) / parts
        assert seconds(plan, [PLAIN] * stages) == pytest.approx(3.0 * through)
    rng = np.random.default_rng(stages)
    forward = rng.uniform(0.9, 1.1, stages).tolist()
    of = [replace(PLAIN, forward=f, backward=2 * f) for f in forward]
    events = simulate(interleaved(forward, [2 * f for f in forward], 0.0, micro, parts))
    assert seconds(plan, of) == pytest.approx(max(end for _, end in events.values()), rel=0.1)
    for stage, spans in enumerate(schedule(plan, of, micro)):
        of_a_pass = [span for span in spans if span.kind in ("forward", "backward")]
        happens = [
            (begin, number)
            for (_, place, number), (begin, _) in events.items()  # type: ignore[misc]
            if place % stages == stage and number < micro
        ]
        assert [span.micro for span in of_a_pass] == [number for _, number in sorted(happens)]
        assert [span.begin for span in of_a_pass] == pytest.approx([begin for begin, _ in sorted(happens)])


def equal(count: int, *sent: float) -> Travel:
    """So many buckets, full one after the other, which travel ``sent`` seconds each by one lane after the other."""
    lanes = (Lane(axis, (seconds,) * count) for axis, seconds in zip(AXES[-len(sent) :], sent, strict=True))
    return Travel(tuple((number + 1) / count for number in range(count)), tuple(lanes))


AXES = ("sharding", "host", "data")


def backward_with_buckets(load: Load, stage: int, name: Hashable) -> list[Operation]:
    """The last backward in as many parts as there are buckets, each of which leaves when its part is through. By each
    further lane it goes on when it has come, and another bucket has left, or backward is over. Where buckets hold
    backward up, what was on its way between devices when a bucket left has come before the next part begins."""
    found, over, last = list[Operation](), 0.0, len(load.buckets.full) - 1
    for number, share in enumerate(load.buckets.full):
        own = np.float64((share - over) * load.backward)
        found.append(Operation(("part", stage, number), ("stage", stage), own))
        over = share
    found.append(Operation("backward", ("stage", stage), np.float64((1.0 - over) * load.backward)))
    if load.buckets.holds:
        for number, part in enumerate(found):
            places = ((number - 2 - leg, leg) for leg, lane in enumerate(load.buckets.lanes) if lane.axis != "host")
            part.needs += [("bucket", stage, before, leg) for before, leg in places if before >= 0]
    for leg, lane in enumerate(load.buckets.lanes):
        for number, sent in enumerate(lane.seconds):
            needs = [("part", stage, number + leg) if number + leg <= last else "backward"]
            needs += [("bucket", stage, number, leg - 1)] if leg else []
            found.append(Operation(("bucket", stage, number, leg), ("wire", stage, leg), np.float64(sent), list(needs)))
    found[0].needs.append(name) if name is not None else None
    return found


@pytest.mark.parametrize("buckets", [1, 2, 7])
@pytest.mark.parametrize("bucket", [0.01, 0.2, 1.0, 5.0])
def test_buckets_travel_behind_backward(buckets: int, bucket: float) -> None:
    load = replace(PLAIN, buckets=equal(buckets, bucket))
    found = end_of(backward_with_buckets(load, 0, None))
    assert load.goes_backward + load.tails[-1] == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_buckets_go_on_behind_backward(seed: int, holds: bool) -> None:
    """By three lanes, of which any may be the slow one: when each is through with what it has, exactly."""
    rng = np.random.default_rng(seed)
    shares = (*sorted(rng.uniform(0, 1, 6).tolist()), *rng.choice([[1.0], [0.9]]).tolist())
    speeds = rng.choice([0.1, 1.0, 3.0], 3)
    lanes = (
        Lane(axis, tuple((speed * rng.uniform(0, 1, 7)).tolist())) for axis, speed in zip(AXES, speeds, strict=True)
    )
    load = replace(PLAIN, buckets=Travel(tuple(shares), tuple(lanes), holds))
    events = simulate(backward_with_buckets(load, 0, None))
    for leg, tail in enumerate(load.tails):
        last = max(end for name, (_, end) in events.items() if name == "backward" or name[-1] <= leg)  # type: ignore
        assert load.goes_backward + tail == pytest.approx(last, rel=1e-12)


@pytest.mark.parametrize("sent", [0.1, 0.7, 2.0])
def test_buckets_that_leave_with_each_micro_batch(sent: float) -> None:
    """Of five micro-batches: the last bucket of each has come when the next one's backward begins."""
    load, found = replace(PLAIN, each=True, buckets=replace(equal(3, sent), holds=True)), list[Operation]()
    for micro in range(5):
        found.append(Operation(("forward", micro), "computes", np.float64(load.forward)))
        for one in backward_with_buckets(load, micro, ("forward", micro)):
            assert isinstance(one.lane, tuple)
            one.lane = "computes" if one.lane[0] == "stage" else "wire"
            one.name = ("backward", micro) if one.name == "backward" else one.name
            found.append(one)
            if one.name == ("part", micro, 0) and micro:
                one.needs.append(("bucket", micro - 1, 2, 0))
    assert seconds(plan_of([load], 5), [load]) == pytest.approx(end_of(found), rel=1e-12)


@pytest.mark.parametrize("last", [0.1, 1.0, 8.0])
def test_buckets_are_unequal(last: float) -> None:
    """The first ones are full soon, and the last one, which has the embedding's gradient, when all is over."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        shares = [*sorted(rng.uniform(0, 1, 6).tolist()), 1.0]
        sent = [*rng.uniform(0, 1, 6).tolist(), last]
        load = replace(PLAIN, buckets=Travel(tuple(shares), (Lane("data", tuple(sent)),)))
        assert load.goes_backward + load.tails[-1] == pytest.approx(
            end_of(backward_with_buckets(load, 0, None)), rel=1e-12
        )


def test_an_embedding_travels_when_backward_is_through(outline_of: Callable[..., Outline]) -> None:
    """On 2 data ranks with 16-bit weights: of Llama-3-70B's two matrices of the vocabulary in float32, lm_head's
    gradient is sent first, behind all blocks, and the embedding's last, behind nothing; queries', keys' and values'
    of the first block are full just before it."""
    outline, machine = outline_of(**LLAMA_70B), replace(MACHINES["8xA100-80G"], latency=0.0)
    (load,) = loads(Calculator(outline, BF16, 1, 4096), Plan(data=2), machine)
    vocabulary, attention = (4 * values / (0.8 * 300e9) for values in (128256 * 8192, 8192 * 8192 + 2 * 1024 * 8192))
    assert load.tails == [pytest.approx(vocabulary + attention, rel=0.01)]
    assert load.buckets.full[0] < 0.02
    assert load.buckets.lanes[0].seconds[0] == pytest.approx(vocabulary, rel=0.01)


@pytest.mark.parametrize("gather", [0.05, 0.25, 0.4])
def test_stage_3_asks_for_a_block_while_the_one_before_computes(gather: float) -> None:
    """Forward, each block's weights are asked for as the one before it begins, and a block begins when they are there.
    Backward, gradients go by the same wire: to within the last two blocks."""
    load = replace(PLAIN, blocks=8, forward=2.0, backward=4.0, gather=gather, scatter=gather / 2)
    forward, backward = list[Operation](), list[Operation]()
    for kind, own, found in (("F", 2.0 / 8, forward), ("B", 4.0 / 8, backward)):
        wire = list[Operation]()
        for block in range(8):
            asks = [(kind, block - 2), ("weights", block - 1)] if block > 1 else [("weights", 0)] if block else []
            wire.append(Operation(("weights", block), "wire", np.float64(gather), list[Hashable](asks)))
            if kind == "B" and block:
                wire.append(Operation(("gradients", block - 1), "wire", np.float64(gather / 2), [(kind, block - 1)]))
            found.append(Operation((kind, block), "computes", np.float64(own), [("weights", block)]))
        if kind == "B":
            wire.append(Operation(("gradients", 7), "wire", np.float64(gather / 2), [(kind, 7)]))
        found += wire
    assert load.goes_forward == pytest.approx(end_of(forward), rel=1e-12)
    found_backward = end_of(backward)
    assert found_backward - 1e-9 <= load.goes_backward <= found_backward + 2 * 4.0 / 8


@pytest.mark.parametrize(("stages", "micro"), [(1, 4), (4, 8)])
def test_a_whole_step(stages: int, micro: int) -> None:
    """Stages with their buckets, sums, optimizer and new values, as events."""
    rng = np.random.default_rng(stages)
    of = [
        replace(PLAIN, forward=f, backward=2 * f, hop=0.02, buckets=equal(3, 0.9, 0.2), host=0.1, step=0.2, spread=0.4)
        for f in rng.uniform(0.9, 1.1, stages)
    ]
    operations = list[Operation]()
    for one in pipeline(of, micro):
        assert isinstance(one.name, tuple)
        kind, stage, number = one.name
        if kind == "B" and number == micro - 1:
            parts = backward_with_buckets(of[stage], stage, None)
            parts[0].needs, parts[0].lags = one.needs, one.lags
            for part in parts:
                part.name = one.name if part.name == "backward" else part.name
                part.needs = [one.name if need == "backward" else need for need in part.needs]
            operations += parts
            after = of[stage].host + of[stage].step + of[stage].spread
            operations.append(Operation(("end", stage), ("end", stage), np.float64(after), [("bucket", stage, 2, 1)]))
        else:
            operations.append(one)
    assert seconds(plan_of(of, micro), of) == pytest.approx(end_of(operations), rel=0.02)


def test_what_is_drawn_is_what_happens() -> None:
    """Each pass of each stage, in a schedule of stages that differ; no rank computes two things at a time."""
    rng = np.random.default_rng(3)
    of = [replace(PLAIN, forward=f, backward=2 * f, hop=0.1, buckets=equal(2, 0.8)) for f in rng.uniform(0.5, 1.5, 4)]
    drawn, events = schedule(plan_of(of, 9), of, 9), simulate(pipeline(of, 9))
    for stage, spans in enumerate(drawn):
        computed = sorted((span.begin, span.end) for span in spans if span.kind in ("forward", "backward", "step"))
        assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(computed))
        for span in spans:
            if span.kind in ("forward", "backward"):
                assert (span.begin, span.end) == pytest.approx(events[span.kind[0].upper(), stage, span.micro])
        sent = sum(span.end - span.begin for span in spans if span.axis == "data")
        assert sent == pytest.approx(2 * 0.8)


def test_ways_by_hand() -> None:
    """Of nodes of 8: 8 side by side stay in one; 16 side by side have 8 ways out of each node, which is less than the
    links within; 2 that stand 8 apart have one."""
    machine = Machine(8, 1, 1, 1, 1, within=300e9, between=25e9, links=1.0, latency=1e-6, far_latency=1e-5)
    assert machine.way(8, 1).speed == 300e9
    assert machine.way(16, 1).speed == 200e9
    assert machine.way(2, 8).speed == 25e9
    assert machine.way(4, 2).seconds(3e11) == pytest.approx(1 + 3e-6)
    assert machine.way(64, 4).seconds(0, calls=2) == pytest.approx(2 * (1e-6 + 5 * 1e-5))
    assert machine.way(1, 1).seconds(1e12, 5) == 0


Outlines = Callable[..., Outline]
LLAMA_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
BF16 = Precision(16, 16, 16)


def test_operations_of_a_known_model(outline_of: Outlines) -> None:
    """6 a parameter and token for training (arXiv 2001.08361), without the embedding; and causal attention's, which are
    12 · layers · hidden · length (arXiv 2104.04473, appendix) halved for the mask. 8 and 16 with recomputation."""
    outline = outline_of(**LLAMA_70B)
    calculator, machine = Calculator(outline, BF16, 1, 4096), replace(MACHINES["8xA100-80G"], efficiency=1.0)
    parameters = outline.count()[0] - outline.embedding.size
    for recompute, times in ((False, 6), (True, 8)):
        (load,) = loads(calculator, Plan(recompute=recompute), machine)
        expected = 4096 * (times * parameters + times * 80 * 8192 * 4096)
        assert (load.forward + load.backward) * machine.flops == pytest.approx(expected, rel=1e-3)


def test_only_weights_that_train_have_gradients_computed(outline_of: Outlines) -> None:
    outline, machine = outline_of(**LLAMA_70B), MACHINES["8xA100-80G"]
    (whole,) = loads(Calculator(outline, BF16, 1, 512), Plan(), machine)
    outline.freeze()
    (frozen,) = loads(Calculator(outline, BF16, 1, 512), Plan(), machine)
    assert frozen.forward == whole.forward
    assert frozen.backward == pytest.approx(frozen.forward, rel=0.02)  # but for attention's two products
    assert whole.backward == pytest.approx(2 * whole.forward)


def test_all_that_is_sent_is_waited_for_or_hidden(outline_of: Outlines) -> None:
    """Of every plan of 16 devices: seconds of an axis are its bytes at its speed, and its collectives' latency."""
    outline = outline_of()
    machine = replace(MACHINES["8xL40S-48G"], latency=0.0, far_latency=0.0)
    calculator, tried = Calculator(outline, Precision(), 1, 64), set()
    for plan in legal_plans(outline, 16, 32, 1):
        if plan.pipeline > 1 or (plan.stage and plan.data > 1):  # other stages send other bytes; sums and slices mix
            continue
        of = loads(calculator, plan, machine)
        time, volume = time_of(plan, of), communication.busiest(calculator, plan)
        for axis in ("tensor", "data", "sharding"):
            sent = time.exposed.get(axis, 0.0) + time.hidden.get(axis, 0.0)
            expected = getattr(volume, axis) / way_of(plan, machine, axis).speed
            assert sent == pytest.approx(expected, rel=0.35 if plan.stage == 3 else 0.02), (plan, axis)
            tried.add((axis, sent > 0))
    assert tried == {(axis, is_sent) for axis in ("tensor", "data", "sharding") for is_sent in (False, True)}


@pytest.mark.parametrize(
    "plan",
    [
        Plan(context=2, pipeline=8, experts=2),
        Plan(context=4, tensor=4, experts=2),
        Plan(data=2, context=2, pipeline=4, experts=4),
        Plan(data=4, context=2, sharding=2, stage=1, experts=2),
        Plan(data=4, tensor=4, experts=4),
    ],
    ids=str,
)
def test_ranks_that_share_out_experts_are_neighbours(plan: Plan) -> None:
    """Those of rank 0, as fleet numbers ranks: how many of them stand in a node of 8 decides how fast they are."""
    ranks = np.arange(plan.devices).reshape(plan.data, plan.pipeline, plan.sharding, plan.context, plan.tensor)
    copies = ranks[:, 0, 0, : 1 if plan.stage else None, 0].reshape(-1)
    machine = MACHINES["8xA100-80G"]
    for axis, group in (("experts", copies[: plan.experts]), ("data", copies)):
        near = int((group < 8).sum())
        speed = machine.within if near == len(group) else min(machine.within, machine.between * near)
        assert way_of(plan, machine, axis).speed == (0.8 * speed if len(group) > 1 else np.inf), axis


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_copies_to_the_host_are_no_sums_over_data_ranks(outline_of: Outlines, stage: int) -> None:
    """There is one data rank; the host's link has its own speed, of which 80 % are had. Behind backward and
    other buckets go gradients alone."""
    outline, plan = outline_of(), Plan(sharding=2, stage=stage, offload=True, accumulation=2)
    machine = replace(MACHINES["8xL40S-48G"], host=1e6)
    calculator = Calculator(outline, Precision(), 1, 64, bucket=1 << 16)
    of = loads(calculator, plan, machine)
    expected = communication.busiest(calculator, plan).host / 0.8e6
    assert expected > 1
    time = time_of(plan, of)
    assert time.exposed["host"] + time.hidden["host"] == pytest.approx(expected, rel=1e-3)
    assert 0 < time.hidden["host"] <= of[0].goes_backward + of[0].tails[0]
    assert "data" not in time.exposed
    assert any(line.startswith("host: ") for line in sent_in_words(time))
    (spans,) = schedule(plan, of, 2)
    drawn = [span for span in spans if span.axis == "host"]
    assert sum(span.end - span.begin for span in drawn) == pytest.approx(expected, rel=1e-3)
    assert max(span.end for span in spans) == pytest.approx(time.total)


@pytest.mark.slow
def test_tensor_parallelism_stays_in_a_node_and_slow_nodes_move_plans(outline_of: Outlines) -> None:
    outline = outline_of(**LLAMA_70B)
    machine = MACHINES["8xH100-80G"]
    plans = legal_plans(outline, 64, 128, 1)
    best = ranked(Calculator(outline, BF16, 1, 4096, device_memory=machine.memory), plans, machine)[0]
    assert best.fits
    assert best.plan.tensor <= 8
    # Where a device sends 1 GB/s to other nodes, nothing large crosses them in each micro-batch.
    slow = replace(machine, between=1e9)
    calculator = Calculator(outline, BF16, 1, 4096, device_memory=machine.memory)
    best_slow = ranked(calculator, plans, slow)[0]
    assert best_slow.plan.pipeline > 1
    assert best_slow.time.total > best.time.total


def run(folder: Path, *arguments: str) -> Any:
    line = ["--model_name_or_path", str(folder), "--max_length", "64", *arguments]
    return CliRunner().invoke(command, line)


def test_the_users_own_numbers(config_of: Callable[..., Path]) -> None:
    """Twice the operations a second halve computing; half the speed doubles waiting, where latency is nothing."""

    def first(*more: str) -> list[float]:
        fixed = ["--devices", "16", "--tensor_parallel_degree", "4", "--sharding_parallel_degree", "1", "--top", "1"]
        result = run(config_of(), *fixed, "--sequence_parallel", "false", "--recompute", "false", "--latency", "1e-6",
                     "--pipeline_parallel_degree", "1", "--efficiency", "0.1", *more)  # fmt: skip
        assert result.exit_code == 0, result.output
        return [float(cell) for cell in result.output.splitlines()[3].split()[-7:-1]]

    plain = first()
    assert first("--device_tflops", "183.2")[0] == pytest.approx(first("--device_tflops", "91.6")[0] / 2, rel=0.01)
    assert first("--bandwidth", "1GB")[1] > 10 * plain[1]
    assert first("--node_bandwidth", "1MB")[1] > 10 * plain[1]
    assert first("--devices_per_node", "2", "--latency", "1000")[1] > 10 * plain[1]
    assert first("--device_latency", "1000")[1] > 10 * plain[1]
    assert first("--memory_bandwidth", "1GB")[3] > 10 * plain[3]
    assert first("--sharding", "stage1 offload", "--host_bandwidth", "1MB")[1] > 10 * plain[1]


def test_the_machines_own_numbers(
    config_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the user gives none; command and page say the speed of the run's precision."""
    monkeypatch.setitem(MACHINES, "8xL40S-48G", replace(MACHINES["8xL40S-48G"], efficiency=0.37))
    for precision, speed in (("false", "91.6 TFLOP/s (32 bits)"), ("true", "362 TFLOP/s (16 bits)")):
        page = tmp_path / f"{precision}.html"
        words = ["--devices", "1", "--machine", "8xL40S-48G", "--bf16", precision, "--html", str(page)]
        for efficiency, more in (("37%", []), ("25%", ["--efficiency", "0.25"])):
            result = run(config_of(), *words, *more)
            assert f"Taken of a device: {efficiency} of {speed}, 80% of 32 GB/s" in result.output
            assert f"of a device {efficiency} of {speed}, 80% of 32 GB/s" in page.read_text(encoding="utf-8")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_page_of_the_time(config_of: Callable[..., Path], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    arguments = ["--devices", "8", "--html", str(page), "--pipeline_parallel_degree", "2", "--rows_per_step", "64"]
    result = run(config_of(), *arguments)
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    pictures = [attributes for tag, attributes in tags.found if tag == "svg" and attributes.get("role") == "img"]
    assert len(pictures) == 3
    assert all("2 stages" in str(one["aria-label"]) for one in pictures)
    kinds = {attributes.get("class") for tag, attributes in tags.found if tag == "rect"}
    assert {"forward", "backward", "idle", "hidden", "waited", "step"} <= kinds
    assert not [attributes for _, attributes in tags.found if {"src", "href", "style", "onclick"} & attributes.keys()]
    assert re.search(r"backward of micro-batch 1: [\d.]+ [mµ]?s, from", text)
    assert run(config_of(), *arguments).exit_code == 0  # over its own page
    page.write_text("a letter")
    with pytest.raises(sft.UsageError, match="is there, and is no page of sft plan"):
        raise run(config_of(), *arguments).exception

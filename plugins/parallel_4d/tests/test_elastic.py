"""A run whose ranks are killed goes on with those that remain, and learns what one process learns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from processes import SUPPORT, run_ranks
from trainings import PLANS, Plan, Trainings, assert_equal

import sft
from sft.testing import needs, read_metrics
from sft_parallel_4d import elastic, plans
from sft_parallel_4d.deaths import Deaths
from sft_parallel_4d.elastic import run_elastic
from sft_parallel_4d.launch import LostError
from sft_parallel_4d.restarts import line_of

PLUGIN = """
import os, signal
from pathlib import Path
import sft

KILLS = {kills}  # (rank, step, in its checkpoint), each in one launch
FOLDER = Path({folder!r})


class Kills(sft.Plugin):
    name = "kills"
    api_version = 1

    def due(self, step, in_save):
        for number, kill in enumerate(KILLS):
            mine = [int(os.environ["PADDLE_TRAINER_ID"]), step, in_save] == list(kill)
            if mine and all((FOLDER / str(n)).exists() == (n < number) for n in range(len(KILLS))):
                (FOLDER / str(number)).touch()
                os.kill(os.getpid(), signal.SIGKILL)

    @sft.hookimpl
    def sft_run_started(self, run):
        self.step, own_file = run.step, run.strategy.own_file  # asked for in the midst of a checkpoint

        def asked(kind):
            self.due(self.step, True)
            return own_file(kind)

        run.strategy.own_file = asked

    @sft.hookimpl
    def sft_step_ended(self, run, record):
        self.step = record["step"]
        self.due(self.step, False)
"""
SAVES = {"save_strategy": "steps", "save_steps": 2}
LORA = pytest.param({"plugin": ["lora", "pissa"]}, marks=needs("lora", "pissa"))


def ran(
    trainings: Trainings, folder: Path, plan: Plan, kills: list[tuple[int, int, bool]], groups: bool, **settings: Any
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The output of ``sft run --nproc`` whose ranks are killed, on paddle's own gloo or on the ``groups`` of tests."""
    (folder / "kills.py").write_text(PLUGIN.format(kills=kills, folder=str(folder)), encoding="utf-8")
    values = trainings.settings(plan, **SAVES)
    values |= {"nproc": plan.processes, "max_restarts": 1, **settings}
    values["plugin"] = [*values.get("plugin", []), str(folder / "kills.py")]
    (folder / "settings.json").write_text(json.dumps(values))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PADDLE_", "CUDA_"))}
    path = [*([str(SUPPORT / "launched"), str(SUPPORT)] if groups else []), *sys.path]
    environment |= {"PADDLE_DISTRI_BACKEND": "gloo", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", "sft", "run", str(folder / "settings.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    return Path(values["output_dir"]), done


def events_of(output: Path) -> list[dict[str, Any]]:
    report = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert report["status"] == "finished"
    events: list[dict[str, Any]] = report["of_plugins"]["parallel-4d"]["restarts"]
    return events


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "kill", "from_step"),
    [
        ("dp2", (1, 3, False), 2),
        ("stage1", (0, 3, False), 2),
        ("dp2", (1, 4, True), 2),  # the checkpoint of step 4 is not there yet
        ("tp2", (0, 2, True), 0),  # nor is any
        ("pp2", (1, 1, False), 0),
    ],
)
@pytest.mark.parametrize("settings", [{}, LORA])
def test_one_goes_on_where_there_were_two(
    trainings: Trainings, tmp_path: Path, plan: str, kill: tuple[int, int, bool], from_step: int, settings: Any
) -> None:
    output, done = ran(trainings, tmp_path, PLANS[plan], [kill], groups=False, **settings)
    assert done.returncode == 0, done.stderr
    (event,) = events_of(output)
    assert (event["lost"], event["of"], event["from_step"], event["left_out"]) == ([kill[0]], 2, from_step, 0)
    assert event["new_plan"] == {**event["new_plan"], "data": 1, "sharding": 1, "tensor": 1, "pipeline": 1}
    assert done.stderr.count(line_of(event)) + done.stdout.count(line_of(event)) == 1
    assert line_of(event) in (output / "sft.log").read_text(encoding="utf-8")
    assert_equal(trainings.one(**SAVES, **settings), output)
    assert [line["step"] for line in read_metrics(output) if "loss" in line] == [1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "kills", "rows", "left"),
    [
        ("dp2-stage1", [(2, 3, False)], 2, [2]),  # 8 rows in twos: three data ranks cannot share them
        ("dp2-stage3", [(2, 3, False), (1, 4, True)], 1, [2, 1]),
        ("tp2-dp2", [(3, 2, True)], 2, [2]),
        ("tp2-pp2", [(0, 3, False)], 2, [3]),  # as stages of a pipeline
    ],
)
def test_fewer_go_on_where_there_were_four(
    trainings: Trainings, tmp_path: Path, plan: str, kills: list[tuple[int, int, bool]], rows: int, left: list[int]
) -> None:
    settings = {"per_device_train_batch_size": rows, "max_restarts": len(kills)}
    settings["gradient_accumulation_steps"] = 8 // (rows * PLANS[plan].data)
    output, done = ran(trainings, tmp_path, PLANS[plan], kills, groups=True, **settings)
    assert done.returncode == 0, done.stderr
    events = events_of(output)
    assert [event["lost"] for event in events] == [[kill[0]] for kill in kills]
    assert [plans.Plan(**event["new_plan"]).devices for event in events] == left
    assert_equal(trainings.one(**SAVES, per_device_train_batch_size=rows), output)


@pytest.mark.slow
def test_three_go_on_where_their_number_divides_the_rows(trainings: Trainings, tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    output, done = ran(trainings, tmp_path, PLANS["dp2-stage1"], [(3, 3, False)], groups=True, **settings)
    assert done.returncode == 0, done.stderr
    (event,) = events_of(output)
    new = plans.Plan(**event["new_plan"])
    assert (new.devices, new.data_world, new.accumulation, event["rows_per_step"]) == (3, 3, 4, 12)
    alone = trainings.settings(PLANS["one"], **SAVES, per_device_train_batch_size=1)
    run_ranks(1, "jobs:train", {**alone, "gradient_accumulation_steps": 12}, timeout=60)
    assert_equal(Path(alone["output_dir"]), output)


@pytest.mark.slow
def test_when_restarts_are_used_up_the_error_is_that_of_today(trainings: Trainings, tmp_path: Path) -> None:
    kills = [(1, 3, False), (0, 4, False)]
    output, done = ran(trainings, tmp_path, PLANS["dp2"], kills, groups=False)
    assert done.returncode == 1
    assert re.search(r"^sft: rank 0 was killed by signal 9", done.stderr, re.MULTILINE), done.stderr
    assert json.loads((output / "run.json").read_text(encoding="utf-8"))["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong", [{"dataset_name_or_path": "/no/such/data"}, {"learning_rate": 1e18, "max_grad_norm": 0}]
)
def test_what_a_rank_says_is_not_tried_again(trainings: Trainings, tmp_path: Path, wrong: dict[str, Any]) -> None:
    """Settings that it refuses, and a loss that is not finite."""
    _, done = ran(trainings, tmp_path, PLANS["dp2"], [], groups=False, **wrong)
    assert done.returncode in (1, 2)
    assert "Starting again" not in done.stdout + done.stderr


# --- without processes ---------------------------------------------------------------------------------------


class Launches:
    """Stands in for the launcher: ranks ``lost`` one launch after the other, and what each launch was given."""

    def __init__(self, *lost: tuple[int, ...], memory: int | None = None) -> None:
        self._lost, self._memory = list(lost), memory
        self.given: list[tuple[dict[str, Any], int, list[str]]] = []

    def __call__(self, values: dict[str, Any], nproc: int, say: Any, devices: Any, events: Any) -> int:
        self.given.append((dict(values), nproc, list(devices)))
        if self._lost:
            raise LostError("rank N was killed.", self._lost.pop(0), self._memory)
        return 0


@pytest.fixture
def elastic_run(base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Launches]:
    """Runs one of 8 rows a step on 4 processes, of which some are lost."""

    def go(launches: Launches, plan: plans.Plan, restarts: int = 1, **settings: Any) -> Launches:
        from sft.fine_tune import prepare_run

        values = {"model_name_or_path": str(base_model), "dataset_name_or_path": str(tmp_path), "max_length": 64}
        values |= {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2, "nproc": 4, **settings}
        monkeypatch.setattr(elastic, "launch", launches)
        run = prepare_run({**values, "max_restarts": restarts}, (), lambda text: None)
        run_elastic(run, plan, 4, restarts)
        return launches

    return go


def test_gpus_of_lost_ranks_are_left_alone(
    elastic_run: Callable[..., Launches], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    found = elastic_run(Launches((1, 2), memory=1 << 40), plans.Plan(data=4)).given
    assert [(nproc, devices) for _, nproc, devices in found] == [(4, []), (2, ["4", "7"])]
    assert found[1][0]["gradient_accumulation_steps"] == 2


def test_a_plan_that_does_not_fit_is_not_chosen(
    elastic_run: Callable[..., Launches], config_of: Callable[..., Path]
) -> None:
    """The model is divided where it is too large for a device as a whole; where nothing fits the run ends."""
    found, memory = list[tuple[Any, ...]](), 1 << 34
    large = {"model_name_or_path": str(config_of(hidden_size=2048, intermediate_size=8192)), "max_length": 16}
    while True:
        try:
            values = elastic_run(Launches((0,), memory=memory), plans.Plan(data=4), **large).given[1][0]
        except sft.SftError as error:
            assert "Of 3 processes that remain no plan fits into their memory" in str(error)  # noqa: PT017
            break
        found.append(tuple(values[f"{way}_parallel_degree"] for way in ("sharding", "tensor", "pipeline", "context")))
        memory = int(0.8 * memory)
    assert found[0] == (-1, 1, 1, 1)
    assert max(found[-1]) > 1


@pytest.mark.parametrize(("experts", "lost", "degrees"), [(1, (0, 1), (1,)), (4, (0, 1), (1, 2)), (4, (0, 1, 2), (1,))])
def test_a_mixture_goes_on_with_experts_that_its_ranks_can_share_out(
    elastic_run: Callable[..., Launches],
    config_of: Callable[..., Path],
    experts: int,
    lost: tuple[int, ...],
    degrees: tuple[int, ...],
) -> None:
    """Not as many as before, and nobody shares out what was not shared out, even where it fits alone."""
    mixture = str(config_of("mixtral", num_local_experts=4, hidden_size=256, intermediate_size=2048))
    settings = {"model_name_or_path": mixture, "max_length": 16, "expert_parallel_degree": experts}
    for memory in (1 << 40, 1 << 34):
        launches = elastic_run(Launches(lost, memory=memory), plans.Plan(data=4, experts=experts), **settings)
        assert launches.given[1][0]["expert_parallel_degree"] in degrees


def test_experts_that_were_not_shared_out_are_no_way_to_go_on() -> None:
    old, new = plans.Plan(data=4), plans.Plan(data=2, experts=2)
    assert not elastic._is_known(new, old)
    assert elastic._is_known(new, replace(old, experts=4))


@pytest.mark.parametrize(("left_out", "said"), [(1, "it"), (2, "them")])
def test_what_a_user_is_told_is_what_the_run_records(left_out: int, said: str) -> None:
    """Ranks are not left out because of rows: these may well divide by them."""
    plan, lists = asdict(plans.Plan()), {"same_to_the_bit": ["A", "B"], "the_same_to_1e-5": ["C"], "not_the_same": []}
    event = {"lost": [1], "of": 4, "at": "now", "from_step": 2, "old_plan": plan, "new_plan": plan, **lists}
    line = line_of({**event, "rows_per_step": 6, "left_out": left_out})
    assert f" ({left_out} left out: the plan has no use for {said}). To the bit: A, B. Nearly: C. Not: " in line
    assert "do not divide" not in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("imported", "unknown"), [("restarts, launch", "ranking elastic command"), ("elastic, advice", "command")]
)
def test_who_knows_the_planner(imported: str, unknown: str) -> None:
    """Not the ranks that go on; and who plans for them does not know the command."""
    code = f"import sys; from sft_parallel_4d import {imported}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {f"sft_parallel_4d.{name}" for name in unknown.split()} & set(done.stdout.split())


@pytest.mark.parametrize("restarts", [0, 1])
def test_no_more_restarts_than_asked_for(elastic_run: Callable[..., Launches], restarts: int) -> None:
    launches = Launches((1,), (1,))
    with pytest.raises(LostError, match=r"^rank N was killed\.$"):
        elastic_run(launches, plans.Plan(data=4), restarts, **({} if restarts else {"nproc": 4}))
    assert len(launches.given) == 1 + restarts


def test_where_a_run_goes_on(tmp_path: Path) -> None:
    """From its own checkpoints alone, and otherwise from where it was to begin."""
    fresh, named = {"overwrite_output_dir": True}, {"resume_from_checkpoint": "other/checkpoint-5"}
    assert elastic._resuming(fresh, tmp_path, begun=False) == fresh  # what lies there is another run's
    assert elastic._resuming(fresh, tmp_path, begun=True) == {"resume_from_checkpoint": "auto"}
    assert elastic._resuming(named, tmp_path, begun=True) == {**named, "overwrite_output_dir": True}
    (tmp_path / "checkpoint-7").mkdir()
    assert elastic._resuming(named, tmp_path, begun=True) == {"resume_from_checkpoint": "auto"}


def test_a_plan_is_asked_for_by_one_name() -> None:
    given = {"sharding_degree": 4, "sharding": "stage1", "lora_rank": 8, "plugin": "lora,pissa"}
    found = elastic._under(given, plans.Plan(data=2, accumulation=3))
    assert "sharding_degree" not in found
    assert (found["sharding"], found["sharding_parallel_degree"], found["lora_rank"]) == (None, -1, 8)
    assert found["plugin"] == ["lora", "pissa", "parallel-4d"]


def test_deaths(tmp_path: Path) -> None:
    """Of three ranks one was killed, one has said why it ends, and one runs; what comes after the launcher has begun to
    end them is its doing."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    for rank, process in enumerate((gone.pid, os.getpid(), gone.pid + 0)):
        (tmp_path / f"rank.{process}").write_text(str(rank))
    (tmp_path / f"rank.{gone.pid}").write_text("0")
    deaths = Deaths(tmp_path)
    (tmp_path / "rank0.error").write_text("{}")
    deaths.look()
    assert deaths.lost == ()
    (tmp_path / "rank0.error").unlink()
    (tmp_path / "launcher.log").write_text("Pod failed")
    deaths.look()
    assert deaths.lost == ()
    (tmp_path / "launcher.log").unlink()
    deaths.look()
    assert deaths.lost == (0,)


def test_a_crash_that_follows_a_kill_is_no_loss(tmp_path: Path) -> None:
    """The system still says of both what ended them."""
    killed, crashed = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    for rank, process in enumerate((crashed, killed)):
        (tmp_path / f"rank.{process.pid}").write_text(str(rank))
    killed.send_signal(9)
    crashed.send_signal(6)
    deaths = Deaths(tmp_path)
    while len(deaths._signals) < 2:
        deaths.look()
    assert deaths.lost == (1,)
    for process in (killed, crashed):
        process.wait()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"nproc": "some"}, "nproc: expected a number, or auto, got 'some'"),
        (
            {"nproc": 0, "plugin": ["parallel-4d"]},
            "nproc: expected a whole number of at least 1 and at most 1024, or auto, ",
        ),
        ({"nproc": 1, "max_restarts": 1, "plugin": ["parallel-4d"]}, "max_restarts is for runs whose processes nproc"),
    ],
)
def test_refusals(train: Callable[..., sft.Summary], values: dict[str, Any], reason: str) -> None:
    with pytest.raises(sft.UsageError, match=reason):
        train(**values)


@pytest.mark.slow
def test_auto_is_one_process_on_cpus(train: Callable[..., sft.Summary]) -> None:
    assert train(nproc="auto", max_restarts=1, max_steps=1, device="cpu").steps == 1

"""What ranks of one run have to do with each other, and with the one run directory."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from trainings import PLANS, Trainings, assert_equal

from sft.testing import needs


@pytest.mark.parametrize(
    ("plan", "settings"),
    [
        ("stage3", {}),
        ("tp2-stage2", {}),
        ("pp2-stage1", {}),
        pytest.param("tp2-dp2", {"plugin": ["lora", "neftune"], "lora_dropout": 0.2}, marks=needs("lora", "neftune")),
    ],
)
def test_copies_stay_equal(trainings: Trainings, plan: str, settings: dict[str, Any]) -> None:
    """Bit for bit: ranks that have the same parameter, or the same part of one, never drift apart."""
    _, results = trainings.many(PLANS[plan], **settings)
    copies: dict[str, list[str]] = defaultdict(list)
    for result in results:
        for name, digest in result.value["copies"].items():
            copies[name].append(digest)
    assert max(map(len, copies.values())) > 1
    assert {name for name, digests in copies.items() if len(set(digests)) > 1} == set()


@needs("lora")
@pytest.mark.parametrize("plan", ["tp2-sequence", "pp2", "stage3"])
def test_what_was_dropped_is_dropped_again(trainings: Trainings, plan: str) -> None:
    """Each rank draws dropout of its own, so no other plan learns the same; but recomputation draws nothing new."""
    dropout = {"plugin": ["lora"], "lora_dropout": 0.3}
    folders = [trainings.many(PLANS[plan], recompute=recompute, **dropout)[0] for recompute in (False, True)]
    assert_equal(*folders)


def test_tensor_ranks_draw_the_same_and_data_ranks_their_own(trainings: Trainings) -> None:
    _, results = trainings.many(PLANS["tp2-dp2"], job="jobs:draw", do_eval=False, evaluation_strategy="no")
    draws = defaultdict(list)
    for result in results:
        draws[result.value["data_rank"]].append(result.value["draws"])
    (first, its_twin), (second, another_twin) = draws[0], draws[1]
    assert first == its_twin
    assert second == another_twin
    assert not set(first) & set(second)


def test_stages_draw_their_own(trainings: Trainings) -> None:
    _, results = trainings.many(PLANS["pp2"], job="jobs:draw", do_eval=False, evaluation_strategy="no")
    first, second = (result.value["draws"] for result in results)
    assert len(first) == len(second) > 0
    assert not set(first) & set(second)


@pytest.mark.parametrize(
    ("plan", "draw"),
    [("tp2", {}), ("tp2-sequence", {"top_k": 0, "temperature": 2.0}), ("stage3", {})],
)
def test_answers(trainings: Trainings, plan: str, draw: dict[str, Any]) -> None:
    asked = {"num_samples": 3, "max_new_tokens": 8, **draw}
    one, (alone,) = trainings.many(PLANS["one"], **asked)
    output, results = trainings.many(PLANS[plan], **asked)
    assert [result.value["samples"] for result in results] == [alone.value["samples"]] * len(results)
    assert all(sample["after"] for sample in alone.value["samples"])
    reports = [json.loads((folder / "run.json").read_text())["result"]["samples"] for folder in (one, output)]
    assert reports[0] == reports[1] == alone.value["samples"]


@pytest.mark.parametrize(("plan", "plugins"), [("tp2-dp2", []), pytest.param("tp2-pp2", ["lora"], marks=needs("lora"))])
def test_one_rank_writes_and_speaks(trainings: Trainings, plan: str, plugins: list[str]) -> None:
    saving = {"plugin": plugins, "save_strategy": "steps", "save_steps": 3}
    one, (alone,) = trainings.many(PLANS["one"], **saving)
    output, (first, *others) = trainings.many(PLANS[plan], **saving)
    assert [len(result.value["said"]) for result in others] == [0] * len(others)
    assert len(first.value["said"]) == len(alone.value["said"])
    assert names(output) == names(one)
    assert report(output) == report(one)


def names(folder: Path) -> list[str]:
    """All files of a run but the optimizer's, of which each process writes its own."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if "optimizer" not in path)


def report(folder: Path) -> dict[str, Any]:
    """What ``run.json`` says, as far as it is the same for equal runs."""
    found = json.loads((folder / "run.json").read_text())
    vary = {"output_dir", "seconds", "peak_memory_mib", "padding_tokens"}  # rows are batched differently
    result = {name: value for name, value in found["result"].items() if name not in vary and "loss" not in name}
    return {"status": found["status"], **result}

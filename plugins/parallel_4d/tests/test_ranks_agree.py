"""What ranks of one run have to do with each other, and with the one run directory."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from processes import RankError, run_ranks
from safetensors.numpy import load_file
from trainings import PLANS, Plan, Trainings, assert_equal

from sft.testing import needs, read_metrics

pytestmark = pytest.mark.sweep  # as far as its tests are slow


@pytest.mark.parametrize(
    ("plan", "settings"),
    [
        pytest.param("stage3", {}, marks=pytest.mark.slow),
        pytest.param("tp2-stage2", {}, marks=pytest.mark.slow),
        pytest.param("pp2-stage1", {}, marks=pytest.mark.slow),
        pytest.param("cp2-dp2", {}, marks=pytest.mark.slow),
        pytest.param("cp2-dp2-stage1", {}, marks=pytest.mark.slow),
        pytest.param(
            "cp2-tp2",
            {"plugin": ["lora", "neftune"], "lora_dropout": 0.2},
            marks=[needs("lora", "neftune"), pytest.mark.slow],
        ),
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


@pytest.mark.parametrize("columns", [49_152, 256_000])
def test_the_loss_of_peaked_logits_in_two_parts(columns: int) -> None:
    """Against float64: e^17.375 in one part, and V - 1 times 1 beside it."""
    others = columns - 1
    expected = [math.log1p(others * math.exp(-17.375)), math.log(math.exp(17.375) + others)]
    expected.append(math.log(math.exp(8.6875) + others))
    for result in run_ranks(2, "group_jobs:peaked_loss", columns, timeout=60):
        assert result.value[:3] == pytest.approx(expected, abs=1e-6)
        assert result.value[3] == pytest.approx(sum(expected), rel=1e-6)


@needs("lora")
@pytest.mark.parametrize(
    "plan", ["tp2-sequence", *(pytest.param(p, marks=pytest.mark.slow) for p in ("pp2", "stage3", "cp2"))]
)
def test_what_was_dropped_is_dropped_again(trainings: Trainings, plan: str) -> None:
    """Each rank draws dropout of its own, so no other plan learns the same; but recomputation draws nothing new."""
    dropout = {"plugin": ["lora"], "lora_dropout": 0.3}
    folders = [trainings.many(PLANS[plan], recompute=recompute, **dropout)[0] for recompute in (False, True)]
    assert_equal(*folders)


DRAWN = {"top_k": 0, "temperature": 2.0}


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


@pytest.mark.parametrize("plan", ["dp2", *(pytest.param(p, marks=pytest.mark.slow) for p in ("stage2", "stage3"))])
@pytest.mark.parametrize("plugin", [[], pytest.param(["neftune"], marks=[needs("neftune"), pytest.mark.slow])])
def test_ranks_together_count_what_one_process_counts(
    trainings: Trainings, uneven_data: Path, plan: str, plugin: list[str]
) -> None:
    """Also where one has fewer micro-batches and goes through others in vain, and with noise on what is real."""
    settings = {"dataset_name_or_path": str(uneven_data), "num_train_epochs": 1, "max_steps": -1, "plugin": plugin}
    _, (alone,) = trainings.many(PLANS["one"], job="jobs:count", **settings)
    _, results = trainings.many(PLANS[plan], job="jobs:count", **settings)
    for key in ("batches", "rows", "tokens"):
        assert sum(result.value[key] for result in results) == alone.value[key] > 0, key
    assert len({result.value["batches"] for result in results}) == 2


@pytest.mark.parametrize(
    ("plan", "draw"),
    [
        pytest.param("tp2", {}, marks=pytest.mark.slow),
        ("tp2-sequence", DRAWN),
        *(pytest.param(plan, {}, marks=pytest.mark.slow) for plan in ("stage3", "pp2", "pp2-virtual-dp2")),
        *(pytest.param(p, DRAWN, marks=pytest.mark.slow) for p in ("pp2-virtual", "tp2-sequence-pp2-virtual", "pp4")),
        pytest.param("cp2", DRAWN, marks=pytest.mark.slow),
        pytest.param("cp2-pp2", {}, marks=pytest.mark.slow),
    ],
)
def test_answers(trainings: Trainings, plan: str, draw: dict[str, Any]) -> None:
    asked = {"num_samples": 3, "max_new_tokens": 8, **draw}
    one, (alone,) = trainings.many(PLANS["one"], **asked)
    output, results = trainings.many(PLANS[plan], **asked)
    assert [result.value["samples"] for result in results] == [alone.value["samples"]] * len(results)
    assert all(sample["after"] for sample in alone.value["samples"])
    reports = [json.loads((folder / "run.json").read_text())["result"]["samples"] for folder in (one, output)]
    assert reports[0] == reports[1] == alone.value["samples"]


@pytest.mark.parametrize(
    ("plan", "shares"),
    [
        ("dp2", 2),
        *(
            pytest.param(p, s, marks=pytest.mark.slow)
            for p, s in [("tp2", 1), ("tp2-dp2", 2), ("pp2-dp2", 2), ("cp2-dp2", 2), ("cp2-tp2-stage3", 1)]
        ),
    ],
)
def test_answers_at_evaluation_are_written_once(trainings: Trainings, plan: str, shares: int) -> None:
    """Each share of the questions in one file, by the first rank of those that answer it; scores are of all."""
    asked = {"eval_with_do_generation": True, "max_new_tokens": 8, "evaluation_strategy": "no"}
    one, _ = trainings.many(PLANS["one"], **asked)
    output, _ = trainings.many(PLANS[plan], **asked)
    expected = (one / "generations-5.jsonl").read_text().splitlines()
    suffixes = [f"-rank-{share}" for share in range(shares)] if shares > 1 else [""]
    assert len(list(output.glob("generations-5*"))) == shares
    for share, suffix in enumerate(suffixes):
        found = (output / f"generations-5{suffix}.jsonl").read_text().splitlines()
        assert found == expected[share::shares]
    kinds = ("bleu", "rouge")
    last, theirs = (
        {key: value for key, value in read_metrics(folder)[-1].items() if any(kind in key for kind in kinds)}
        for folder in (one, output)
    )
    assert any(last.values())
    assert theirs == pytest.approx(last, abs=1e-9)


@pytest.mark.parametrize(
    ("plan", "plugins"),
    [
        pytest.param("tp2-dp2", [], marks=pytest.mark.slow),
        pytest.param("pp2", ["lora"], marks=needs("lora")),
        pytest.param("tp2-pp2", ["lora"], marks=[needs("lora"), pytest.mark.slow]),
        pytest.param("cp2-dp2", ["lora"], marks=[needs("lora"), pytest.mark.slow]),
    ],
)
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


@pytest.mark.slow
def test_each_setting_divides_what_it_says(trainings: Trainings) -> None:
    def held(processes: int, data: int, **settings: Any) -> list[dict[str, Any]]:
        saves = {
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": 1,
            "do_eval": False,
            "evaluation_strategy": "no",
        }
        output, results = trainings.many(Plan(processes, data, settings), job="jobs:held", **saves)
        files = sorted((output / "checkpoint-1" / "trainer").glob("optimizer*"))
        return [{**r.value, "state": len(load_file(path))} for r, path in zip(results, files, strict=True)]

    (one,) = held(1, 1)
    up = next(name for name in one["shapes"] if name.endswith("layers.0.mlp.up_proj.weight"))
    hidden, inner = one["shapes"][up]
    assert [r["shapes"][up] for r in held(2, 1, tensor_parallel_degree=2)] == [[hidden, inner // 2]] * 2
    first, second = held(2, 1, pipeline_parallel_degree=2)
    assert up in first["shapes"]
    assert up not in second["shapes"]
    assert {*first["shapes"], *second["shapes"]} == set(one["shapes"])
    assert [r["state"] for r in held(2, 2)] == [one["state"], 0]  # a data rank's state is the other's
    # Slices of one buffer: each has some tensors, and of those that are cut both have a part.
    slices = sorted(r["state"] for r in held(2, 2, sharding="stage1"))
    assert slices[0] > 0
    assert one["state"] <= sum(slices) < 1.2 * one["state"]
    of_two = held(4, 4, sharding="stage1", sharding_parallel_degree=2)
    assert sorted(r["state"] for r in of_two) == [0, 0, *slices]
    lengths = [set(r["lengths"]) for r in held(2, 1, tensor_parallel_degree=2, sequence_parallel=True)]
    whole = {length + length % 2 for length in one["lengths"]}
    assert lengths == [{length // 2 for length in whole}] * 2
    sharing = held(2, 1, context_parallel_degree=2)
    assert [set(r["lengths"]) for r in sharing] == [{length // 2 for length in whole}] * 2
    assert [r["shapes"] for r in sharing] == [one["shapes"]] * 2
    assert sorted(r["state"] for r in held(2, 1, context_parallel_degree=2, sharding="stage1")) == slices


@pytest.mark.parametrize(
    "hook", ["sft_evaluated", *(pytest.param(h, marks=pytest.mark.slow) for h in ("sft_micro_batch", "sft_step_ended"))]
)
def test_a_rank_that_stands_still_is_named(trainings: Trainings, hook: str) -> None:
    """In evaluation the others wait for it when the model answers, in a step when gradients are added up."""
    asked = {"num_samples": 1, "max_new_tokens": 2, "parallel_timeout": 5.0}
    values = trainings.settings(PLANS["tp2"], **asked)
    with pytest.raises(RankError, match=r"rank 1 is missing: the others have waited 5 s in '"):
        run_ranks(2, "mishaps:stand_still", values, 1, hook, timeout=40)


@pytest.mark.parametrize("plan", ["tp2", pytest.param("pp2", marks=pytest.mark.slow)])
def test_a_value_that_is_not_finite_in_one_rank_ends_all(trainings: Trainings, plan: str) -> None:
    """The main rank, which writes, does not hold it, and knows its name. Nothing has been saved."""
    saving = {"save_strategy": "steps", "save_steps": 1, "do_eval": False, "evaluation_strategy": "no"}
    values = trainings.settings(PLANS[plan], **saving)
    name = "model.layers.3.mlp.up_proj.weight"
    with pytest.raises(RankError):
        run_ranks(2, "mishaps:train_and_ruin", values, 1, name, timeout=60)
    output = Path(values["output_dir"])
    found = json.loads((output / "run.json").read_text())
    assert found["status"] == "failed"
    assert found["error"].startswith(f"The weights are no longer finite after step 1 ({name} has values")
    files = {path.name for path in output.iterdir()} - {"report.html", "report.json"}
    assert files == {"metrics.jsonl", "rows.json", "run.json", "sft.log", "steps.bin"}


@pytest.mark.slow
@pytest.mark.parametrize("skips", [True, False])
def test_a_step_that_is_not_finite_in_one_rank_is_left_out_by_all(trainings: Trainings, skips: bool) -> None:
    """With the records of all ranks. The next one is not finite either, for no step comes between: too many."""
    saving = {"save_strategy": "steps", "save_steps": 1, "do_eval": False, "evaluation_strategy": "no"}
    saving["max_steps"] = 4
    skipping = {"skip_nan_grad": True, "max_skipped_in_a_row": 2} if skips else {}
    values = trainings.settings(PLANS["dp2"], **saving, **skipping)
    with pytest.raises(RankError):
        run_ranks(2, "mishaps:train_with_a_bad_step", values, 0, 2, timeout=60)
    output = Path(values["output_dir"])
    found = json.loads((output / "run.json").read_text())
    assert found["status"] == "failed"
    assert f"is no longer finite at step {3 if skips else 2} (" in found["error"]
    assert ("which is the last of 2 in a row" in found["error"]) == skips
    assert found["error"].count("train.json, line ") == (1 if skips else 8)  # step 3 has what is left of the data
    saved = sorted(path.name for path in output.glob("checkpoint-*"))
    assert saved == (["checkpoint-1", "checkpoint-2"] if skips else ["checkpoint-1"])


@pytest.mark.parametrize("plan", ["tp2", pytest.param("pp2", marks=pytest.mark.slow)])
def test_a_result_that_its_folder_cannot_take_is_whole_elsewhere(
    trainings: Trainings, tmp_path: Path, plan: str
) -> None:
    """All ranks collect it a second time, and the one that writes says where it is."""
    settings = {"do_eval": False, "evaluation_strategy": "no", "max_steps": 1}
    values = trainings.settings(PLANS[plan], **settings)
    with pytest.raises(RankError) as caught:
        run_ranks(2, "mishaps:train_on_full_disk", values, str(tmp_path), timeout=60)
    (place,) = tmp_path.iterdir()
    error = json.loads((Path(values["output_dir"]) / "run.json").read_text())["error"]
    assert "No space left on device" in error
    assert f"it is in {place} instead" in error
    assert f"it is in {place} instead" in caught.value.output
    found, whole = (load_file(folder / "model.safetensors") for folder in (place, trainings.one(**settings)))
    assert found.keys() == whole.keys()
    assert all(abs(found[name] - whole[name]).max() < 1e-4 for name in whole)


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        ("tp2", "main"),
        *(
            pytest.param(p, w, marks=pytest.mark.slow)
            for p, w in [
                ("stage1", "other"),
                ("dp2", "journal"),
                ("pp2", "journal"),
                ("stage3", "main"),
                ("dp2", "main"),
            ]
        ),
    ],
)
@pytest.mark.parametrize("plugin", [[], pytest.param(["lora"], marks=[needs("lora"), pytest.mark.slow])])
def test_a_disk_that_is_lost_in_training_does_not_cost_the_weights(
    trainings: Trainings, tmp_path: Path, plan: str, what: str, plugin: list[str]
) -> None:
    """Whichever rank cannot write: all of them put the result together elsewhere, once."""
    settings = {"do_eval": False, "evaluation_strategy": "no", "max_steps": 2, "logging_steps": 1, "plugin": plugin}
    saving = {} if what == "journal" else {"save_strategy": "steps", "save_steps": 2}
    values = trainings.settings(PLANS[plan], **settings, **saving)
    with pytest.raises(RankError) as caught:
        run_ranks(2, "mishaps:train_and_lose_the_disk", values, str(tmp_path), what, timeout=60)
    (place,) = tmp_path.iterdir()
    cause = {"journal": "File exists", "main": "No space left on device", "other": "another process"}
    assert re.search(rf"cannot go on after step 2 \({cause[what]}.*; it is in {place} instead", caught.value.output)
    file = "adapter_model.safetensors" if plugin else "model.safetensors"
    found, whole = (load_file(folder / file) for folder in (place, trainings.one(**settings)))
    assert found.keys() == whole.keys()
    assert all(abs(found[name] - whole[name]).max() < 1e-4 for name in whole)

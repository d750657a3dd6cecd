"""Data ranks that share out the experts of a mixture learn what one process learns, which has them all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FOLDER, SETTINGS, WITH_EXPERTS, case, folders
from resuming import checked
from safetensors.numpy import load_file, save_file
from trainings import ALL, OF_MIXTURES, Plan, Trainings, assert_equal, joined

from sft.testing import needs, read_metrics

pytestmark = pytest.mark.sweep  # as far as its tests are slow

LENGTHS = {"max_length": 60, "src_length": 32}
PACKED = {"plugin": ["greedy-zero-padding", "flashmask"]}
LORA = {"plugin": ["lora"], "lora_rank": 4}


@pytest.mark.parametrize(
    ("plan", "what", "cases"),
    [
        case("ep2", "full", ("qwen2-moe",)),
        case("ep2", "lora", WITH_EXPERTS, slow=True),
        *(case(plan, what, WITH_EXPERTS, slow=True) for plan in list(OF_MIXTURES)[1:] for what in ("full", "lora")),
        case("ep4", "dora", ("mixtral",), slow=True),
    ],
)  # fmt: skip
def test_plans_learn_what_one_process_learns(
    trainings: Trainings, tokenizer: Path, alone: Any, plan: str, what: str, cases: tuple[str, ...]
) -> None:  # fmt: skip
    settings = {**SETTINGS[what], "per_device_train_batch_size": 2}
    for one, other in zip(alone(cases, what), folders(trainings, tokenizer, plan, cases, settings), strict=True):
        assert_equal(one, other)


def of(tokenizer: Path, name: str = "mixtral") -> dict[str, Any]:
    return {"model_name_or_path": str(FOLDER / name), "tokenizer_name_or_path": str(tokenizer), **LENGTHS}


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=[pytest.mark.slow, needs(*case[-1].get("plugin", []))])


@pytest.mark.parametrize(
    ("plan", "settings"),
    [
        slow("ep2", {}),
        slow("ep2-dp2", {"recompute": True}),
        slow("ep2-pp2", {"recompute": True}),
        slow("ep2-dp2", joined(LORA, PACKED)),
        slow("ep2-stage3", joined(LORA, PACKED, {"recompute": True})),
        slow("ep4", {"per_device_train_batch_size": 1}),
        slow("ep2-tp2", {"plugin": ["lora", "pissa"]}),
        slow("ep4", {"plugin": ["lora", "pissa"]}),
        slow("ep2", {"plugin": ["lora", "int8"]}),
        slow("ep2-stage1", {"plugin": ["vera"]}),
        slow("cp2-ep2", joined(LORA, PACKED)),
        slow("cp2-ep2-dp2", PACKED),
        slow("cp2-ep2-stage3", joined(LORA, PACKED, {"recompute": True})),
        slow("cp2-ep2-tp2-sequence", {"recompute": True}),
        slow("cp2-ep4", {"plugin": ["lora", "pissa"]}),
        slow("ep4", {**LORA, "lora_target_modules": ["q_proj", "up_proj"], "modules_to_save": ["gate", "down_proj"]}),
    ],
)
def test_whole_runs(trainings: Trainings, tokenizer: Path, plan: str, settings: dict[str, Any]) -> None:
    """Of five steps, with evaluations; of the last step, one data rank has all rows."""
    values = {**of(tokenizer), **settings}
    assert_equal(trainings.one(**values), trainings.many(ALL[plan], **values)[0])


def rarely_chosen(folder: Path) -> Path:
    """A mixture of which each token chooses one expert, of the first two: the others' scores lie between theirs."""
    shutil.copytree(FOLDER / "mixtral", folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_experts_per_tok": 1}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name, rows in tensors.items():
        if name.endswith(".gate.weight"):
            tensors[name] = np.outer([1.0, -1.0, 0.1, 0.0], 100 * rows[0]).astype(rows.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "plan", ["dp2", *(pytest.param(p, marks=pytest.mark.slow) for p in ("ep2", "stage2", "tp2", "pp2", "ep2-dp2"))]
)
def test_an_expert_that_nobody_chooses_has_a_gradient_of_zeros(
    trainings: Trainings, tokenizer: Path, tmp_path: Path, plan: str
) -> None:
    """Under each plan, and so AdamW does no more than to let it decay (arXiv 1711.05101, algorithm 2)."""
    values = {**of(tokenizer), "model_name_or_path": str(rarely_chosen(tmp_path / "model"))}
    one, many = trainings.one(**values), trainings.many(ALL[plan], **values)[0]
    assert_equal(one, many)
    left = np.prod([1.0 - line["learning_rate"] * 0.1 for line in read_metrics(one) if "loss" in line])
    begun, ended = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", one))
    own = [name for name in begun if ".experts.3." in name]
    assert own
    for name in own:
        np.testing.assert_allclose(ended[name], begun[name] * left, rtol=1e-6, err_msg=name)


@pytest.mark.slow
@needs("lora")
@pytest.mark.parametrize("plan", ["ep2", "ep2-pp2", "ep2-stage3", "cp2-ep2-dp2"])
def test_experts_of_an_idle_rank_train(trainings: Trainings, tokenizer: Path, plan: str) -> None:
    """Dropout is that of the tokens of others, once more where blocks are computed again; nothing else trains there."""
    values = {**of(tokenizer), **LORA, "lora_dropout": 0.2, "do_eval": False, "evaluation_strategy": "no"}
    runs = [trainings.many(ALL[plan], job="jobs:modes", recompute=again, **values) for again in (False, True)]
    assert_equal(*(folder for folder, _ in runs))
    for _, results in runs:
        assert [result.value["experts"] for result in results] == [[True]] * len(results)
        assert [False, True] in [result.value["attention"] for result in results]  # some rank was idle
    plain, _ = trainings.many(ALL[plan], recompute=True, **{**values, "lora_dropout": 0.0})
    with pytest.raises(AssertionError, match="is apart from"):
        assert_equal(plain, runs[0][0])


@pytest.mark.parametrize(
    ("old", "new", "settings"),
    [
        slow("ep2", "one", {}),
        slow("one", "ep4", {}),
        slow("ep2-dp2", "tp2-stage1", {}),
        slow("ep2-stage1", "ep4", LORA),
        slow("ep2-tp2", "pp2", LORA),
        slow("cp2-ep2", "one", LORA),
        slow("cp2-ep4", "cp2-ep2-stage1", {}),
        slow("ep2-dp2", "cp4-ep2", {}),
    ],
)
def test_a_killed_run_goes_on_under_another_plan(
    trainings: Trainings, tokenizer: Path, old: str, new: str, settings: dict[str, Any]
) -> None:  # fmt: skip
    checked(trainings, old, new, **of(tokenizer), **settings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gradient", "weight"])
@pytest.mark.parametrize("plan", ["ep2", "ep2-dp2", "cp4-ep2"])
def test_damage_to_an_expert_on_one_rank_is_noticed(
    trainings: Trainings, tokenizer: Path, plan: str, kind: str
) -> None:  # fmt: skip
    values = {**of(tokenizer), "plugin": []}
    damage = f"{kind} layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(AssertionError, match="is apart from"):
        assert_equal(trainings.one(**values), trainings.many(ALL[plan], damage=damage, **values)[0])


@pytest.mark.slow
def test_each_process_has_its_experts(trainings: Trainings, tokenizer: Path) -> None:
    values = {**of(tokenizer), "max_steps": 1, "do_eval": False, "evaluation_strategy": "no"}
    _, results = trainings.many(Plan(4, 4, {"expert_parallel_degree": 2}), job="jobs:held", **values)
    up = "layers.0.mlp.experts.{}.up_proj.weight"
    for rank, result in enumerate(results):
        names = [name for name in result.value["shapes"] if ".layers.0.mlp.experts." in name and "up_proj" in name]
        first = 2 * (rank % 2)
        assert [name.partition("model.")[2] for name in names] == [up.format(first), up.format(first + 1)]


@pytest.mark.slow
def test_answers_are_those_of_one_process(trainings: Trainings, tokenizer: Path) -> None:
    values = {**of(tokenizer), "num_samples": 2, "max_new_tokens": 8, "max_steps": 1}
    found = [trainings.many(ALL[plan], **values)[1][0].value["samples"] for plan in ("one", "ep2", "cp2-ep2")]
    assert found[0]
    assert found[1:] == found[:1] * 2


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["cp2-ep2", "cp4-ep2"])
def test_answers_at_evaluation_are_those_of_one_process(trainings: Trainings, tokenizer: Path, plan: str) -> None:
    """Where there is one data rank: all processes write the same ones, and the first of them keeps them."""
    asked = {"eval_with_do_generation": True, "max_new_tokens": 8, "max_steps": 1, "evaluation_strategy": "no"}
    values = {**of(tokenizer), **asked}
    one, many = trainings.one(**values), trainings.many(ALL[plan], **values)[0]
    assert_equal(one, many)
    answers, theirs = ((folder / "generations-1.jsonl").read_text(encoding="utf-8") for folder in (one, many))
    assert any(json.loads(line)["answer"] for line in answers.splitlines())
    assert theirs == answers
    last, theirs_last = (read_metrics(folder)[-1] for folder in (one, many))
    scores = [key for key in last if "bleu" in key or "rouge" in key]
    assert scores
    assert [theirs_last[key] for key in scores] == [last[key] for key in scores]

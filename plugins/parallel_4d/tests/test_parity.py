"""Whole trainings on several processes learn what one process learns: losses, gradient norms, and what they save."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import RankError, run_ranks
from trainings import PLANS, Trainings, assert_equal, joined

from sft.testing import needs, read_metrics

pytestmark = pytest.mark.sweep  # as far as its tests are slow

FULL: dict[str, Any] = {}
LORA = {"plugin": ["lora"], "lora_rank": 4}
PACKED = {"plugin": ["greedy-zero-padding", "flashmask"]}
WHATS = {"full": FULL, "lora": LORA, "vera": {"plugin": ["vera"]}}
LAYOUTS = {"padded": {}, "packed": PACKED}


def marked(*case: Any, plugins: list[str], slow: bool = False) -> Any:
    return pytest.param(*case, marks=[needs(*plugins), *([pytest.mark.slow] if slow else [])])


def slow(*case: Any, plugins: Sequence[str] = ()) -> Any:
    return marked(*case, plugins=list(plugins), slow=True)


def crossed(plans: list[str], what: str, layout: str, slow: bool = False) -> list[Any]:
    plugins = joined(WHATS[what], LAYOUTS[layout])["plugin"]
    return [marked(plan, what, layout, plugins=plugins, slow=slow) for plan in plans]


def check(trainings: Trainings, plan: str, **settings: Any) -> None:
    one = trainings.one(**settings)
    assert_equal(one, trainings.many(PLANS[plan], **settings)[0])


@pytest.mark.parametrize(
    ("plan", "what", "layout"),
    [
        *crossed(["pp2-virtual"], "full", "padded"),  # and stage2, in test_several_buckets.py
        *crossed(
            [
                "stage2",
                "tp2-sequence",
                "dp2",
                "stage3",
                "stage1",
                "tp2",
                "tp2-pp2",
                "stage1-offload",
                "stage2-offload",
                "tp2-dp2",
                "tp2-stage1",
                "pp2",
                "pp2-dp2",
                "pp4",
                "pp2-offload",
                "tp2-offload",
                "dp2-stage1",
                "dp2-stage3",
                "tp2-stage3",
                "tp2-sequence-stage3",
            ],
            "full",
            "padded",
            slow=True,
        ),
        *crossed(["stage3", "tp2-sequence"], "lora", "packed"),
        *crossed(
            ["tp2-pp2", "dp2", "pp2", "stage1", "stage2", "tp2", "tp2-dp2", "tp2-stage1", "tp2-sequence-stage3"],
            "lora",
            "packed",
            slow=True,
        ),
        *crossed(["tp2-sequence", "pp2", "pp2-virtual"], "full", "packed", slow=True),
        *crossed(["pp2-virtual-dp2"], "full", "padded", slow=True),
        *crossed(["pp2-virtual", "tp2-sequence-pp2-virtual"], "lora", "packed", slow=True),
        *crossed(["stage3", "tp2"], "lora", "padded", slow=True),
    ],
)
def test_plans_learn_what_one_process_learns(trainings: Trainings, plan: str, what: str, layout: str) -> None:
    check(trainings, plan, **joined(WHATS[what], LAYOUTS[layout]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", [marked("full", plugins=[]), *(marked(what, plugins=[what]) for what in ("lora", "vera"))]
)
@pytest.mark.parametrize("layout", [marked("padded", plugins=[]), marked("packed", plugins=PACKED["plugin"])])
@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan != "one"])
def test_every_plan_recomputes_and_learns_the_same(trainings: Trainings, plan: str, what: str, layout: str) -> None:
    check(trainings, plan, recompute=True, **joined(WHATS[what], LAYOUTS[layout]))


@pytest.mark.parametrize("plan", [slow(plan, plugins=["lora"]) for plan in ("tp2-sequence", "pp2", "stage3")])
def test_a_base_of_16_bits_is_divided(trainings: Trainings, plan: str) -> None:
    """Sums of parts are rounded at other places than the whole sum, so it is not the same to the last digits."""
    settings = joined(LORA, {"bf16": True, "device": "cpu", "job": "jobs:train_in_16_bits"})
    found = [read_metrics(trainings.one(**settings)), read_metrics(trainings.many(PLANS[plan], **settings)[0])]
    losses = [[line["eval_loss"] for line in lines if "eval_loss" in line] for lines in found]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][-1] < losses[0][0] - 0.1


@pytest.mark.parametrize(
    "plan",
    ["dp2", *map(slow, ("stage2", "stage3", "dp2-stage3", "pp2-dp2", "pp2-virtual-dp2"))],
)
def test_ranks_may_have_different_numbers_of_micro_batches(trainings: Trainings, uneven_data: Path, plan: str) -> None:
    check(trainings, plan, dataset_name_or_path=str(uneven_data))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("plan", [slow("dp2"), slow("pp2-dp2"), slow("stage3")])
def test_several_sets_are_mixed_alike(
    trainings: Trainings, mixed_data: list[dict[str, Any]], plan: str, lazy: bool
) -> None:
    check(trainings, plan, dataset_name_or_path=mixed_data, lazy=lazy)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4, 8])
def test_stages_may_be_more_than_micro_batches(trainings: Trainings, rows: int) -> None:
    check(trainings, "pp4", per_device_train_batch_size=rows)


@pytest.mark.parametrize(
    ("model", "plan"),
    [
        slow("qwen2-untied", "tp2-sequence"),
        slow("mistral-gqa", "pp2"),
        slow("qwen2-untied", "tp2-pp2"),
        slow("mistral-gqa", "tp2-stage1"),
        slow("gemma-tied", "dp2"),
        slow("gemma-tied", "stage3"),
        slow("gemma-tied", "pp2"),
    ],
)
def test_families(trainings: Trainings, models: Path, model: str, plan: str) -> None:
    check(trainings, plan, model_name_or_path=str(models / model))


@pytest.mark.parametrize("plan", [slow("stage3"), "tp2-sequence", slow("tp2-pp2"), slow("tp2-stage3")])
def test_lm_head_of_its_own(trainings: Trainings, untied_model: Path, plan: str) -> None:
    check(trainings, plan, model_name_or_path=str(untied_model))


@pytest.mark.parametrize(
    ("plan", "settings"),
    [
        slow("stage3", FULL),
        slow("pp2", FULL),
        slow("tp2-sequence", FULL),
        slow("stage3", joined(LORA, PACKED), plugins=["lora", *PACKED["plugin"]]),
        slow("tp2-sequence-pp2", joined(LORA, PACKED), plugins=["lora", *PACKED["plugin"]]),
    ],
)
def test_recompute(trainings: Trainings, plan: str, settings: dict[str, Any]) -> None:
    check(trainings, plan, recompute=True, **settings)


def techniques() -> list[Any]:
    """The first plan of those that divide most is tried in every test run, the others in slow ones."""
    plans = {
        ("lora", "pissa", "rslora"): ["tp2", "stage3", "pp2"],
        # A norm over all inputs of a Linear.
        ("lora", "dora"): ["tp2", "tp2-sequence", "tp2-pp2", "stage3", "tp2-stage2", "tp2-stage3"],
        ("lora", "nf4"): ["stage3", "dp2", "pp2"],
    }
    only_slow = {
        ("vera",): ["tp2", "stage1", "tp2-sequence-pp2"],
        # Each stage and each data rank draws numbers of its own; noise is drawn where embeddings are.
        ("neftune",): ["tp2", "pp2"],
        ("lora", "lora-plus"): ["tp2-stage1"],
        ("lora", "int8"): ["pp2", "stage3"],
        ("neftune", "lora", *PACKED["plugin"]): ["tp2-pp2"],
        ("lora", "dora", "pissa"): ["tp2"],
        ("lora", "dora", "nf4"): ["stage3"],
    }
    return [
        marked(plan, list(names), plugins=list(names), slow=number > 0 or names in only_slow)
        for names, chosen in {**plans, **only_slow}.items()
        for number, plan in enumerate(chosen)
    ]


@pytest.mark.parametrize(("plan", "plugins"), techniques())
def test_techniques(trainings: Trainings, plan: str, plugins: list[str]) -> None:
    slower = {"learning_rate": 1e-3} if "lora-plus" in plugins else {}  # it steps B 16 times as far
    check(trainings, plan, plugin=plugins, **slower)


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize(
    "plan", [slow(plan, plugins=["lora"]) for plan in ("tp2-sequence", "pp2", "stage3", "tp2-pp2", "tp2-stage1")]
)
def test_layers_train_whole_beside_an_adapter(trainings: Trainings, untied_model: Path, plan: str, model: str) -> None:
    other = {"model_name_or_path": str(untied_model)} if model == "untied" else {}
    check(trainings, plan, **LORA, modules_to_save=["embed_tokens", "lm_head"], **other)


OUTER = {**LORA, "lora_target_modules": ["q_proj", "embed_tokens", "lm_head"]}
ROWS = {**LORA, "new_tokens": ["<tool>"], "trainable_token_indices": ["new", 5, 300]}


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("settings", [OUTER, ROWS], ids=["outer", "rows"])
@pytest.mark.parametrize(
    "plan", [slow(plan, plugins=["lora"]) for plan in ("tp2", "tp2-sequence", "tp2-stage1", "stage2")]
)
def test_updates_of_embedding_and_head_are_divided(
    trainings: Trainings, untied_model: Path, plan: str, settings: dict[str, Any], model: str
) -> None:
    other = {"model_name_or_path": str(untied_model)} if model == "untied" else {}
    check(trainings, plan, **settings, **other)


@pytest.mark.parametrize("settings", [OUTER, ROWS], ids=["outer", "rows"])
@pytest.mark.parametrize("plan", [slow(plan, plugins=["lora"]) for plan in ("pp2", "stage3")])
def test_updates_of_embedding_and_head_that_cannot_be_divided_are_refused(
    trainings: Trainings, plan: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(RankError, match="which pipeline parallelism and sharding stage3 do not divide"):
        trainings.many(PLANS[plan], **settings)


@pytest.mark.parametrize("kind", ["gradient", pytest.param("weight", marks=pytest.mark.slow)])
@pytest.mark.parametrize("plan", [slow("dp2"), slow("stage1"), "tp2", slow("pp2"), slow("pp2-virtual")])
def test_damage_on_one_rank_is_noticed(trainings: Trainings, plan: str, kind: str) -> None:
    one = trainings.one(plugin=[])
    damaged, _ = trainings.many(PLANS[plan], damage=kind, plugin=[])
    with pytest.raises(AssertionError, match="is apart from"):
        assert_equal(one, damaged)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["gradient", "shard embed_tokens.weight"])
@pytest.mark.parametrize("plan", ["stage3", "stage2-offload", "dp2-stage3"])
def test_damage_to_a_shard_is_noticed(trainings: Trainings, plan: str, damage: str) -> None:
    """Of what a rank keeps in pieces alone, or steps on the host: of the embedding every rank has some."""
    one = trainings.one(plugin=[])
    damaged, _ = trainings.many(PLANS[plan], damage=damage, plugin=[])
    with pytest.raises(AssertionError, match="is apart from"):
        assert_equal(one, damaged)


@pytest.mark.parametrize("plan", ["tp2", slow("pp2"), slow("stage3")])
def test_an_adapter_that_does_not_say_how_it_is_divided_is_refused(trainings: Trainings, plan: str) -> None:
    with pytest.raises(RankError, match="Scaled does not say how it is divided among processes"):
        trainings.many(PLANS[plan], job="jobs:train_strange")


@pytest.mark.parametrize("plan", [slow(plan) for plan in ("tp2", "tp2-sequence", "tp2-pp2", "stage3", "tp2-stage2")])
def test_an_adapter_that_needs_whole_dimensions_sums_over_their_parts(trainings: Trainings, plan: str) -> None:
    """Norms of both sides of a Linear with their gradients. (DoRA's, of one side, is among the techniques.)"""
    one, _ = trainings.many(PLANS["one"], job="jobs:train_normed")
    many, _ = trainings.many(PLANS[plan], job="jobs:train_normed")
    assert_equal(one, many)


@pytest.mark.parametrize(
    ("plan", "where"),
    [slow("tp2", "layers.3.mlp.down_proj"), ("tp2", "training"), slow("tp2", ""), slow("tp2-pp2", "")],
)
def test_an_adapter_that_forgets_to_sum_is_refused(trainings: Trainings, plan: str, where: str) -> None:
    """It would learn other numbers than on one process, as a norm of a part is not that of the whole; be it on one
    target, or in training alone."""
    values = trainings.settings(PLANS[plan])
    with pytest.raises(
        RankError, match=r"Scaled computes something else where processes share the (in|out)puts of its"
    ):
        run_ranks(PLANS[plan].processes, "jobs:train_unsummed", values, where, timeout=60)


@pytest.mark.slow
def test_that_adapter_learns_on_data_ranks(trainings: Trainings) -> None:
    assert_equal(*(trainings.many(PLANS[alone], job="jobs:train_unsummed")[0] for alone in ("one", "dp2")))


def test_an_adapter_that_cannot_be_tried_is_said(trainings: Trainings) -> None:
    """Once for each class and reason, and it trains; what can be tried says nothing."""
    one, _ = trainings.many(PLANS["one"], job="jobs:train_knowing")
    many, (main, other) = trainings.many(PLANS["tp2"], job="jobs:train_knowing")
    assert_equal(one, many)
    (line,) = (line for line in main.value["said"] if "Scaled" in line)
    assert "could not be tried (AttributeError: 'NoneType' object has no attribute 'input_ids')" in line
    assert other.value["said"] == []


@pytest.mark.parametrize(
    "plugins",
    [
        marked(names, plugins=names, slow=slow)
        for names, slow in ((["lora", "pissa"], True), (["lora", "dora", "pissa"], False), (["vera"], True))
    ],
)
def test_our_adapters_can_be_tried(trainings: Trainings, plugins: list[str]) -> None:
    dropout = {f"{plugins[0]}_dropout": 0.1}
    _, (main, _) = trainings.many(PLANS["tp2"], plugin=plugins, max_steps=1, do_eval=False, **dropout)
    assert not [line for line in main.value["said"] if "could not be tried" in line]


def test_it_learns_on_data_ranks_all_the_same(trainings: Trainings) -> None:
    one, _ = trainings.many(PLANS["one"], job="jobs:train_strange")
    two, _ = trainings.many(PLANS["stage1"], job="jobs:train_strange")
    assert_equal(one, two)

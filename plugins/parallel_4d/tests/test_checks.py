"""Plans that a run cannot have are refused by name, with those that it can, before anything heavy happens."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft
from sft.fine_tune import prepare_run
from sft.testing import needs
from sft_parallel_4d.checks import why_no_pieces
from sft_parallel_4d.options import ParallelOptions
from sft_parallel_4d.outline import Outline
from sft_parallel_4d.plans import Plan, legal_plans, settings_of
from sft_parallel_4d.plugin import Parallel4d

Planned = Callable[..., Plan]


@pytest.fixture
def planned(config_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """``planned(processes, model={}, **settings)``: the plan of a run that a launcher has started (None: none
    has)."""

    def plan(processes: int | None, model: dict[str, Any] | None = None, **settings: Any) -> Plan:
        monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
        if processes is not None:
            monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(processes))
        values = {"model_name_or_path": str(config_of(**(model or {}))), "dataset_name_or_path": str(tmp_path)}
        run = prepare_run({"output_dir": str(tmp_path / "out"), **values, **settings}, (), lambda text: None)
        (provider,) = run.hook.sft_parallel_strategy.get_hookimpls()
        assert isinstance(provider.plugin, Parallel4d)
        return provider.plugin.plan

    return plan


@pytest.mark.parametrize(
    ("processes", "settings", "degrees"),
    [
        (4, {}, (4, 1, 0, 1, 1)),
        (4, {"tensor_parallel_degree": -1, "pipeline_parallel_degree": -1}, (4, 1, 0, 1, 1)),
        (8, {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2}, (2, 1, 0, 2, 2)),
        (8, {"sharding": "stage3"}, (1, 8, 3, 1, 1)),
        (8, {"sharding": "stage2", "sharding_parallel_degree": 2}, (4, 2, 2, 1, 1)),
        (8, {"sharding": "stage1 offload", "pipeline_parallel_degree": 4}, (1, 2, 1, 1, 4)),
        (8, {"sharding": "stage2", "tensor_parallel_degree": 4}, (1, 2, 2, 4, 1)),
        (8, {"context_parallel_degree": 2}, (4, 1, 0, 1, 1, 2)),
        (4, {"sep_parallel_degree": 4, "sharding": "stage3"}, (1, 1, 3, 1, 1, 4)),
        (8, {"context_parallel_degree": 2, "sharding": "stage1", "tensor_parallel_degree": 2}, (1, 2, 1, 2, 1, 2)),
        (8, {"context_parallel_degree": 4, "pipeline_parallel_degree": 2}, (1, 1, 0, 1, 2, 4)),
    ],
)
def test_data_parallelism_takes_what_is_left(
    planned: Planned, processes: int, settings: dict[str, Any], degrees: tuple[int, ...]
) -> None:
    plan = planned(processes, **settings)
    has = (plan.data, plan.sharding, plan.stage, plan.tensor, plan.pipeline, plan.context)
    assert has == (*degrees, 1)[:6]
    assert plan.devices == processes


TENSOR, PIPELINE, EXPERTS = "tensor_parallel_degree", "pipeline_parallel_degree", "expert_parallel_degree"
VIRTUAL, CONTEXT = "virtual_pp_degree", "context_parallel_degree"
MIXTURE = {"model_type": "mixtral", "num_local_experts": 4}


@pytest.mark.parametrize(
    ("processes", "settings", "reason"),
    [
        (4, {TENSOR: 4}, "there is one data rank"),
        (1, {}, "there is one data rank"),
        (4, {"sharding_parallel_degree": 1}, "sharding_parallel_degree is 1"),
        (4, {EXPERTS: 4}, "all data ranks share out experts"),
        (4, {EXPERTS: 2, "sharding_parallel_degree": 1}, "sharding_parallel_degree is 1"),
    ],
)
def test_why_sharding_divides_nothing(planned: Planned, processes: int, settings: dict[str, Any], reason: str) -> None:
    plan = planned(processes, model=MIXTURE, sharding="stage1", **settings)
    assert plan.stage == 0
    assert why_no_pieces(plan, ParallelOptions(**settings)) == reason


@pytest.mark.parametrize("processes", [1, 4])
def test_the_settings_of_a_plan_ask_for_it(
    planned: Planned, outline_of: Callable[..., Outline], processes: int
) -> None:
    outline = outline_of("mixtral", num_local_experts=4)
    for plan in legal_plans(outline, processes, 8, 1)[:: 1 if processes == 1 else 13]:
        settings = {name: value for name, value in settings_of(plan).items() if value is not None}
        assert planned(processes, model=MIXTURE, plugin=["parallel-4d"], **settings) == plan


@pytest.mark.parametrize(
    ("processes", "model", "settings", "reason"),
    [
        (3, {}, {TENSOR: 3}, r"degree 3 does not divide attention heads \(8\)"),
        (
            4,
            {"num_key_value_heads": 3, "num_attention_heads": 12, "hidden_size": 96},
            {TENSOR: 4},
            r"neither divides key/value heads \(3\)",
        ),
        (8, {"model_type": "phi3"}, {TENSOR: 8}, "which lie in one matrix with queries and so"),
        (8, {"model_type": "olmo2"}, {TENSOR: 8}, "which are normed together and so"),
        (4, {"intermediate_size": 162}, {TENSOR: 4}, r"does not divide the intermediate size \(162\)"),
        (2, {"model_type": "qwen3_moe", "moe_intermediate_size": 33}, {TENSOR: 2}, r"size of experts \(33\)"),
        (8, {}, {PIPELINE: 8}, "8 pipeline stages are more than 4 layers"),
        (4, {}, {PIPELINE: 4, VIRTUAL: 2}, "4 pipeline stages of 2 parts each are more than 4 layers"),
        (4, {}, {TENSOR: 2, PIPELINE: 3}, "degree 2 x pipeline parallel degree 3 does not divide 4 processes"),
        (2, {}, {TENSOR: 4}, "does not divide 2 processes"),
        (4, {}, {PIPELINE: 2, "sharding": "stage2"}, "stage2 does not go with pipeline parallelism; stage1 does"),
        (4, {}, {PIPELINE: 2, "sharding": "stage3"}, "stage3 does not go with pipeline parallelism; stage1 does"),
        (3, {}, {CONTEXT: 3}, r"context parallel degree 3 does not divide attention heads \(8\)"),
        (8, {}, {CONTEXT: 4, TENSOR: 4}, "x context parallel degree 4 does not divide 8 processes"),
        (16, {}, {CONTEXT: 4, TENSOR: 4}, r"degree 4 does not divide attention heads \(2 on each tensor rank\)"),
    ],
)
def test_impossible_degrees_are_refused_with_possible_ones(
    planned: Planned, processes: int, model: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(sft.UsageError, match=reason) as refused:
        planned(processes, model, **settings)
    pattern = r"tensor (\d+) x pipeline (\d+)(?: x context (\d+))?"
    named = re.findall(pattern, str(refused.value).partition("degrees work")[2])
    assert f"on {processes} processes" in str(refused.value)
    assert (("1", "1", "") in named) != (VIRTUAL in settings)  # which one stage does not have
    assert (len({context for *_, context in named}) > 1) == (CONTEXT in settings and processes > 3)
    for tensor, pipeline, context in named:
        degrees = {TENSOR: int(tensor), PIPELINE: int(pipeline), CONTEXT: int(context or 1)}
        planned(processes, model, **{**settings, **degrees})


def test_where_parts_of_a_stage_leave_no_degrees_those_without_are_named(planned: Planned) -> None:
    reason = (
        "4 parts each are more than 4 layers; without virtual_pp_degree on 2 processes these degrees work: tensor 1 x "
    )
    with pytest.raises(sft.UsageError, match=reason):
        planned(2, **{PIPELINE: 2, VIRTUAL: 4})


@pytest.mark.parametrize(
    ("processes", "model", "settings", "reason"),
    [
        (
            1,
            MIXTURE,
            {},
            "expert parallel degree 2 needs 2 processes or a multiple of it, and there is 1: add --nproc 2",
        ),
        (4, {}, {}, "degree 2 has nothing to share out, as this model has no experts; give another"),
        (3, MIXTURE, {EXPERTS: 3}, r"degree 3 does not divide the experts of a block \(4\); give another"),
        (4, MIXTURE, {EXPERTS: 3}, r"does not divide the ranks that hold the same pieces \(4\); give one of 1, 2, 4"),
        (4, MIXTURE, {"sharding": "stage1", "sharding_parallel_degree": 4}, "With sharding_parallel_degree 2 it would"),
        (4, MIXTURE, {CONTEXT: 2, EXPERTS: 3}, r"does not divide the ranks that hold the same pieces \(4\); give one"),
        (2, MIXTURE, {CONTEXT: 2, "sharding": "stage1"}, r"hold the same pieces \(1\); give one of 1, or leave it out"),
        (4, MIXTURE, {CONTEXT: 2, "sharding": "stage1", "sharding_parallel_degree": 2}, "which are 1 of the 2 data"),
        (
            2,
            MIXTURE,
            {"eval_with_do_generation": True},
            "eval_with_do_generation does not go with expert_parallel_degree where .*: each token needs the experts of",
        ),
        (4, MIXTURE, {CONTEXT: 2, "eval_with_do_generation": True}, "does not go with expert_parallel_degree where"),
    ],
)
def test_impossible_numbers_of_ranks_for_experts_are_refused(
    planned: Planned, processes: int, model: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(sft.UsageError, match=reason):
        planned(processes, model, **{EXPERTS: 2, **settings})


@pytest.mark.parametrize(
    ("settings", "degrees"),
    [
        ({}, (8, 1, 0, 4)),
        ({"sharding": "stage2"}, (4, 2, 2, 4)),
        ({"sharding": "stage1", TENSOR: 2}, (4, 1, 0, 4)),
        ({CONTEXT: 8}, (1, 1, 0, 4)),  # where there are no pieces, those that share rows may
        ({CONTEXT: 2, "sharding": "stage3"}, (4, 1, 3, 4)),
        ({CONTEXT: 2, "sharding": "stage1", EXPERTS: 2}, (2, 2, 1, 2)),
    ],
)
def test_ranks_that_share_out_experts_share_no_pieces(
    planned: Planned, settings: dict[str, Any], degrees: tuple[int, ...]
) -> None:
    plan = planned(8, MIXTURE, **{EXPERTS: 4, **settings})
    assert (plan.data, plan.sharding, plan.stage, plan.experts) == degrees


@pytest.mark.parametrize(
    ("processes", "settings", "reason"),
    [
        (1, {TENSOR: 2, PIPELINE: 2}, "needs 4 processes or a multiple of it, and there is 1: add --nproc 4"),
        (4, {"sharding": "stage1", "sharding_parallel_degree": 3}, r"3 does not .* \(4\); give one of 1, 2, 4"),
        (4, {"sharding_parallel_degree": 2}, "sharding_parallel_degree is set and sharding is not"),
        (4, {"sharding": "stage4"}, "sharding: expected one of stage1, stage2, stage3, got 'stage4'"),
        (4, {"sharding": "offload"}, "sharding: expected one of stage1, stage2, stage3, got 'offload'"),
        (4, {"sharding": "stage1 stage2"}, "sharding: expected stage1, stage2 or stage3, and offload beside it"),
        (4, {"sharding": "stage1 overlap"}, "sharding: expected stage1, stage2 or stage3, and offload beside it"),
        (2, {"sequence_parallel": True}, "sequence_parallel needs tensor parallelism"),
        (2, {VIRTUAL: 2}, "virtual_pp_degree needs pipeline parallelism; set pipeline_parallel_degree"),
        (
            2,
            {"sharding": "stage3", "eval_with_do_generation": True},
            "does not go with sharding stage3 where several data ranks .*: each token needs the pieces of weights of",
        ),
        (1, {CONTEXT: 4, TENSOR: 2}, "degree 1 x context parallel degree 4 needs 8 processes or a multiple of it"),
        (
            4,
            {CONTEXT: 2, "sharding": "stage1", "sharding_parallel_degree": 4},
            r"the data processes \(2\); give one of",
        ),
        pytest.param(
            2, {CONTEXT: 2, "plugin": ["dpo"]}, "Plugin dpo minimises something for .* whole", marks=needs("dpo")
        ),
        (2, {"sharding_comm_buffer_size_MB": 0}, "expected a number of MiB, or -1 for 128, got 0"),
        pytest.param(
            2, {PIPELINE: 2, "plugin": ["dpo"]}, "Plugin dpo minimises something for .* all layers", marks=needs("dpo")
        ),
        (2, {"device": "gpu:1"}, "device gpu:1 is one device, and 2 processes have one each"),
    ],
)
def test_what_does_not_go_together_is_refused(
    planned: Planned, processes: int, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(sft.UsageError, match=reason):
        planned(processes, **settings)


@pytest.mark.parametrize(
    ("settings", "has"),
    [
        ({CONTEXT: 2, EXPERTS: 2}, {"context": 2, "experts": 2}),
        ({CONTEXT: 2, "sharding": "stage3"}, {"context": 2, "stage": 3}),
        ({TENSOR: 2, "sharding": "stage3 offload"}, {"tensor": 2, "stage": 3}),
    ],
)
def test_one_data_rank_may_write_answers_whatever_is_divided(
    planned: Planned, settings: dict[str, Any], has: dict[str, int]
) -> None:
    """All its processes write the same ones, token by token."""
    plan = planned(2, MIXTURE, eval_with_do_generation=True, **settings)
    assert {name: getattr(plan, name) for name in has} == has
    assert plan.data_world == 1


@pytest.mark.parametrize("name", [VIRTUAL, "virtual_pipeline_degree"])
def test_parts_of_stages_ask_for_the_plugin(planned: Planned, name: str) -> None:
    with pytest.raises(sft.UsageError, match="virtual_pp_degree needs pipeline parallelism"):
        planned(1, plugin=[], **{name: 2})


def test_processes_that_are_yet_to_be_started_count(planned: Planned) -> None:
    with pytest.raises(sft.UsageError, match=r"degree 2 x pipeline parallel degree 1 does not divide 3 processes"):
        planned(None, nproc=3, **{TENSOR: 2})
    assert planned(None, nproc=4, **{TENSOR: 2}).devices == 4


def test_nothing_is_written(planned: Planned, tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError):
        planned(4, **{TENSOR: 3})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_launcher_and_nproc_must_agree(planned: Planned) -> None:
    with pytest.raises(sft.UsageError, match="nproc is 4, and a launcher has started 2 of this program"):
        planned(2, nproc=4)
    assert planned(2, nproc=2).devices == 2


@pytest.mark.parametrize("name", [TENSOR, PIPELINE, CONTEXT])
def test_no_processes_are_not_a_degree(planned: Planned, name: str) -> None:
    with pytest.raises(sft.UsageError, match=f"{name}: expected a number of processes, or -1 for one, got 0"):
        planned(2, **{name: 0})


def test_a_class_cannot_follow_into_processes(config_of: Callable[..., Path], tmp_path: Path) -> None:
    class Mine(sft.Plugin):
        name = "mine"
        api_version = 1

    data = tmp_path / "train.json"
    data.write_text('{"src": "a", "tgt": "b"}')
    values = {"model_name_or_path": str(config_of()), "dataset_name_or_path": str(data), "nproc": 2}
    with pytest.raises(sft.UsageError, match="Plugin mine was given as a class"):
        sft.run({**values, "output_dir": str(tmp_path / "out")}, plugins=[Mine], say=lambda text: None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nproc": 0}, "nproc: expected a whole number of at least 1 and at most 1024, or auto, got 0"),
        ({"nproc": "0"}, "nproc: expected a whole number of at least 1 and at most 1024, or auto, got '0'"),
        ({"nproc": -1}, "nproc: expected a whole number of at least 1 and at most 1024, or auto, got -1"),
    ],
)
def test_no_processes_are_refused_whoever_asks_for_the_plugin(
    config_of: Callable[..., Path], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    """A number that is none does not count as not given."""
    values = {"model_name_or_path": str(config_of()), "dataset_name_or_path": str(tmp_path)}
    with pytest.raises(sft.UsageError, match=message):
        sft.run({**values, "output_dir": str(tmp_path / "out"), **settings}, say=lambda text: None)


@pytest.mark.parametrize(
    "settings", [{"nproc": 1, TENSOR: 1, PIPELINE: -1, "sharding_degree": "-1", CONTEXT: -1}, {"nproc": None}]
)
def test_numbers_that_divide_nothing_ask_for_nothing(settings: dict[str, Any]) -> None:
    """As PaddleNLP's files give them."""
    from sft.resolve import resolve

    assert "parallel-4d" not in resolve(settings, ())[1].names


def test_a_model_of_the_hub_is_looked_at_when_the_checks_are_done(
    config_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``sft_check`` is instant: it waits for no download, and refuses what the settings alone say."""
    asked: list[str] = []
    folder = config_of()

    def download(name: str, **options: Any) -> str:
        asked.append(name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "3")
    values = {"model_name_or_path": "owner/model", "dataset_name_or_path": str(tmp_path), "plugin": ["parallel-4d"]}
    values = {**values, "output_dir": str(tmp_path / "out")}
    with pytest.raises(sft.UsageError, match="sequence_parallel needs tensor parallelism"):
        prepare_run({**values, "sequence_parallel": True}, (), print)
    prepare_run({**values, "tensor_parallel_degree": 2}, (), print)
    assert not asked
    with pytest.raises(
        sft.UsageError, match=r"tensor parallel degree 2 .* does not divide 3 processes; on 3 processes"
    ):
        sft.run({**values, "tensor_parallel_degree": 2}, say=lambda text: None)
    assert asked == ["owner/model"]


@needs("muon", "lion")
def test_an_optimizer_of_whole_parameters_is_refused_before_weights_are_read(planned: Planned) -> None:
    for processes, settings in ((2, {"sharding": "stage1"}), (2, {TENSOR: 2}), (1, {"sharding": "stage1 offload"})):
        with pytest.raises(
            sft.UsageError, match="The optimizer of plugin muon steps a parameter as a whole, and shard"
        ):
            planned(processes, optim="muon", **settings)
        assert planned(processes, optim="lion", **settings) is not None
    assert planned(4, optim="muon", **{PIPELINE: 2}).data == 2
    assert planned(2, optim="muon", **{CONTEXT: 2}).context == 2
    with pytest.raises(sft.UsageError, match="The optimizer of plugin muon steps a parameter as a whole, and shard"):
        planned(2, optim="muon", sharding="stage1", **{CONTEXT: 2})  # pieces of those that share rows

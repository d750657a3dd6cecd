"""`sft plan`: what it says, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import sft
from sft.testing import needs
from sft_parallel_4d.command import command
from sft_parallel_4d.outline import Outline
from sft_parallel_4d.paper import outline as on_paper
from sft_parallel_4d.plans import Wanted, legal_plans

MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def run(folder: Path, *arguments: str) -> Any:
    line = ["--model_name_or_path", str(folder), "--device_memory", "1GiB", "--max_length", "64", *arguments]
    return CliRunner().invoke(command, line)


def test_the_command(config_of: Callable[..., Path]) -> None:
    result = run(config_of(), "--devices", "4", "--learning_rate", "1e-3", "--top", "3")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("238,144 parameters, 238,144 train; a step of 32 rows of 64 tokens, 8 a micro-batch")
    assert lines[2].split()[:5] == ["data", "sharding", "context", "tensor", "pipeline"]
    assert [line.split()[-1] for line in lines[3:6]] == ["yes"] * 3
    assert lines[6].startswith("GiB of the fullest rank")


def test_json_holds_all_plans_in_order(config_of: Callable[..., Path]) -> None:
    result = run(config_of(), "--devices", "4", "--json", "--recompute", "true", "--sharding", "stage2")
    found = [json.loads(line) for line in result.output.splitlines()]
    assert [one["seconds"] for one in found] == sorted(one["seconds"] for one in found)
    assert {one["plan"]["stage"] for one in found} == {2}
    assert all(one["plan"]["recompute"] for one in found)


@pytest.mark.parametrize(
    ("settings", "plans"),
    [
        ({"tensor_parallel_degree": 2, "pipeline_parallel_degree": 1}, {(2, 1, 0), (2, 1, 1), (2, 1, 2), (2, 1, 3)}),
        ({"context_parallel_degree": 4}, {(1, 1, 0), (1, 1, 1), (1, 1, 2), (1, 1, 3)}),
        ({"tensor_parallel_degree": 1, "sharding": "stage3"}, {(1, 1, 3)}),
        ({"sharding_degree": 4}, {(1, 1, 1), (1, 1, 2), (1, 1, 3)}),
        ({"sharding_parallel_degree": -1, "tensor_parallel_degree": -1, "sharding": "stage2"}, {(1, 1, 2), (2, 1, 2)}),
        ({"sharding": "stage1 offload", "pipeline_parallel_degree": 4}, {(1, 4, 1)}),
        ({"sequence_parallel": True, "tensor_parallel_degree": 4}, {(4, 1, 0)}),
        ({"virtual_pipeline_degree": 2}, {(1, 2, 0), (1, 2, 1), (2, 2, 0)}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_typed_or_in_a_file_leave_the_same_plans(
    config_of: Callable[..., Path], tmp_path: Path, settings: dict[str, Any], plans: set[tuple[int, int, int]]
) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    typed = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    from_file = run(config_of(), str(tmp_path / "settings.json"), "--devices", "4", "--json")
    as_typed = run(config_of(), *typed, "--devices", "4", "--json")
    assert from_file.output == as_typed.output
    found = [json.loads(line)["plan"] for line in from_file.output.splitlines()]
    assert {(plan["tensor"], plan["pipeline"], plan["stage"]) for plan in found} == plans
    assert {plan["offload"] for plan in found} == {"offload" in settings.get("sharding", "")}
    assert {plan["virtual"] for plan in found} == {settings.get("virtual_pipeline_degree", 1)}


def test_short_rows_are_shared_where_that_is_asked_for(config_of: Callable[..., Path]) -> None:
    def degrees(*settings: str) -> set[int]:
        result = run(config_of(max_position_embeddings=4096), "--devices", "8", "--json", *settings)
        return {json.loads(line)["plan"]["context"] for line in result.output.splitlines()}

    assert degrees() == degrees("--max_length", "2047") == {1}
    assert degrees("--max_length", "4096") == {1, 2, 4}
    assert degrees("--context_parallel_degree", "8") == {8}


def test_a_cpu_has_its_own_chunks_of_logits(config_of: Callable[..., Path]) -> None:
    def logits(device: str) -> int:
        line = ["--devices", "1", "--device_memory", "80GiB", "--per_device_train_batch_size", "64", "--json"]
        found = run(config_of(vocab_size=32_000), *line, "--device", device).output.splitlines()
        return int(json.loads(found[0])["memory"]["logits"])

    chunk, head = 24 << 20, 4 * 64 * 32_000  # as the core's loss has it; gradients of lm_head beside its four stages
    assert 4 * chunk * 0.99 <= logits("cpu") <= 4 * chunk + 2 * head
    assert logits("gpu") > logits("cpu")


def test_a_memory_without_a_unit_is_asked_about(config_of: Callable[..., Path]) -> None:
    result = run(config_of(), "--devices", "1", "--device_memory", "24")
    assert str(result.exception) == "A device of 24 bytes holds no model; give a unit, such as 24GiB."


def test_nothing_fits(config_of: Callable[..., Path]) -> None:
    result = run(config_of(num_hidden_layers=400), "--devices", "2", "--device_memory", "20MiB")
    assert "0 fit; the smallest first" in result.output
    table = result.output.partition("GiB of the fullest rank")[0]
    assert {line.split()[-1] for line in table.splitlines()[3:]} == {"-"}


@pytest.mark.slow
def test_thousands_of_devices(config_of: Callable[..., Path]) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    folder = config_of(**sizes, num_key_value_heads=8, vocab_size=128256)
    result = run(folder, "--devices", "8192", "--device_memory", "80GiB", "--bf16", "--fp16_opt_level", "O2")
    assert result.exit_code == 0, result.output
    assert "70,553,706,496 parameters" in result.output  # Meta's Llama 3 70B has as many


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--max_length", "4096"], "the model reads 512 tokens"),
        (["--lerning_rate", "1"], "did you mean learning_rate"),
        (["--rows_per_step", "3"], "3 rows a step are not whole micro-batches"),
        pytest.param(["--plugin", "nf4"], "add an adapter", marks=needs("nf4")),
        (["--rows_per_step", "3"], "another rows_per_step, a smaller per_device_train_batch_size, or fewer or other"),
        (["--context_parallel_degree", "0"], "context_parallel_degree: expected a number of processes, or -1 for one"),
        (["--eval_with_do_generation", "true", "--sharding", "stage3"], "does not go with sharding stage3"),
        (["--device", "gpu:1"], "device gpu:1 is one device, and 2 processes have one each"),
        (["--sharding", "stage4"], "expected one of stage1, stage2, stage3"),
        (["--sharding", "stage1 stage2"], "expected stage1, stage2 or stage3"),
    ],
)
def test_refusals(config_of: Callable[..., Path], arguments: list[str], reason: str) -> None:
    result = run(config_of(), "--devices", "2", *arguments)
    assert isinstance(result.exception, sft.UsageError)
    assert reason in str(result.exception)


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0"])
@pytest.mark.parametrize("option", ["--efficiency", "--device_tflops", "--latency"])
def test_speeds_are_finite_numbers_above_zero(config_of: Callable[..., Path], option: str, value: str) -> None:
    result = run(config_of(), "--devices", "1", option, value)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output


@pytest.mark.parametrize(
    ("family", "settings", "left"),
    [
        pytest.param("llama", {"plugin": "dpo"}, (False, False, False), marks=needs("dpo")),
        pytest.param("llama", {"plugin": "dpo,lora"}, (False, False, True), marks=needs("dpo", "lora")),
        pytest.param(
            "llama", {"plugin": "lora", "lora_target_modules": "q_proj"}, (True, True, True), marks=needs("lora")
        ),
        pytest.param(
            "llama",
            {"plugin": "lora", "lora_target_modules": "q_proj,embed_tokens"},
            (True, False, False),
            marks=needs("lora"),
        ),
        pytest.param(
            "llama", {"plugin": "lora", "trainable_token_indices": "3"}, (True, False, False), marks=needs("lora")
        ),
        ("mixtral", {"eval_with_do_generation": "true"}, (True, True, True)),  # where there is one data rank
        ("mixtral", {}, (True, True, True)),
    ],
)
def test_what_a_run_refuses_is_not_offered(
    config_of: Callable[..., Path], family: str, settings: dict[str, str], left: tuple[bool, bool, bool]
) -> None:
    """Whether plans with context, with pipelines and with stage 3 are left."""
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    folder = config_of(family, max_position_embeddings=2048, **(MIXTURE if family == "mixtral" else {}))
    result = run(folder, "--devices", "4", "--json", "--max_length", "2048", *words)
    assert result.exit_code == 0, result.exception
    plans = [json.loads(line)["plan"] for line in result.output.splitlines() if line.startswith("{")]
    found = [
        any(plan[name] >= least for plan in plans) for name, least in (("context", 2), ("pipeline", 2), ("stage", 3))
    ]
    assert tuple(found) == left
    assert any(plan["experts"] > 1 for plan in plans) == (family == "mixtral")
    if "eval_with_do_generation" in settings:
        needing_all = [plan for plan in plans if plan["experts"] > 1 or plan["stage"] == 3]
        assert {plan["data"] * plan["sharding"] for plan in needing_all} == {1}


def test_an_adapter_that_does_not_say_what_it_adds_is_refused(config_of: Callable[..., Path]) -> None:
    class Secret(sft.Plugin):
        name = "secret"
        api_version = 1

        @sft.hookimpl
        def sft_export_adapter(self, run: sft.Run, model: Any) -> sft.AdapterFiles: ...  # type: ignore[empty-body]

    with pytest.raises(sft.UsageError, match=r"Plugin secret .* does not say on paper .*it lacks parallel_outline"):
        on_paper({"model_name_or_path": str(config_of())}, plugins=[Secret])


def test_one_that_may_freeze_something_and_does_not_say_so_is_named(config_of: Callable[..., Path]) -> None:
    class Silent(sft.Plugin):
        name = "silent"
        api_version = 1

        @sft.hookimpl
        def sft_adapt_model(self, run: sft.Run, model: Any) -> None: ...

    values = {"model_name_or_path": str(config_of())}
    silent, plain = on_paper(values, plugins=[Silent]), on_paper(values)
    assert silent.outline == plain.outline
    assert plain.notes == ()
    (note,) = silent.notes
    assert note.startswith("note: silent may change the model (sft_adapt_model) and does not say on paper how")


def test_another_optimizer_than_that_of_the_formulas_is_named(config_of: Callable[..., Path]) -> None:
    class Steps(sft.Plugin):
        name = "steps"
        api_version = 1

        @sft.hookimpl
        def sft_optimizer(self, run: sft.Run, groups: list[sft.ParameterGroup]) -> Any: ...

    (note,) = on_paper({"model_name_or_path": str(config_of())}, plugins=[Steps]).notes
    assert note.startswith("note: the figures have the state that AdamW keeps; that of plugin steps keeps another")


def test_an_optimizer_of_whole_parameters_leaves_the_plans_that_divide_none(config_of: Callable[..., Path]) -> None:
    class Steps(sft.Plugin):
        name = "steps"
        api_version = 1

        @sft.hookimpl
        def sft_optimizer(self, run: sft.Run, groups: list[sft.ParameterGroup]) -> Any: ...

        @sft.hookimpl
        def parallel_outline(self, outline: Outline) -> None:
            outline.steps(lambda shape, where: 1, wholes=True)

    paper = on_paper({"model_name_or_path": str(config_of())}, plugins=[Steps])
    assert paper.notes == ()
    plans = legal_plans(paper.outline, 4, 8, 1)
    assert {(plan.tensor, plan.stage) for plan in plans} == {(1, 0)}
    assert {plan.pipeline for plan in plans} == {1, 2, 4}
    with pytest.raises(sft.UsageError, match="steps whole parameters, which sharding would divide"):
        legal_plans(paper.outline, 4, 8, 1, Wanted(stage=1))
    with pytest.raises(sft.UsageError, match="steps whole parameters, which tensor parallelism would divide"):
        legal_plans(paper.outline, 4, 8, 1, Wanted(tensor=2))


class Scaled(sft.Plugin):
    """Adds a tensor to each Linear, and does not say how it is divided."""

    name = "scaled"
    api_version = 1
    sides: tuple[str | None, ...] = ()

    @sft.hookimpl
    def parallel_outline(self, outline: Outline) -> None:
        for linear in outline.targets():
            linear.add("scale", (linear.out_features,), self.sides, bits=None)


class Divided(Scaled):
    name = "divided"
    sides = ("out",)


def test_a_layer_that_does_not_say_how_it_is_divided_is_not_planned_to_be(config_of: Callable[..., Path]) -> None:
    """Neither by tensor or pipeline parallelism nor in stage 3, which a run would refuse."""
    values = {"model_name_or_path": str(config_of())}
    unsaid, said = (on_paper(values, plugins=[plugin]).outline for plugin in (Scaled, Divided))
    found, all_plans = (legal_plans(outline, 4, 8, 2) for outline in (unsaid, said))
    expected = [plan for plan in all_plans if plan.tensor == plan.pipeline == 1 and plan.stage < 3]
    assert found == expected
    assert 0 < len(expected) < len(all_plans)
    message = (
        r"scale of model\.layers\.0\.self_attn\.q_proj does not say how it is divided .* \(its layer lacks sides\)"
    )
    for wanted in (Wanted(tensor=2), Wanted(pipeline=4), Wanted(stage=3)):
        assert legal_plans(said, 4, 8, 2, wanted)
        with pytest.raises(sft.UsageError, match=message):
            legal_plans(unsaid, 4, 8, 2, wanted)


@needs("lora")
def test_planning_does_not_import_paddle(config_of: Callable[..., Path]) -> None:
    code = (
        "import sys; from click.testing import CliRunner; from sft_parallel_4d.command import command; "
        f"r = CliRunner().invoke(command, ['--model_name_or_path', {str(config_of())!r}, '--max_length', '64', "
        "'--devices', '4', '--device_memory', '1GiB', '--plugin', 'lora']); "
        "assert r.exit_code == 0, r.output; assert 'paddle' not in sys.modules; print('light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "light", done.stderr

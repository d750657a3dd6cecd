"""Which plans are legal, what they send, and the command."""

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
from sft_parallel_4d.command import command
from sft_parallel_4d.communication import busiest
from sft_parallel_4d.memory import Calculator
from sft_parallel_4d.model_size import Precision
from sft_parallel_4d.plans import PIPELINED, Plan, Wanted, legal_plans
from sft_parallel_4d.plugin import Parallel4d

Outlines = Callable[..., sft.Outline]


def test_plans_are_all_that_keep_the_rules(outline_of: Outlines) -> None:
    """4 layers, 4 key/value heads: every combination is tried, and the rules are written out once more."""
    outline, expected = outline_of(), set()
    numbers = (1, 2, 4, 8)
    for data in numbers:
        for sharding in numbers:
            for tensor in (1, 2, 4):
                for pipeline in (1, 2, 4):
                    if data * sharding * tensor * pipeline != 8:
                        continue
                    for stage in (0, 1, 2, 3):
                        legal = (stage > 0) == (sharding > 1)
                        legal = legal and not (stage == 3 and tensor > 1) and not (stage > 1 and pipeline > 1)
                        for sequence in (False, True):
                            if legal and (tensor > 1 or not sequence):
                                expected.add((data, sharding, stage, tensor, pipeline, sequence))
    found = legal_plans(outline, 8, 16, 2, 64)
    assert {(p.data, p.sharding, p.stage, p.tensor, p.pipeline, p.sequence) for p in found} == expected
    assert len(found) == 2 * len(expected)
    assert all(p.devices == 8 and p.data_world * p.accumulation * 2 == 16 for p in found)


@pytest.mark.parametrize(
    ("family", "changes", "wanted", "reason"),
    [
        (
            "llama",
            {"num_attention_heads": 2, "num_key_value_heads": 2},
            {"tensor": 4},
            "does not divide attention heads",
        ),
        ("llama", {"num_key_value_heads": 2}, {"tensor": 4}, r"does not divide key/value heads \(2\)"),
        ("llama", {"vocab_size": 510}, {"tensor": 4}, r"does not divide the vocabulary \(510\)"),
        ("llama", {}, {"pipeline": 8}, "8 pipeline stages are more than 4 layers"),
        ("mistral", {}, {"pipeline": 2}, "no pipeline class for mistral"),
        ("llama", {}, {"tensor": 3}, "do not divide 8 devices"),
        ("llama", {}, {"tensor": 2, "stage": 3}, "exclude each other"),
        ("mistral", {}, {"sequence": True}, "no sequence parallelism for mistral"),
    ],
)
def test_what_is_impossible_is_refused(
    outline_of: Outlines, family: str, changes: dict[str, Any], wanted: dict[str, Any], reason: str
) -> None:
    with pytest.raises(sft.UsageError, match=reason):
        legal_plans(outline_of(family, **changes), 8, 16, 2, 64, Wanted(**wanted))


def test_paddlenlp_has_pipelines_for_the_families_that_are_said_to_have_one(paddle: Any) -> None:
    from paddlenlp import transformers

    from sft.models.families import FAMILIES

    have = {name for name, family in FAMILIES.items() if hasattr(transformers, f"{family.model_class}Pipe")}
    assert have == set(PIPELINED)


def test_volumes_by_hand(outline_of: Outlines) -> None:
    outline = outline_of()
    calculator = Calculator(outline, Precision(), 2, 64)
    values, hidden = calculator.stages(1, 1)[0].size.values, 2 * 64 * 64 * 4
    assert busiest(calculator, Plan()).total == 0
    # A ring's all-reduce among 4: each sends 2 · 3/4 of the gradients.
    assert busiest(calculator, Plan(data=4, accumulation=3)).data == 2 * 3 * values * 4 // 4
    assert busiest(calculator, Plan(sharding=4, stage=1)).sharding == 2 * 3 * values * 4 // 4
    # Stage 3: weights twice and gradients once, each micro-batch.
    assert busiest(calculator, Plan(sharding=4, stage=3, accumulation=2)).sharding == 2 * 3 * 3 * values * 4 // 4
    # All-reduces of [tokens, hidden] among 2 (each sends it once): o and down forward, q, k, v, gate and up backward,
    # in 4 blocks; the embedding's and lm_head's.
    assert busiest(calculator, Plan(tensor=2, accumulation=3)).tensor == 3 * (4 * 7 + 2) * hidden
    assert busiest(calculator, Plan(tensor=2, recompute=True)).tensor == (4 * 9 + 2) * hidden
    # A middle stage sends one tensor each way.
    assert busiest(calculator, Plan(pipeline=4, accumulation=3)).pipeline == 3 * 2 * hidden


def run(folder: Path, *arguments: str) -> Any:
    line = ["--model_name_or_path", str(folder), "--device_memory", "1GiB", "--max_length", "64", *arguments]
    return CliRunner().invoke(command, line)


def test_the_command(config_of: Callable[..., Path]) -> None:
    result = run(config_of(), "--devices", "4", "--learning_rate", "1e-3", "--top", "3")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("238,144 parameters, 238,144 train; a step of 32 rows of 64 tokens, 8 a micro-batch")
    assert lines[2].split()[:4] == ["data", "sharding", "tensor", "pipeline"]
    assert len(lines) == 2 + 1 + 3 + 1


def test_json_holds_all_plans_in_order(config_of: Callable[..., Path]) -> None:
    result = run(config_of(), "--devices", "4", "--json", "--recompute", "true", "--sharding", "stage2")
    found = [json.loads(line) for line in result.output.splitlines()]
    assert [one["seconds"] for one in found] == sorted(one["seconds"] for one in found)
    assert {one["plan"]["stage"] for one in found} == {2}
    assert all(one["plan"]["recompute"] for one in found)


def test_nothing_fits(config_of: Callable[..., Path]) -> None:
    result = run(config_of(num_hidden_layers=400), "--devices", "2", "--device_memory", "20MiB")
    assert "0 fit; the smallest first" in result.output
    assert {line.split()[-1] for line in result.output.splitlines()[3:-1]} == {"-"}


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
        (["--plugin", "nf4"], "add an adapter"),
    ],
)
def test_refusals(config_of: Callable[..., Path], arguments: list[str], reason: str) -> None:
    result = run(config_of(), "--devices", "2", *arguments)
    assert isinstance(result.exception, sft.UsageError)
    assert reason in str(result.exception)


def test_a_plugin_that_does_not_say_what_it_does_is_refused(config_of: Callable[..., Path]) -> None:
    class Secret(sft.Plugin):
        name = "secret"

        @sft.hookimpl
        def sft_adapt_model(self, run: sft.Run, model: Any) -> None: ...

    with pytest.raises(sft.UsageError, match=r"Plugin secret .* does not say on paper"):
        sft.outline({"model_name_or_path": str(config_of())}, extra=[Secret])


def test_a_run_with_it_is_refused(train: Callable[..., Any]) -> None:
    with pytest.raises(sft.UsageError, match="plans runs"):
        train(plugins=(Parallel4d,))


def test_planning_does_not_import_paddle(config_of: Callable[..., Path]) -> None:
    code = (
        "import sys; from click.testing import CliRunner; from sft_parallel_4d.command import command; "
        f"r = CliRunner().invoke(command, ['--model_name_or_path', {str(config_of())!r}, '--max_length', '64', "
        "'--devices', '4', '--device_memory', '1GiB', '--plugin', 'lora']); "
        "assert r.exit_code == 0, r.output; assert 'paddle' not in sys.modules; print('light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "light", done.stderr

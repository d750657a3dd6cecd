"""What a run says it is about to do, before its first step; and what it has come to, after the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from rich.cells import cell_len
from terminals import Terminal
from toy_plugins import plugin

import sft
from sft.commands.summary import answers, headline, tell_summary
from sft.commands.summary import facts as facts_after
from sft.data.batches import PaddedCollator, Schedule
from sft.data.encoded import Encoded
from sft.facts import lines_of, wrapped
from sft.progress import Progress
from sft.training.outlook import padding_of
from sft.voice import Printer, Voice

Train = Callable[..., sft.Summary]


class Pairs(PaddedCollator):
    """Two records that follow each other share a row."""

    def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        order = [index for (index,) in super().rows(lengths, rng)]
        return [tuple(order[start : start + 2]) for start in range(0, len(order), 2)]


def encoded(lengths: Sequence[int]) -> Encoded:
    tokens = sum(lengths) + len(lengths)
    offsets = np.cumsum([0, *(length + 1 for length in lengths)])
    return Encoded(np.arange(tokens, dtype=np.int32), np.ones(tokens, bool), offsets)


@pytest.mark.parametrize("collator", [PaddedCollator(0), Pairs(0)])
@pytest.mark.parametrize(("size", "accumulation", "world"), [(1, 1, 1), (4, 1, 1), (2, 3, 1), (2, 2, 2), (3, 1, 4)])
def test_padding_is_that_of_the_batches(collator: PaddedCollator, size: int, accumulation: int, world: int) -> None:
    """Of all batches of the first pass, as the processes make them; also where the last step has few rows."""
    lengths = np.random.default_rng(0).integers(1, 60, 53).tolist()
    schedule = Schedule(encoded(lengths), collator, 7, size * accumulation * world, 1.0, -1)
    tokens = padding = 0
    for rank in range(world):
        for step, batches in schedule.batches(0, None, rank, world, size):
            if step.number > schedule.total_steps:
                break
            tokens += sum(batch.tokens for batch in batches)
            padding += sum(batch.padding_tokens for batch in batches)
    assert int(schedule.first_rows.sum()) == tokens == sum(lengths)
    assert padding_of(schedule.first_rows, size, schedule.rows_per_step, world) == padding


def test_the_plan_is_what_the_run_then_does(train: Train, dataset: Path) -> None:
    said: list[str] = []
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    summary = train(say=said.append, save_strategy="epoch", **settings)
    (plan,) = [text.splitlines() for text in said if text.startswith("plan:\n")]
    share = 100 * summary.padding_tokens / (summary.tokens + summary.padding_tokens)
    assert plan[1:7] == [
        f"  model       {plan[1][14:]}",
        f"              {summary.total_parameters:,} parameters, {summary.total_parameters:,} train (100.00 %)",
        f"  data        30 records in 30 rows a pass, {summary.tokens:,} tokens and about {share:.1f} % padding",
        "  steps       4, 1 pass; 8 rows a step (2 x 4)",
        "              a checkpoint every pass",
        f"  dev data    7 records, {summary.data['dev']['tokens']:,} tokens, measured before and after training "
        "(do_eval false leaves that out)",
    ]
    assert summary.steps == 4
    assert plan[1].endswith("llama-tied-gqa (llama)")
    assert plan[-1] == f"  written to  {summary.output_dir}"


def test_a_plugin_says_what_memory_a_run_needs(
    train: Train, distribute: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It need not be active. One that cannot say it, or breaks, costs the line and nothing else."""
    body = """@sft.hookimpl
        def sft_memory_need(self, values, device, memory):
            assert memory > 2**20 and device == "cpu"
            return {1: 3 * 2**30, 2: None}[values["per_device_train_batch_size"]]
    """
    monkeypatch.setattr("sft.training.memory.requests", lambda kind: {"memory": ["knowing"]})
    distribute("toy-knowing", plugin("knowing", body), {"knowing": "Tool"}, requests={"advice.memory": "Tool"})
    for rows, says in ((1, True), (2, False), (3, False)):
        said: list[str] = []
        train(f"out{rows}", say=said.append, max_steps=1, do_eval=False, per_device_train_batch_size=rows)
        (plan,) = [text for text in said if text.startswith("plan:\n")]
        assert ("  memory      about 3.00 GiB of " in plan) == says
        assert "\n  memory" in plan or not says


def test_plugins_are_named_with_what_they_do(train: Train) -> None:
    class Tool(sft.Plugin):
        name = "tool"
        api_version = 1
        summary = "Does nothing at all."

    said: list[str] = []
    train(plugins=(Tool,), say=said.append, max_steps=1, do_eval=False)
    (plan,) = [text for text in said if text.startswith("plan:\n")]
    assert "tool: Does nothing at all.\n" in plan


# --- text in columns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 200])
def test_wide_characters_align(width: int) -> None:
    """A Chinese character takes two columns: what stands beside labels begins in one column; no line is too long."""
    texts = ["训练数据：中文和 English 混合的一行，足够长，所以必须折行显示在下面一行里", "plain"]
    lines = lines_of([("数据", texts), ("model", ["a" * 30])], width)
    assert all(cell_len(line) <= width for line in lines)
    begins = [cell_len(line) - cell_len(line[2:].lstrip().partition("  ")[2].lstrip()) for line in lines]
    assert lines[0].startswith("  数据   训练")
    assert begins[0] == begins[-1] == 9
    joined = "".join(line[2:].strip().removeprefix("数据").strip() for line in lines)
    assert joined.replace(" ", "").startswith(texts[0].replace(" ", ""))


def test_what_goes_to_a_file_stays_whole() -> None:
    text = "word " * 100
    assert wrapped(text, None) == [text]
    assert lines_of([("label", [text.strip()])]) == [f"  label  {text.strip()}"]


# --- the summary --------------------------------------------------------------------------------------------


def summary(**changes: Any) -> sft.Summary:
    values: dict[str, Any] = {
        **{"output_dir": Path("out"), "steps": 222, "epochs": 3.0, "seconds": 750.4, "train_loss_first": 3.0},
        **{"train_loss_last": 2.0, "eval_loss_before": 3.5, "eval_loss_after": 2.25, "trainable_parameters": 10},
        **{"total_parameters": 1000, "tokens": 900, "target_tokens": 300, "padding_tokens": 100, "rows": 50},
        **{"skipped_steps": 0, "peak_memory_mib": 700},
    }
    return sft.Summary(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, "done: dev loss 3.5000 -> 2.2500 (-1.2500), 222 steps (3.00 epochs) in 0:12:30; written to out"),
        (
            {"eval_loss_after": None, "seconds": 9.4, "steps": 1},
            "done: train loss 3.0000 -> 2.0000 (-1.0000), 1 step (3.00 epochs) in 9.4 s; written to out",
        ),
        (
            {"train_loss_first": None, "train_loss_last": None, "steps": 0, "epochs": 0.0, "seconds": 9.4},
            "done: dev loss 2.2500, after 0 steps (0.00 epochs), measured in 9.4 s; written to out",
        ),
    ],
)
def test_what_matters_comes_first(changes: dict[str, Any], first: str) -> None:
    said: list[str] = []
    tell_summary(summary(**changes), Progress(said.append))
    assert said[0].splitlines()[:2] == ["", first]
    quiet: list[str] = []
    tell_summary(summary(**changes), Progress(Voice(quiet.append, "warning")))
    assert quiet == [first]
    assert headline(summary(**changes)) == first


def test_the_rest_of_a_summary() -> None:
    found = facts_after(
        summary(
            skipped_steps=2,
            stopped_early={"step": 7, "reason": "it is enough"},
            data={"train": {"records_skipped": 3, "records": 90}},
        )
    )
    assert lines_of(found, None, 12) == [
        "  ended early after step 7: it is enough",
        "  train loss  3.0000 -> 2.0000 (-1.0000)",
        "  trained     10 of 1,000 parameters",
        "  tokens      900 in 50 rows (300 targets), 100 padding (10.0 %)",
        "  skipped     3 of 90 train records, which cannot be read (bad_records.jsonl)",
        "              2 steps that changed nothing",
        "  peak memory 700 MiB",
    ]


@pytest.mark.parametrize("columns", [40, 80])
def test_a_summary_fits_the_terminal(terminal: Callable[..., Terminal], columns: int) -> None:
    stream = terminal(columns)
    tell_summary(summary(), Progress(Printer("stdout")))
    assert all(cell_len(line) <= columns for line in stream.getvalue().splitlines())
    assert "done: dev loss 3.5000 -> 2.2500" in stream.getvalue()


def test_answers_of_code_keep_their_lines_and_tabs() -> None:
    sample = {"prompt": "a\r\nb\tc", "before": "def f():\n\treturn 1\r\n\tx", "after": "\x1b[2J"}
    said: list[str] = []
    Progress(said.append).tell("summary", {}, answers(cast(sft.Summary, SimpleNamespace(samples=[sample]))))
    assert "\n".join(said).split("\n") == [
        "",
        "prompt: a",
        "    b   c",
        "  before: def f():",
        "        return 1",
        "        x",
        "  after:  \\x1b[2J",
    ]

"""Runs on conversations with tools, calls and thoughts: the same however the data is read, and exact on resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_files import largest_difference, steps_of

import sft
from sft.inference.evaluate import evaluate_finished
from sft.testing import needs, read_metrics

TEMPLATE = Path(__file__).parent / "fixtures" / "templates" / "qwen3_tools.jinja"
TOOLS = [{"name": "square"}]
Train = Callable[..., sft.Summary]


def record(number: int) -> dict[str, Any]:
    """One with a call and thoughts, or one without."""
    if number % 3 == 0:
        return {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": f"{number}"}]}
    call = {"name": "square", "arguments": json.dumps({"of": number})}
    return {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": f"{number} squared?"}]},
            {"role": "assistant", "content": None, "reasoning_content": "a tool", "tool_calls": [{"function": call}]},
            {"role": "tool", "content": str(number * number)},
            {"role": "assistant", "content": f"It is {number * number}."},
        ],
    }


@pytest.fixture
def tools_train(train: Train, variant: Callable[..., Path], tmp_path: Path) -> Train:
    model = variant("llama-tied-gqa", max_position_embeddings=512)
    data = tmp_path / "data"
    data.mkdir()
    for split, numbers in (("train", range(12)), ("dev", range(12, 16))):
        (data / f"{split}.json").write_text("\n".join(json.dumps(record(number)) for number in numbers))

    def run(output_dir: str, **settings: Any) -> sft.Summary:
        usual = {"per_device_train_batch_size": 3, "max_steps": 4, "chat_template": str(TEMPLATE)}
        places = {"model_name_or_path": str(model), "dataset_name_or_path": str(data)}
        return train(output_dir, **places, **{**usual, **settings})

    return run


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in steps_of(read_metrics(folder))]


def test_a_run_says_what_it_learns_and_goes_on_exactly(tools_train: Train, tmp_path: Path) -> None:
    settings = {"train_on_thoughts": "not_empty", "encoded_cache": str(tmp_path / "cache")}
    said: list[str] = []
    summary = tools_train("whole", say=said.append, **settings)
    counted = {"calls": 8, "thoughts": 8, "empty_thoughts": 0, "empty_thoughts_left_out": 12, "records": 12}
    assert {name: summary.data["train"][name] for name in counted} == counted
    assert any("8 calls learned, 8 thoughts learned, 12 empty thoughts not learned" in line for line in said)
    tools_train("half", **settings, save_strategy="steps", save_steps=2)
    again = tools_train("again", **settings, resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "again")
    assert again.data["train"] == summary.data["train"]
    with pytest.raises(sft.UsageError, match="was trained on other tokens"):
        tools_train("other", resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    measured = evaluate_finished(
        {"model_name_or_path": str(tmp_path / "whole"), "dataset_name_or_path": str(tmp_path / "data")},
        None,
        said.append,
    )
    (last,) = (line for line in read_metrics(tmp_path / "whole") if "eval_loss" in line and line["step"] == 4)
    assert measured["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert any("train_on_thoughts not_empty, as in the run that wrote" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("train_on", ["answers", "last_answer", "everything"])
def test_the_same_however_the_data_is_read(tools_train: Train, tmp_path: Path, train_on: str) -> None:
    plain = tools_train("plain", train_on=train_on)
    ways = {
        "stream": {"lazy": True},
        "several": {"dataset_num_proc": 2},
        "kept": {"encoded_cache": str(tmp_path / "cache")},
        "found": {"encoded_cache": str(tmp_path / "cache")},
    }
    for name, settings in ways.items():
        found = tools_train(name, train_on=train_on, **settings)
        assert losses(tmp_path / name) == losses(tmp_path / "plain")
        assert found.data["train"] == plain.data["train"]


@pytest.mark.slow
@needs("zero-padding")
def test_packed_is_padded(tools_train: Train, tmp_path: Path) -> None:
    """One step over all records, of which two rows hold as much as twelve; calls, answers and records weigh."""
    for split in ("train", "dev"):
        path = tmp_path / "data" / f"{split}.json"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for number, one in enumerate(records):
            one["weight"] = (1, 0.25, 3)[number % 3]
            for message in one["messages"]:
                if message["role"] == "assistant":
                    message["weight"] = 0.5 if message.get("tool_calls") else 2
        path.write_text("\n".join(map(json.dumps, records)))
    settings = {"max_steps": 1, "train_on_thoughts": "none", "src_length": 256, "max_length": 256}
    padded = tools_train("padded", **settings, per_device_train_batch_size=12)
    packed = tools_train("packed", **settings, zero_padding=True, per_device_train_batch_size=12)
    assert packed.data["train"] == padded.data["train"]
    assert packed.data["train"]["records_weighted"] == 12
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), rel=1e-5)
    assert largest_difference(tmp_path / "packed", tmp_path / "padded") < 1e-5
    padding = [steps_of(read_metrics(tmp_path / name))[0]["padding_tokens"] for name in ("packed", "padded")]
    assert padding[0] < padding[1]

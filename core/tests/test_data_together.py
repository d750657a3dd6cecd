"""Where kinds of data meet: several sets with tools, calls, thoughts and weights, cut, packed, streamed and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_files import largest_difference, steps_of
from stopped_runs import StoppedError, stopping_when_saved

import sft
from sft import Conversation, ToolCall, Turn
from sft.data.encoded import Encoded, joined
from sft.data.encoding import encode
from sft.data.learned import Learned
from sft.data.raw_text import TEXT_ROLE
from sft.data.stream import Stream
from sft.data.tokenizer import Tokenizer
from sft.inference.evaluate import evaluate_finished
from sft.testing import needs

TEMPLATE = Path(__file__).parent / "fixtures" / "templates" / "qwen3_tools.jinja"
TOOLS = [{"type": "function", "function": {"name": "square", "parameters": {"type": "object", "properties": {}}}}]
WEIGHTS = (1, 0.25, 3)
LONG = 4096


# --- encoded ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(models: Path) -> Tokenizer:
    return Tokenizer(models / "llama-tied-gqa", chat_template=str(TEMPLATE))


def calling(number: int) -> Conversation:
    call = Turn("assistant", "", True, 0.5, "a tool", (ToolCall("square", {"of": number}),))
    turns = [Turn("user", "squared? " * (1 + number % 3)), call, Turn("tool", "9"), Turn("assistant", "9", True, 2)]
    return Conversation(turns, None, TOOLS, WEIGHTS[number % 3])


def document(number: int, weight: float = 1) -> Conversation:
    """With what would be a thought in an answer."""
    return Conversation([Turn(TEXT_ROLE, f"<think>{number}</think> A coat. " * 9, True)], weight=weight)


def targets(data: Encoded) -> list[tuple[int, float]]:
    """All targets in order, each with its weight."""
    weights = data.trained.astype(np.float32) if data.weights is None else data.weights
    places = np.nonzero(data.trained)[0]
    begins = set(data.offsets[data.further].tolist())  # only read there: a target of the row before
    return [(int(data.ids[n]), float(weights[n])) for n in places.tolist() if n not in begins]


@pytest.mark.parametrize("most", [3, 40, 150])
def test_what_is_divided_keeps_its_weights(tokenizer: Tokenizer, most: int) -> None:
    records = [calling(1), document(1, 0.25), calling(2), document(2)]
    learned = Learned("answers", "none")
    whole = encode(records, tokenizer, LONG, LONG, learned=learned)
    parts = encode(records, tokenizer, LONG, most, learned=learned, truncation="split")
    assert len(parts) > len(whole) == 4
    assert targets(parts) == targets(whole)
    assert {weight for _, weight in targets(whole)} == {0.125, 0.25, 0.5, 1.5, 6, 1}
    assert parts.counts.records_weighted == whole.counts.records_weighted == 3
    assert parts.counts.target_tokens == whole.counts.target_tokens
    left = encode(records, tokenizer, LONG, 12, learned=learned, truncation="left")
    assert [float(weight) for weight in left.weights[left.offsets[1:] - 1]] == [0.5, 0.25, 6, 1]


@pytest.mark.parametrize("learned", [Learned("last_answer"), Learned("everything"), Learned("answers", "none")])
def test_of_a_text_all_is_learned_whatever_is_learned_of_conversations(tokenizer: Tokenizer, learned: Learned) -> None:
    plain, found = (
        encode([document(1), document(2, 7)], tokenizer, LONG, LONG, learned=how) for how in (Learned(), learned)
    )
    assert found.fingerprint() == plain.fingerprint()
    assert found.counts == plain.counts
    assert found.counts.thoughts_left_out == 0
    assert found[1].weights is not None
    assert set(found[1].weights.tolist()) == {7}


def test_sets_of_which_some_weigh_are_joined(tokenizer: Tokenizer) -> None:
    """As the same records of one set, which are divided, dropped and of several kinds."""
    sets = [[document(1), document(2)], [calling(1), calling(2)], [document(3)]]

    def made(records: list[Conversation]) -> Encoded:
        return encode(records, tokenizer, LONG, 60, truncation="split")

    one, several = made([record for part in sets for record in part]), joined([made(part) for part in sets])
    assert one.weights is not None
    assert made(sets[0]).weights is None
    assert (several.fingerprint(), several.counts) == (one.fingerprint(), one.counts)
    assert several.further.tolist() == one.further.tolist()
    assert joined([made(sets[0]), made(sets[2])]).weights is None


# --- runs ---------------------------------------------------------------------------------------------------


def openai(number: int) -> dict[str, Any]:
    """Each turn that is learned weighs something, and the record too."""
    call = {"type": "function", "function": {"name": "square", "arguments": json.dumps({"of": number})}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": f"{number} squared?" * (1 + number % 2)}]},
        {"role": "assistant", "reasoning_content": "a tool", "tool_calls": [call], "weight": 0.5},
        {"role": "tool", "content": str(number * number)},
        {"role": "assistant", "content": f"It is {number * number}.", "loss_scale": 2},
    ]
    return {"tools": TOOLS, "messages": messages, "weight": WEIGHTS[number % 3]}


def sharegpt(number: int) -> dict[str, Any]:
    """Without weights, but for answers that are excluded."""
    call = json.dumps({"name": "square", "arguments": {"of": number}})
    says = [("human", f"{number} squared?"), ("function_call", call), ("observation", "9"), ("gpt", "Nine.")]
    if number % 3 == 0:
        says = [("human", "Hello"), ("gpt", "Hi." * (1 + number % 4))]
    conversations: list[dict[str, Any]] = [{"from": sender, "value": text} for sender, text in says]
    if number % 6 == 1:
        conversations[1]["train"] = False
    return {"tools": json.dumps(TOOLS), "conversations": conversations}


def text(number: int) -> dict[str, Any]:
    return {"text": "A coat for you. " * (1 + number % 40), "weight": 0.5 + number % 2}


KINDS: dict[str, tuple[Callable[[int], dict[str, Any]], int]] = {"a": (openai, 20), "b": (sharegpt, 12), "c": (text, 9)}


@pytest.fixture
def sets(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Data sets with their weights, each with dev data if that is wanted."""

    def make(weights: dict[str, float], dev: bool = True) -> list[dict[str, Any]]:
        for name in weights:
            made, number = KINDS[name]
            folder = tmp_path / f"set-{name}"
            folder.mkdir()
            for split, numbers in (("train", range(number)), ("dev", range(number, number + 3))):
                if split == "train" or dev:
                    lines = "".join(json.dumps(made(n)) + "\n" for n in numbers)
                    (folder / f"{split}.json").write_text(lines)
        return [{"path": str(tmp_path / f"set-{name}"), "name": name, "weight": weights[name]} for name in weights]

    return make


@pytest.fixture
def given(variant: Callable[..., Path]) -> dict[str, Any]:
    model = variant("llama-tied-gqa", max_position_embeddings=512)
    return {
        **{"model_name_or_path": str(model), "chat_template": str(TEMPLATE), "train_on_thoughts": "none"},
        **{"max_length": 400, "truncation": "split", "learning_rate": 1e-3, "per_device_train_batch_size": 2},
    }


TWO, THREE = {"a": 0.7, "b": 0.3}, {"a": 0.5, "b": 0.3, "c": 0.2}


@pytest.mark.parametrize(
    ("weights", "more"),
    [
        pytest.param(TWO, {"lazy": True}, id="lazy"),
        pytest.param(THREE, {}, id="whole", marks=pytest.mark.slow),
        pytest.param(THREE, {"encoded_cache": "cache", "dataset_num_proc": 2}, id="kept", marks=pytest.mark.slow),
        pytest.param(THREE, {"lazy": True, "mix_until": "all_exhausted"}, id="lazy-all", marks=pytest.mark.slow),
        pytest.param(
            THREE,
            {"lazy": True, "plugin": ["zero-padding"]},
            id="lazy-packed",
            marks=[pytest.mark.slow, needs("zero-padding")],
        ),
        pytest.param(TWO, {"dev_split": 0.2}, id="dev-split", marks=pytest.mark.slow),
        pytest.param(TWO, {"lazy": True, "dev_split": 4, "train_on": "last_answer"}, id="last", marks=pytest.mark.slow),
    ],
)
def test_weighted_sets_with_tools_resume_to_the_same_bits(
    train: Callable[..., sft.Summary],
    metrics: Callable[..., Any],
    sets: Callable[..., list[dict[str, Any]]],
    given: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: dict[str, float],
    more: dict[str, Any],
) -> None:
    """Step 5 is in the middle of a pass, and windows of a stream have 7 records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Stream.__init__, "__defaults__", (7,))
    settings = {**given, **more, "dataset_name_or_path": sets(weights, dev="dev_split" not in more)}
    settings |= {"max_steps": 7, "save_strategy": "steps", "save_steps": 5}
    summary = train("whole", **settings)
    counts = summary.data["train"]
    assert (counts["calls"] > 0) == ("train_on" not in more)
    assert counts["records_split"] > 0
    assert 0 < counts["records_weighted"] < counts["records"]
    with pytest.raises(StoppedError):
        train("parts", plugins=(stopping_when_saved(5),), **settings)
    resumed = train("parts", resume_from_checkpoint="auto", **settings)
    assert metrics(tmp_path / "parts", same=True) == metrics(tmp_path / "whole", same=True)
    assert resumed.data == summary.data
    saved = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "parts")]
    assert saved[0] == saved[1]
    if "dev_split" in more:
        number = sum(KINDS[name][1] for name in weights)
        assert 0 < summary.data["dev"]["records"] < number
        assert "lazy" in more or counts["records"] + summary.data["dev"]["records"] == number


@pytest.mark.slow
@needs("zero-padding")
@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_to_the_same_bits(
    metrics: Callable[..., Any], sets: Callable[..., list[dict[str, Any]]], given: dict[str, Any], tmp_path: Path
) -> None:
    """SIGKILL for a real ``sft run`` on three sets, streamed and packed, once it has a checkpoint."""
    settings = {**given, "dataset_name_or_path": sets(THREE), "lazy": True, "zero_padding": True}
    settings |= {"max_steps": 40, "save_strategy": "steps", "save_steps": 10, "device": "cpu"}

    def started(name: str, **more: Any) -> subprocess.Popen[bytes]:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**settings, "output_dir": str(tmp_path / name), **more}))
        with (tmp_path / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "sft", "run", str(path)], stdout=log, stderr=log, env={**os.environ}
            )

    assert started("whole").wait(250) == 0, (tmp_path / "log").read_text()
    process = started("out")
    while not (tmp_path / "out" / "checkpoint-10").is_dir():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert started("out", resume_from_checkpoint="auto").wait(250) == 0, (tmp_path / "log").read_text()
    assert metrics(tmp_path / "out", same=True) == metrics(tmp_path / "whole", same=True)
    saved = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "out")]
    assert saved[0] == saved[1]


@pytest.mark.slow
@needs("zero-padding")
def test_packed_sets_are_padded_ones(
    train: Callable[..., sft.Summary],
    metrics: Callable[..., Any],
    sets: Callable[..., list[dict[str, Any]]],
    given: dict[str, Any],
    tmp_path: Path,
) -> None:
    """One step over all records of three sets that follow each other, each of which has other weights."""
    plain = [{key: value for key, value in one.items() if key != "weight"} for one in sets(THREE)]
    settings = {**given, "dataset_name_or_path": plain, "max_steps": 1, "per_device_train_batch_size": 256}
    padded, packed = train("padded", **settings), train("packed", zero_padding=True, **settings)
    assert packed.data == padded.data
    lines = [steps_of(metrics(tmp_path / name))[0] for name in ("padded", "packed")]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-5)
    assert lines[0]["target_tokens"] == lines[1]["target_tokens"]
    assert lines[0]["padding_tokens"] > lines[1]["padding_tokens"]
    assert largest_difference(tmp_path / "padded", tmp_path / "packed") < 1e-5


@pytest.mark.slow
def test_a_finished_model_is_measured_on_each_set_as_in_its_run(
    train: Callable[..., sft.Summary], sets: Callable[..., list[dict[str, Any]]], given: dict[str, Any], tmp_path: Path
) -> None:
    data = sets(THREE)
    summary = train(dataset_name_or_path=data, max_steps=2, **given)
    heard: list[str] = []
    plain = [{key: value for key, value in one.items() if key != "weight"} for one in data]
    measured = evaluate_finished(
        {"model_name_or_path": str(tmp_path / "out"), "dataset_name_or_path": plain}, None, heard.append
    )
    assert measured["eval_loss"] == pytest.approx(summary.eval_loss_after, rel=1e-6)
    assert list(measured["eval_sets"]) == ["a", "b", "c"]
    assert "truncation split and train_on_thoughts none, as in the run that wrote" in heard[0]

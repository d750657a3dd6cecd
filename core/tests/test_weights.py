"""Turns and records that weigh: which tokens weigh what, and runs whose loss is the weighted mean, however it is
batched, packed, interrupted or rounded.

``test_formats.py`` has the reading of weights, ``test_loss.py`` one loss and its gradients against float64.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversations import LONG, TokenizerWith
from no_onednn import stand_in
from run_files import largest_difference, steps_of, weights_of
from stopped_runs import contents, stop, watching

import sft
from sft import Conversation, ToolCall, Turn
from sft.data.encoded import Encoded
from sft.data.encoding import encode
from sft.data.learned import Learned
from sft.data.questions import fitting
from sft.data.tokenizer import Tokenizer
from sft.testing import forward, needs, write_data

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]

BLOCKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
PAIRS = {"conversation": ["Q: {{user}}\nA: ", "{{bot}}<|im_end|>"]}


# --- which tokens weigh what --------------------------------------------------------------------------------


def talk(*weights: float) -> list[Turn]:
    """A question and an answer for each weight; 0 does not train."""
    turns = []
    for number, weight in enumerate(weights):
        answer = Turn("assistant", f"answer {number}", weight > 0, weight)
        turns += [Turn("user", f"question {number}"), answer]
    return turns


def tokenizer_of(kind: str, models: Path, tokenizer_with: TokenizerWith, tmp_path: Path) -> Tokenizer:
    """llama-tied-gqa's with its own template, one with blocks, PaddleNLP's pairs or none."""
    if kind == "pairs":
        (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
        return Tokenizer(models / "llama-tied-gqa", chat_template=str(tmp_path / "pairs.json"))
    return tokenizer_with("llama-tied-gqa", **({} if kind == "own" else {"template": {"blocks": BLOCKS}.get(kind)}))


def weighed(encoded: Encoded, tokenizer: Tokenizer, index: int = 0) -> list[tuple[str, float]]:
    """The text of each run of targets that weigh the same, and what they weigh."""
    example = encoded[index]
    weights = np.where(example.labels == -100, 0, 1) if example.weights is None else example.weights
    assert ((weights > 0) == (example.labels != -100)).all()
    runs: list[tuple[list[int], float]] = []
    for label, weight in zip(example.labels.tolist(), weights.tolist(), strict=True):
        if not runs or runs[-1][1] != weight:
            runs.append(([], weight))
        runs[-1][0].append(label)
    return [(tokenizer.decode(labels), weight) for labels, weight in runs if weight]


@pytest.mark.parametrize("kind", ["own", "blocks", "pairs", "none"])
def test_a_target_weighs_what_its_turn_and_its_record_weigh(
    models: Path, tokenizer_with: TokenizerWith, tmp_path: Path, kind: str
) -> None:
    tokenizer = tokenizer_of(kind, models, tokenizer_with, tmp_path)
    records = [talk(0.5, 2, 0, 1), Conversation(talk(0.5, 2, 0, 1), weight=4), Conversation(talk(1, 1), weight=0.25)]
    encoded = encode([*records, talk(1, 0, 1)], tokenizer, LONG, LONG)

    def answers(*weights: float) -> list[tuple[str, float]]:
        return [(f"answer {number}<|im_end|>", weight) for number, weight in enumerate(weights) if weight]

    assert weighed(encoded, tokenizer, 0) == answers(0.5, 2, 0, 1)
    assert weighed(encoded, tokenizer, 1) == answers(2, 8, 0, 4)
    assert encoded.weights is not None
    assert encoded.weights.dtype == np.float32
    both = weighed(encoded, tokenizer, 2)
    assert {weight for _, weight in both} == {0.25}
    assert "".join(text for text, _ in both) == "".join(text for text, _ in answers(1, 1))
    assert [weight for _, weight in weighed(encoded, tokenizer, 3)] == [1, 1]
    assert encoded.counts.records_weighted == 3
    assert "3 records weighted" in str(encoded.counts)
    assert encoded.counts.target_tokens == int(encoded.trained.sum()) == int((encoded.weights > 0).sum())
    plain = [talk(1, 1, 0, 1), talk(1, 1, 0, 1), talk(1, 1), talk(1, 0, 1)]
    assert np.array_equal(encoded.ids, encode(plain, tokenizer, LONG, LONG).ids)


def test_what_is_cut_takes_its_weights_along(models: Path, tokenizer_with: TokenizerWith) -> None:
    """The prompt from its beginning, the oldest turns, the end of the answer."""
    tokenizer = tokenizer_with("llama-tied-gqa", template=None)
    short = encode([talk(0.5, 2)], tokenizer, LONG, 40)
    assert weighed(short, tokenizer)[-1][1] == 2
    less = encode([talk(0.5, 2)], tokenizer, LONG, len(short.ids) - 4)
    assert less.weights is not None
    assert len(less.weights) == len(less.ids) == len(less.trained)
    assert {weight for _, weight in weighed(less, tokenizer)} <= {0.5, 2}
    assert less.weights[-1] == 2
    oldest = Conversation(talk(0.5, 2), weight=3)
    assert fitting(oldest, tokenizer, 4) == oldest[2:]
    assert fitting(oldest, tokenizer, 4).weight == 3  # type: ignore[attr-defined]


def test_without_weights_nothing_is_kept_and_fingerprints_are_what_they_were(models: Path) -> None:
    tokenizer = Tokenizer(models / "llama-tied-gqa")
    encoded = encode([talk(1, 0, 1), Conversation(talk(1, 1), weight=1)], tokenizer, LONG, LONG)
    assert encoded.weights is None
    assert encoded[0].weights is None
    assert encoded.counts.records_weighted == 0
    digest = hashlib.sha256(encoded.ids.tobytes() + encoded.trained.tobytes() + encoded.offsets.tobytes())
    assert encoded.fingerprint() == digest.hexdigest()[:16]
    weighs = [encode([talk(*w), talk(1, 1)], tokenizer, LONG, LONG) for w in ((1, 0, 1), (1, 0, 2), (2, 0, 1))]
    assert len({data.fingerprint() for data in weighs}) == 3


def test_groups_of_which_some_weigh_are_joined(models: Path) -> None:
    tokenizer = Tokenizer(models / "llama-tied-gqa")
    records = [talk(1, 0, 1), talk(1, 1), talk(3, 1), talk(1)]
    one, other = (encode(records, tokenizer, LONG, LONG, group) for group in (256, 1))
    assert one.weights is not None
    assert other.weights is not None
    assert np.array_equal(one.weights, other.weights)
    assert one.fingerprint() == other.fingerprint()


def test_answers_whose_blocks_cannot_be_told_apart_must_weigh_the_same(tokenizer_with: TokenizerWith) -> None:
    """The template writes both answers into one block."""
    template = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>{% endgeneration %}"
    tokenizer = tokenizer_with("llama-tied-gqa", template=template)
    assert {w for _, w in weighed(encode([talk(2, 2)], tokenizer, LONG, LONG), tokenizer)} == {2}
    with pytest.raises(sft.UsageError, match=r"not one generation block for each answer, so an answer .* weighs"):
        encode([talk(2, 1)], tokenizer, LONG, LONG)


# --- with calls and thoughts --------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALLED: list[Turn] = [
    Turn("user", "a"),
    Turn("assistant", "", True, 0.5, "one", (ToolCall("f", {"x": 3}),)),
    Turn("tool", "3"),
    Turn("assistant", "nine", True, 4, "two"),
]
CALL, ANSWER = '<tool_call>\n{"name": "f", "arguments": {"x": 3}}\n</tool_call><|im_end|>', "nine<|im_end|>"


def encoded_tools(models: Path, learned: Learned, turns: list[Turn], weight: float = 1) -> tuple[Encoded, Tokenizer]:
    template = Path(__file__).parent / "fixtures" / "templates" / "qwen3_tools.jinja"
    tokenizer = Tokenizer(models / "qwen2-untied", chat_template=str(template))
    found = Conversation(turns, tools=TOOLS, weight=weight)
    return encode([found], tokenizer, LONG, LONG, learned=learned), tokenizer


@pytest.mark.parametrize(
    ("learned", "weight", "expected"),
    [
        (Learned(), 1, [(f"<think>\none\n</think>\n\n{CALL}", 0.5), (f"<think>\ntwo\n</think>\n\n{ANSWER}", 4)]),
        (Learned("answers", "none"), 2, [(CALL, 1), (ANSWER, 8)]),
        (Learned("last_answer", "none"), 1, [(ANSWER, 4)]),
    ],
    ids=["all", "without-thoughts", "last"],
)
def test_a_call_and_a_thought_weigh_what_their_turn_weighs(
    models: Path, learned: Learned, weight: float, expected: list[tuple[str, float]]
) -> None:
    encoded, tokenizer = encoded_tools(models, learned, CALLED, weight)
    assert weighed(encoded, tokenizer) == expected


def test_what_is_learned_as_one_text_weighs_what_the_record_weighs(models: Path) -> None:
    """A turn cannot weigh anything else there, and none that is excluded is learned all the same."""
    plain = [replace(turn, weight=1.0) for turn in CALLED]
    encoded, _ = encoded_tools(models, Learned("everything"), plain, 3)
    assert encoded.weights is not None
    assert set(encoded.weights[1:].tolist()) == {3}
    for turns in (CALLED, [*plain, Turn("user", "a"), Turn("assistant", "b", False, 0)]):
        with pytest.raises(sft.UsageError, match="train_on everything learns a conversation as one text, and a mess"):
            encoded_tools(models, Learned("everything"), turns)


# --- runs ---------------------------------------------------------------------------------------------------


def records(weight: Callable[[int], dict[str, Any]], turn: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """30 conversations of very different lengths."""
    found = []
    for number in range(30):
        messages = []
        for index in range(1 + number % 2):
            messages.append({"role": "user", "content": "w" * (number % 4)})
            answer = f"A coat{' for' * ((number + index) % 5)}."
            messages.append({"role": "assistant", "content": answer, **turn(number + index)})
        found.append({"messages": messages, **weight(number)})
    return found


WEIGHTS = (0.01, 1, 7)
TURNS = (1, 0.3, 2)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records that weigh 0.01 to 7, with turns that weigh 0.3 to 2; dev data of the same kind."""
    made = records(lambda n: {"weight": WEIGHTS[n % 3]}, lambda n: {"weight": TURNS[n % 3]})
    return write_data(tmp_path_factory.mktemp("weighted"), made, made[:5])


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float | None], Path]:
    """The same records, all of one weight, or without any."""

    def make(weight: float | None) -> Path:
        given = {} if weight is None else {"weight": weight}
        made = records(lambda n: given, lambda n: {})
        return write_data(tmp_path_factory.mktemp("alike"), made, made[:5])

    return make


def by_hand(folder: Path, examples: list[sft.Example]) -> tuple[float, float]:
    """Σ w·ℓ / Σ w, and Σ ℓ / n: each example alone, log-softmax in float64 of all its logits."""
    from sft.models.loading import load_model, open_model

    model = load_model(open_model(folder))
    losses, weights = [], []
    for example in examples:
        logits = forward(model, example.input_ids[None])[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        places = np.nonzero(example.labels != -100)[0]
        chosen = logits[places, example.labels[places]]
        losses.append(np.log(np.exp(logits[places]).sum(-1)) - chosen)
        assert example.weights is not None
        weights.append(example.weights[places].astype(np.float64))
    loss, weight = np.concatenate(losses), np.concatenate(weights)
    return float((weight * loss).sum() / weight.sum()), float(loss.mean())


def caught(into: list[sft.Run]) -> type[sft.Plugin]:
    class Catch(sft.Plugin):
        name = "catch"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if not into:
                into.append(run)

    return Catch


def test_the_loss_is_the_weighted_mean_and_the_dev_loss_is_not(
    train: Train, metrics: Metrics, models: Path, tmp_path: Path, weighted: Path
) -> None:
    """The first step, of all records, against the sum by hand."""
    runs: list[sft.Run] = []
    said: list[str] = []
    settings = {"dataset_name_or_path": str(weighted), "max_steps": 1, "max_length": 65}
    summary = train("out", (caught(runs),), per_device_train_batch_size=30, say=said.append, **settings)
    run = runs[0]
    mean, plain = by_hand(models / "llama-tied-gqa", [run.train_data[index] for index in range(30)])
    (line,) = steps_of(metrics(tmp_path / "out"))
    assert abs(mean - plain) > 1e-3 * plain
    assert line["loss"] == pytest.approx(mean, rel=1e-6)
    (measured,) = run.dev_data.sets.values()
    _, dev = by_hand(models / "llama-tied-gqa", [measured[index] for index in range(5)])
    assert summary.eval_loss_before == pytest.approx(dev, rel=1e-6)
    assert any("30 records weighted" in text for text in said)
    assert summary.data["train"]["records_weighted"] == 30


LAYOUTS = [
    pytest.param({"singles": (1, 30), "packed": (2, 15)}, marks=needs("greedy-zero-padding"), id="singles-packed"),
    pytest.param({"halves": (15, 2), "fives": (5, 6)}, marks=pytest.mark.slow, id="halves-fives"),
]


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_batches_do_not_change_what_weights_mean(
    train: Train, metrics: Metrics, tmp_path: Path, weighted: Path, layouts: dict[str, tuple[int, int]]
) -> None:
    """All records in one step: as one batch, or several; of thirty, some have records of weight 0.01 alone."""
    settings = {"dataset_name_or_path": str(weighted), "max_steps": 2, "max_grad_norm": 0}
    settings |= {"do_eval": False, "max_length": 65}
    train("whole", per_device_train_batch_size=30, **settings)
    expected = steps_of(metrics(tmp_path / "whole"))
    for name, (rows, batches) in layouts.items():
        given = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": batches}
        train(name, **settings, **given, **({"plugin": ["greedy-zero-padding"]} if name == "packed" else {}))
        found = steps_of(metrics(tmp_path / name))
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-5)
        assert [line["target_tokens"] for line in found] == [line["target_tokens"] for line in expected]
        assert largest_difference(tmp_path / name, tmp_path / "whole") < 1e-5


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=[pytest.mark.slow, needs("lora")])])
def test_what_all_records_weigh_alike_does_not_matter(
    train: Train,
    metrics: Metrics,
    tmp_path: Path,
    alike: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    bf16: bool,
) -> None:
    """A power of two to the last bit, and a millionth, where a step's weights are less than 1 together, but for
    roundings: those of 16 bits are a thousand times as large."""
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_length": 65}
    if bf16:
        stand_in(monkeypatch.setattr)
        settings |= {"bf16": True, "device": "cpu", "plugin": ["lora"]}
    for name, weight in (("none", None), ("two", 2.0), ("millionth", 1e-6)):
        train(name, dataset_name_or_path=str(alike(weight)), **settings)
    none, two, millionth = (metrics(tmp_path / name, same=True) for name in ("none", "two", "millionth"))
    assert none == two
    weights, same = weights_of(tmp_path / "none"), weights_of(tmp_path / "two")
    assert all(np.array_equal(weights[name], same[name]) for name in weights)
    for found, expected in zip(steps_of(millionth), steps_of(none), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3 if bf16 else 1e-6)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2 if bf16 else 1e-5)
    assert bf16 or largest_difference(tmp_path / "millionth", tmp_path / "none") < 1e-5


def test_lines_over_several_steps_and_a_resumed_run(
    train: Train, metrics: Metrics, tmp_path: Path, weighted: Path
) -> None:
    """A line's loss is the weighted mean of its steps; a run that stops between two lines goes on bit by bit."""
    settings = {"dataset_name_or_path": str(weighted), "max_steps": 6, "per_device_train_batch_size": 4}
    settings |= {"save_strategy": "steps", "save_steps": 3, "do_eval": False, "max_length": 65}
    sums: list[tuple[float, float]] = []

    class Sums(sft.Plugin):
        name = "sums"
        api_version = 1
        weight = 0.0

        @sft.hookimpl
        def sft_micro_batch(self, run: sft.Run, batch: sft.Batch) -> None:
            self.weight += batch.target_weight

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            sums.append((record["loss"], self.weight))
            self.weight = 0.0

    train("whole", (Sums,), logging_steps=4, **settings)
    lines = metrics(tmp_path / "whole", same=True)
    assert [line["step"] for line in lines] == [1, 4, 6]
    for line, steps in zip(lines, (sums[:1], sums[1:4], sums[4:]), strict=True):
        total, weight = sum(loss * weight for loss, weight in steps), sum(weight for _, weight in steps)
        assert line["loss"] == pytest.approx(total / weight, rel=1e-9)
    stop(train, 4, logging_steps=4, **settings)
    steps: list[int] = []
    train("out", (watching(steps),), logging_steps=4, resume_from_checkpoint="auto", **settings)
    assert steps == [4, 5, 6]
    assert metrics(tmp_path / "out", same=True) == lines
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lazy", "dataset_num_proc", "encoded_cache"])
def test_ways_to_read_give_the_same_run(
    train: Train, metrics: Metrics, tmp_path: Path, weighted: Path, way: str
) -> None:
    settings = {"dataset_name_or_path": str(weighted), "max_steps": 9, "per_device_train_batch_size": 4}
    settings["max_length"] = 65
    train("plain", **settings)
    given = {"lazy": True, "dataset_num_proc": 2, "encoded_cache": str(tmp_path / "cache")}[way]
    for name in ("first", "second"):
        train(name, **settings, **{way: given})
        assert metrics(tmp_path / name, same=True) == metrics(tmp_path / "plain", same=True)
        assert largest_difference(tmp_path / name, tmp_path / "plain") == 0

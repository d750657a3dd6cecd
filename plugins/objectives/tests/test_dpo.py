"""DPO: against TRL, step by step; its derivatives; its data; and with all that a run may be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from safetensors.numpy import load_file, save_file

import sft
from sft.testing import needs, write_data
from sft_objectives.pairs import pair_of
from sft_objectives.preference import LOSSES, Answers

FIXTURES = Path(__file__).parent / "fixtures"
TRL = json.loads((FIXTURES / "dpo.json").read_text())
ADAPTERS = ("lora", "lora pissa", "lora rslora lora-plus", "lora dora", "vera", "lora nf4", "lora int8")
VALUES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def as_trl(tmp_path: Path) -> dict[str, Any]:
    """The settings of the run in fixtures/make_dpo.py: its pairs, template, adapter and optimizer."""
    (tmp_path / "template.jinja").write_text(TRL["template"])
    return {
        "plugin": ["dpo", "lora"],
        "dataset_name_or_path": str(write_data(tmp_path / "data", TRL["pairs"], TRL["pairs"])),
        "chat_template": str(tmp_path / "template.jinja"),
        **{"lora_path": str(FIXTURES / "dpo_start"), "per_device_train_batch_size": 4, "max_steps": 4},
        **{"learning_rate": 0.02, "lr_scheduler_type": "constant", "max_grad_norm": 0, "weight_decay": 0.0},
    }


@pytest.mark.parametrize("kind", ["sigmoid", *(pytest.param(k, marks=pytest.mark.slow) for k in ("hinge", "ipo"))])
def test_each_step_is_trls(train: Train, metrics: Metrics, tmp_path: Path, as_trl: dict[str, Any], kind: str) -> None:
    """Losses, rewards, margins and log-probabilities of four steps of a LoRA, and where it ends."""
    train("out", dpo_loss_type=kind, dpo_beta=TRL["runs"][kind]["beta"], **as_trl)
    lines = [line for line in metrics(tmp_path / "out") if "loss" in line]
    for line, expected in zip(lines, TRL["runs"][kind]["steps"], strict=True):
        for name in ("loss", "grad_norm", *VALUES):
            assert line[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-4), (line["step"], name)
    if kind == "sigmoid":
        ours, theirs = (
            load_file(tmp_path / "out" / "adapter_model.safetensors"),
            load_file(FIXTURES / "dpo_end.safetensors"),
        )
        assert set(ours) == set(theirs)
        for name, values in theirs.items():
            np.testing.assert_allclose(ours[name], values, atol=2e-4, rtol=0, err_msg=name)


def of_all(as_trl: dict[str, Any]) -> dict[str, Any]:
    """Those of the run without an adapter."""
    kept = {name: value for name, value in as_trl.items() if name != "lora_path"}
    return {**kept, "plugin": ["dpo"], "learning_rate": TRL["whole"]["learning_rate"]}


def test_each_step_of_a_whole_model_is_trls(
    train: Train, metrics: Metrics, tmp_path: Path, as_trl: dict[str, Any], base_model: Path
) -> None:
    """Beside a copy of it as it was, which costs what the weights do."""
    said: list[str] = []
    train("out", say=said.append, **of_all(as_trl))
    size = sum(array.nbytes for array in load_file(base_model / "model.safetensors").values())
    assert f"dpo: the model stays as it is now beside the one that trains, {size / 2**20:,.0f} MiB more" in "\n".join(
        said
    )
    lines = [line for line in metrics(tmp_path / "out") if "loss" in line]
    for line, expected in zip(lines, TRL["whole"]["steps"], strict=True):
        for name in ("loss", "grad_norm", *VALUES):
            assert line[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-4), (line["step"], name)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for name, values in load_file(FIXTURES / "dpo_whole_end.safetensors").items():
        np.testing.assert_allclose(ours[name], values, atol=2e-4, rtol=0, err_msg=name)


@pytest.mark.slow
def test_a_whole_model_goes_on_to_the_bit(
    train: Train, metrics: Metrics, tmp_path: Path, as_trl: dict[str, Any], base_model: Path
) -> None:
    """Compared with what it was before the first step, not with what it is at the checkpoint."""
    settings = {**of_all(as_trl), "save_strategy": "steps", "save_steps": 2}
    train("whole", **settings)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    train("again", resume_from_checkpoint=checkpoint, **settings)
    assert metrics(tmp_path / "again", same=True) == metrics(tmp_path / "whole", same=True)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    shutil.copytree(base_model, tmp_path / "moved")
    tensors = load_file(base_model / "model.safetensors")
    save_file(
        {**tensors, "model.norm.weight": tensors["model.norm.weight"] * 2}, tmp_path / "moved" / "model.safetensors"
    )
    settings |= {"model_name_or_path": str(tmp_path / "moved"), "resume_from_checkpoint": checkpoint}
    with pytest.raises(sft.UsageError, match=r"The checkpoint compares with another model than .*moved is now"):
        train("other", **settings)


@pytest.mark.slow
@needs("parallel-4d")
def test_on_paper_the_copy_is_there(base_model: Path, as_trl: dict[str, Any]) -> None:
    from sft_parallel_4d.paper import outline

    settings = {"model_name_or_path": str(base_model), "plugin": ["dpo"]}
    (total, trains), (plain, _) = outline(settings).outline.count(), outline({**settings, "plugin": []}).outline.count()
    assert (total, trains) == (2 * plain, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        {"plugin": ["dpo", "lora", "greedy-zero-padding"], "max_length": 60},  # a row of the longest pair
        {"plugin": ["dpo", "lora", "zero-padding", "flashmask"], "max_length": 200},  # rows of several
        {"recompute": True},
        {"lazy": True},
        {"dataset_num_proc": 2},
    ],
    ids=["single", "uneven", "packed", "flashmask", "recompute", "lazy", "processes"],
)
def test_pairs_may_be_divided_packed_and_streamed(
    train: Train, metrics: Metrics, tmp_path: Path, as_trl: dict[str, Any], layout: dict[str, Any]
) -> None:
    """The same steps, however the four pairs of each become batches."""
    train("out", **{**as_trl, "max_steps": 3, "do_eval": False, **layout})
    lines = metrics(tmp_path / "out")
    for line, expected in zip(lines, TRL["runs"]["sigmoid"]["steps"][:3], strict=True):
        for name in ("loss", *VALUES):
            assert line[name] == pytest.approx(expected[name], rel=5e-4, abs=5e-4), (line["step"], name)


@pytest.mark.slow
def test_dev_pairs_are_measured_as_the_objective_and_as_cross_entropy(
    train: Train, metrics: Metrics, tmp_path: Path, as_trl: dict[str, Any]
) -> None:
    """Those before the third step are TRL's of it, in training; nothing is drawn here."""
    summary = train("out", **{**as_trl, "max_steps": 2})
    before, *_, after = metrics(tmp_path / "out")
    expected = TRL["runs"]["sigmoid"]["steps"]
    assert before["eval_objective"] == pytest.approx(np.log(2))
    assert before["eval_rewards/margins"] == 0.0
    assert after["eval_objective"] == pytest.approx(expected[2]["loss"], rel=2e-4)
    for name in VALUES:
        assert after[f"eval_{name}"] == pytest.approx(expected[2][name], rel=2e-4, abs=2e-4)
    targets = summary.data["dev"]["target_tokens"]
    nats = -4 * (expected[2]["logps/chosen"] + expected[2]["logps/rejected"])
    assert after["eval_loss"] == pytest.approx(nats / targets, rel=2e-4)


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit(train: Train, metrics: Metrics, tmp_path: Path, as_trl: dict[str, Any]) -> None:
    settings = {**as_trl, "lora_path": None, "lora_rank": 2, "lora_dropout": 0.3, "neftune_noise_alpha": 5.0}
    settings |= {"plugin": ["dpo", "lora", "neftune"], "save_strategy": "steps", "save_steps": 2}
    settings |= {"per_device_train_batch_size": 3}
    train("whole", **settings)
    train("again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"), **settings)
    assert metrics(tmp_path / "again", same=True) == metrics(tmp_path / "whole", same=True)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "again"))
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    settings |= {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-2"), "dpo_beta": 0.2}
    with pytest.raises(sft.UsageError, match="dpo_beta"):
        train("other", **settings)


@pytest.mark.slow
def test_encoded_pairs_are_kept(train: Train, metrics: Metrics, tmp_path: Path, as_trl: dict[str, Any]) -> None:
    said: list[str] = []
    settings = {**as_trl, "max_steps": 1, "encoded_cache": str(tmp_path / "kept")}
    train("first", **settings)
    train("again", say=said.append, **settings)
    assert any("read encoded" in line for line in said)
    assert metrics(tmp_path / "again", same=True) == metrics(tmp_path / "first", same=True)


@pytest.mark.slow
def test_gradients_in_16_bits_are_those_of_float32(train: Train, metrics: Metrics, tmp_path: Path, as_trl: Any) -> None:
    """bfloat16 holds 8 bits: the norm of the first step's gradient, whose factors are ±β/2 over 4 pairs."""
    train("out", **{**as_trl, "max_steps": 1, "bf16": True})
    [line] = [line for line in metrics(tmp_path / "out") if "loss" in line]
    assert line["loss"] == pytest.approx(np.log(2), rel=0.02)
    assert line["grad_norm"] == pytest.approx(TRL["runs"]["sigmoid"]["steps"][0]["grad_norm"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter", [pytest.param(one, marks=needs(*one.split())) for one in ADAPTERS], ids=lambda one: one.replace(" ", "+")
)
def test_every_adapter_begins_as_its_reference(
    train: Train, metrics: Metrics, tmp_path: Path, as_trl: dict[str, Any], adapter: str
) -> None:
    """Its loss is log 2 to begin with, whatever holds the base, and margins grow."""
    settings = {**as_trl, "plugin": ["dpo", *adapter.split()]}
    del settings["lora_path"]
    train("out", **settings)
    lines = [line for line in metrics(tmp_path / "out") if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(np.log(2), rel=1e-4)
    assert 0 < lines[1]["rewards/margins"] < lines[3]["rewards/margins"]
    assert lines[3]["loss"] < lines[1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("kind", LOSSES)
def test_derivatives_are_those_of_the_loss(kind: str) -> None:
    """Against central differences, on both sides of the hinge."""
    chosen, rejected = np.array([3.0, -8.0, 40.0, 0.5]), np.array([-9.0, 7.0, -50.0, 0.25])
    tokens = np.array([3.0, 9.0, 1.0, 5.0]), np.array([2.0, 4.0, 1.0, 8.0])

    def of(c: np.ndarray, r: np.ndarray) -> np.ndarray:
        return LOSSES[kind](Answers(c, r, *tokens), 0.1)[0]

    _, *slopes = LOSSES[kind](Answers(chosen, rejected, *tokens), 0.1)
    step = 1e-5
    expected = (of(chosen + step, rejected) - of(chosen - step, rejected)) / (2 * step)
    np.testing.assert_allclose(slopes[0], expected, atol=1e-8, rtol=1e-6)
    expected = (of(chosen, rejected + step) - of(chosen, rejected - step)) / (2 * step)
    np.testing.assert_allclose(slopes[1], expected, atol=1e-8, rtol=1e-6)


def test_margins_far_apart_neither_overflow_nor_vanish() -> None:
    far = Answers(np.array([1e4, -1e4]), np.array([-1e4, 1e4]), np.ones(2), np.ones(2))
    loss, slope, _ = LOSSES["sigmoid"](far, 0.1)
    assert loss == pytest.approx([0.0, 2000.0])
    assert slope == pytest.approx([0.0, -0.1])


# --- records ------------------------------------------------------------------------------------------------


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


LAYOUTS: dict[str, dict[str, Any]] = {
    "TRL, texts": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "TRL, messages": {"prompt": [user("q")], "chosen": [bot("good")], "rejected": [bot("bad")]},
    "TRL, without a prompt": {"chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")]},
    "UltraFeedback": {
        **{"prompt": "q", "messages": [user("q"), bot("good")], "score_chosen": 8.0},
        **{"chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")]},
    },
    "Orca": {"system": None, "question": "q", "chosen": "good", "rejected": "bad"},
    "text and messages": {"prompt": "q", "chosen": [bot("good")], "rejected": [bot("bad")]},
    "LLaMA-Factory, Alpaca": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    "LLaMA-Factory, ShareGPT": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "ms-swift": {"messages": [user("q")], "chosen": bot("good"), "rejected": bot("bad")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_as_one_pair(layout: str) -> None:
    pair = pair_of(LAYOUTS[layout])
    [rejected] = pair.beside
    for found, answer in ((pair, "good"), (rejected, "bad")):
        assert [(turn.role, turn.content, turn.trains) for turn in found] == [
            ("user", "q", False),
            ("assistant", answer, True),
        ]


def test_only_what_differs_is_learned() -> None:
    """Of several answers those that both have are none of it; system and tools come along."""
    before = [user("q"), bot("yes"), user("r")]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    pair = pair_of({"chosen": [*before, bot("good")], "rejected": [*before, bot("bad")], "system": "s", "tools": tools})
    for found in pair.together:
        assert [turn.trains for turn in found] == [False, False, False, False, True]
        assert found[0].content == "s"
        assert found.tools == tuple(tools)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"src": "q", "tgt": "a"}, 'the record has no "chosen" (its keys: src, tgt)'),
        ({"prompt": "q", "chosen": "a"}, 'the record has no "rejected"'),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "weight": 2}, 'has no "weight"'),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, '"rejected" must be text or a list of messages, not 3'),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "empty"),
        (
            {"chosen": "Human: q Assistant: a", "rejected": "b"},
            "two answers and no question (its keys: chosen, rejected)",
        ),
        ({"prompt": [user("q")], "chosen": [bot("a") | {"weight": 2}], "rejected": [bot("b")]}, "has a weight"),
        ({"prompt": [user("q")], "chosen": [user("a")], "rejected": [bot("b")]}, '"chosen" holds no answer'),
    ],
)
def test_a_record_that_is_no_pair_is_refused(record: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        pair_of(record)
    assert said in str(caught.value)


NUMBERS = strategies.one_of(strategies.booleans(), strategies.integers(-3, 3), strategies.floats(allow_subnormal=False))
ROLES = strategies.sampled_from(["user", "assistant", "gpt", "system"])
LEAVES = strategies.one_of(strategies.none(), NUMBERS, strategies.text(max_size=3), ROLES)
MESSAGES = strategies.dictionaries(strategies.sampled_from(["role", "content", "from", "value", "weight"]), LEAVES)
VALUE = strategies.one_of(LEAVES, MESSAGES, strategies.lists(strategies.one_of(MESSAGES, LEAVES), max_size=3))
KEYS = ["chosen", "rejected", "prompt", "messages", "conversations", "instruction", "system", "tools"]


@pytest.mark.slow
@hypothesis.settings(  # on a machine that does other work too
    max_examples=100, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
@hypothesis.given(strategies.sampled_from(sorted(LAYOUTS)), strategies.sampled_from(KEYS), VALUE)
def test_whatever_a_record_holds_it_is_a_pair_or_a_bad_record(layout: str, key: str, value: Any) -> None:
    pair, said = None, "-"
    try:
        pair = pair_of({**LAYOUTS[layout], key: value})
    except ValueError as error:
        said = str(error)
    assert said
    assert "\n" not in said
    if pair is not None:
        assert all(any(turn.trains for turn in one) for one in pair.together)
        assert len(pair.beside) == 1


def test_a_place_is_named(train: Train, tmp_path: Path, as_trl: dict[str, Any]) -> None:
    data = write_data(tmp_path / "mixed", [TRL["pairs"][0], {"src": "a", "tgt": "b"}])
    with pytest.raises(sft.UsageError, match=r"train.json, line 2: the record has no \"chosen\""):
        train("out", **{**as_trl, "dataset_name_or_path": str(data)})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train_on": "everything"}, "dpo compares answers, and train_on everything"),
        (
            {"plugin": ["dpo", "lora", "z-loss"]},
            "cannot work together; leave one of them out",
        ),
        ({"truncation": "split"}, "truncation split divides a record into rows"),
    ],
)
def test_what_cannot_be_is_refused(train: Train, as_trl: dict[str, Any], settings: dict[str, Any], said: str) -> None:
    given = {key: value for key, value in {**as_trl, **settings}.items() if value is not None}
    with pytest.raises(sft.UsageError) as caught:
        train("out", **given)
    assert said in str(caught.value)

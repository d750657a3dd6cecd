"""Whole runs on a tiny model: what is learned does not depend on how it is batched, logged or repeated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.seams import Example, Turn

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]

needs_lora = pytest.mark.skipif(find_spec("sft_peft_lora") is None, reason="plugin lora is not installed")
KINDS = [pytest.param({}, id="full"), pytest.param({"plugin": ["lora"]}, id="lora", marks=needs_lora)]

STEP_KEYS = {
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "seconds",
    "tokens",
    "target_tokens",
    "padding_tokens",
    "peak_memory_mib",
}
EVALUATION_KEYS = {"step", "epoch", "eval_loss", "eval_ppl", "eval_accuracy", "eval_seconds", "eval_tokens"}


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


def largest_difference(first: Path, second: Path) -> float:
    one, other = weights_of(first), weights_of(second)
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def steps_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "loss" in line]


def catching(caught: list[Any]) -> type[sft.Plugin]:
    """A plugin that hands the run out of it."""

    class Catch(sft.Plugin):
        name = "catch"

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            caught.append(run)

    return Catch


def full_logits_loss(folder: Path, examples: list[Example]) -> float:
    """Mean loss a target token: each example alone through PaddleNLP's own forward, log-softmax in float64."""
    import paddle

    from sft.models.loading import load_model, open_model

    model = load_model(open_model(folder))
    total, targets = 0.0, 0
    for example in examples:
        ids = paddle.to_tensor(example.input_ids[None])
        with paddle.no_grad():
            found = model(input_ids=ids, attention_mask=paddle.ones_like(ids))
        logits = (found[0] if isinstance(found, tuple) else found).numpy()[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.nonzero(example.labels != -100)[0]
        total -= log_softmax[places, example.labels[places]].sum()
        targets += len(places)
    return total / targets


# --- batches ------------------------------------------------------------------------------------------------


class MeanOfMeans(sft.Plugin):
    """The bug that every trainer had: each micro-batch counts alike, however many targets it has."""

    name = "mean-of-means"

    @sft.hookimpl
    def sft_parallel_strategy(self, run: sft.Run) -> Any:
        from sft.training.strategy import SingleProcess, batch_loss

        class Strategy(SingleProcess):
            def backward(self, model: Any, batches: Any, loss_scale: float) -> float:
                total = 0.0
                for batch in batches:
                    loss = batch_loss(model, batch)
                    (loss / (batch.target_tokens * len(batches))).backward()
                    total += float(loss)
                return total

        return Strategy(run)


BATCHES = {"4x1": (4, 1), "2x2": (2, 2), "1x4": (1, 4)}


def train_batched(train: Train, **settings: Any) -> None:
    """The same 4 rows a step in three ways, for 3 steps, into folders named after them."""
    for name, (rows, micro_batches) in BATCHES.items():
        train(
            name,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=micro_batches,
            max_steps=3,
            do_eval=False,
            **settings,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_gives_what_one_batch_gives(
    train: Train, metrics: Metrics, tmp_path: Path, kind: dict[str, Any]
) -> None:
    """Rates of 1e-3 move weights by up to 3e-3 in 3 steps; summing in another order is float32 noise."""
    train_batched(train, **kind)
    expected = metrics(tmp_path / "4x1")
    for name in ("2x2", "1x4"):
        found = metrics(tmp_path / name)
        assert [line["target_tokens"] for line in found] == [line["target_tokens"] for line in expected]
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-5)
        assert largest_difference(tmp_path / name, tmp_path / "4x1") < 1e-5


def test_a_mean_of_means_would_give_something_else(train: Train, tmp_path: Path) -> None:
    """The control of the test above: with these records the bug is seen, ten times over its tolerance."""
    train_batched(train, plugins=(MeanOfMeans,))
    assert largest_difference(tmp_path / "1x4", tmp_path / "4x1") > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_repeats_itself_bit_by_bit(train: Train, metrics: Metrics, tmp_path: Path, kind: dict[str, Any]) -> None:
    for name, seed in (("first", 7), ("second", 7), ("other", 8)):
        train(name, num_train_epochs=2, per_device_train_batch_size=4, seed=seed, **kind)
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    assert metrics(first, same=True) == metrics(second, same=True)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in set(names) - {"metrics.jsonl", "run.json"}:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert [line["loss"] for line in steps_of(metrics(other))] != [line["loss"] for line in steps_of(metrics(first))]


@needs_lora
def test_a_run_inside_a_run_disturbs_neither(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    """One run stops between two steps while another, with another plugin, model and seed, runs from end to end."""

    class Interrupt(sft.Plugin):
        name = "interrupt"

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] == 2:
                inner("inside")

    def outer(name: str, plugins: tuple[type, ...] = ()) -> None:
        train(name, plugins, plugin=["lora"], lora_dropout=0.2, max_steps=4, evaluation_strategy="steps")

    def inner(name: str) -> None:
        train(name, max_steps=3, seed=5, learning_rate=3e-3)

    outer("outer-alone")
    inner("inner-alone")
    outer("outer", (Interrupt,))
    for found, expected in (("outer", "outer-alone"), ("inside", "inner-alone")):
        assert metrics(tmp_path / found, same=True) == metrics(tmp_path / expected, same=True)
        assert largest_difference(tmp_path / found, tmp_path / expected) == 0.0


def test_draws_of_a_step_are_a_function_of_seed_step_and_rank(paddle: Any) -> None:
    """Each of the three matters, and what was drawn before does not."""
    from sft.training.loop import seed_step

    def draw(*where: int) -> bytes:
        seed_step(*where)
        return paddle.rand([8]).numpy().tobytes()

    places = [(seed, step, rank) for seed in (1, 2) for step in (1, 2, 3) for rank in (0, 1)]
    first = [draw(*place) for place in places]
    assert len(set(first)) == len(places)
    assert [draw(*place) for place in reversed(places)] == first[::-1]


# --- what comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied"])
def test_full_training_lowers_the_loss_and_writes_a_model_that_loads(
    train: Train, models: Path, tmp_path: Path, case: str
) -> None:
    """The dev loss before and after is that of full logits, without batches, padding or chunks: 1e-5 of about 7."""
    caught: list[sft.Run] = []
    summary = train(plugins=(catching(caught),), model_name_or_path=str(models / case), per_device_eval_batch_size=3)
    examples = [caught[0].dev_data[index] for index in range(7)]
    assert summary.eval_loss_before == pytest.approx(full_logits_loss(models / case, examples), rel=1e-5)
    assert summary.eval_loss_after == pytest.approx(full_logits_loss(tmp_path / "out", examples), rel=1e-5)
    assert summary.eval_loss_after < summary.eval_loss_before - 1
    assert summary.train_loss_last < summary.train_loss_first - 1
    assert summary.trainable_parameters == summary.total_parameters
    original, written = weights_of(models / case), weights_of(tmp_path / "out")
    assert {n: (t.shape, t.dtype) for n, t in written.items()} == {n: (t.shape, t.dtype) for n, t in original.items()}
    assert all(np.any(written[name] != original[name]) for name in original)
    assert summary.total_parameters == sum(tensor.size for tensor in original.values())


def test_steps_and_epochs_are_counted(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    """30 records in rows of 8 are 4 steps an epoch; one and a half epochs are 6."""
    summary = train(num_train_epochs=1.5)
    lines = steps_of(metrics(tmp_path / "out"))
    assert (summary.steps, summary.epochs) == (6, 1.5)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3 * (6 - step) / 6 for step in range(6)])


def test_a_line_has_these_keys_and_no_others(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    train(max_steps=4, evaluation_strategy="steps", eval_steps=2)
    lines = metrics(tmp_path / "out")
    kinds = [("evaluation" if "eval_loss" in line else "step", line["step"]) for line in lines]
    assert kinds == [
        ("evaluation", 0),
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
        ("step", 3),
        ("step", 4),
        ("evaluation", 4),
    ]
    for line, (kind, _) in zip(lines, kinds, strict=True):
        assert set(line) == (STEP_KEYS if kind == "step" else EVALUATION_KEYS)
    assert all(line["peak_memory_mib"] > 0 and line["seconds"] >= 0 for line in steps_of(lines))


def test_windows_of_several_steps_add_up_to_the_data(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    """Two epochs of 10 steps, a line every 3: the first, 3, 6 ... 18 and the last."""
    caught: list[sft.Run] = []
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 3}
    summary = train("windows", (catching(caught),), logging_steps=3, **settings)
    train("steps", **settings)
    lines, single = (steps_of(metrics(tmp_path / name)) for name in ("windows", "steps"))
    assert [line["step"] for line in lines] == [1, 3, 6, 9, 12, 15, 18, 20]
    data = caught[0].train_data
    assert sum(line["tokens"] for line in lines) == 2 * int(data.lengths.sum()) == summary.tokens
    targets = sum(int((data[index].labels != -100).sum()) for index in range(30))
    assert sum(line["target_tokens"] for line in lines) == 2 * targets == summary.target_tokens
    start = 0
    for line in lines:
        window = single[start : line["step"]]
        start = line["step"]
        total = sum(each["loss"] * each["target_tokens"] for each in window)
        assert line["loss"] == pytest.approx(total / sum(each["target_tokens"] for each in window), rel=1e-12)
        for key in ("tokens", "target_tokens", "padding_tokens"):
            assert line[key] == sum(each[key] for each in window)
        for key in ("learning_rate", "grad_norm", "epoch"):
            assert line[key] == window[-1][key]
    assert (summary.train_loss_first, summary.train_loss_last) == (lines[0]["loss"], lines[-1]["loss"])


def test_padding_is_what_fills_the_rows(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    batches: list[sft.Batch] = []

    class Watch(sft.Plugin):
        name = "watch"

        @sft.hookimpl
        def sft_collator(self, run: sft.Run) -> Any:
            from sft.data.batches import PaddedCollator

            class Collator(PaddedCollator):
                def batch(self, rows: Any) -> sft.Batch:
                    batches.append(super().batch(rows))
                    return batches[-1]

            return Collator(run.tokenizer.pad_id)

    train("out", (Watch,), max_steps=3, per_device_train_batch_size=5, do_eval=False)
    for batch, line in zip(batches, metrics(tmp_path / "out"), strict=True):
        lengths = [sum(row) for row in batch.lengths]
        assert len(lengths) == 5
        assert line["tokens"] == sum(lengths)
        assert line["padding_tokens"] == 5 * max(lengths) - sum(lengths) > 0
    train("single", max_steps=3, per_device_train_batch_size=1, do_eval=False)
    assert [line["padding_tokens"] for line in metrics(tmp_path / "single")] == [0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"evaluation_strategy": "steps", "eval_steps": 3}, [0, 3, 6, 8]),
        ({"evaluation_strategy": "steps", "logging_steps": 4}, [0, 4, 8]),
        ({"evaluation_strategy": "epoch"}, [0, 4, 8]),
        ({}, [0, 8]),
        ({"do_eval": False}, []),
    ],
    ids=["steps", "logging-steps", "epoch", "before-and-after", "never"],
)
def test_evaluation_comes_when_it_was_asked_for(
    train: Train, metrics: Metrics, tmp_path: Path, settings: dict[str, Any], steps: list[int]
) -> None:
    summary = train(num_train_epochs=2, **settings)
    lines = [line for line in metrics(tmp_path / "out") if "eval_loss" in line]
    assert [line["step"] for line in lines] == steps
    if steps:
        assert summary.eval_loss_before == lines[0]["eval_loss"]
        assert summary.eval_loss_after == lines[-1]["eval_loss"]
        assert len({line["eval_loss"] for line in lines}) == len(steps)
    else:
        assert (summary.eval_loss_before, summary.eval_loss_after) == (None, None)


def test_evaluation_does_not_change_training(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    train("with", max_steps=5, evaluation_strategy="steps", num_samples=1, max_new_tokens=4)
    train("without", max_steps=5, do_eval=False)
    found, expected = (steps_of(metrics(tmp_path / name, same=True)) for name in ("with", "without"))
    assert found == expected
    assert largest_difference(tmp_path / "with", tmp_path / "without") == 0.0


def test_run_json_tells_what_was_run(train: Train, models: Path, dataset: Path, tmp_path: Path) -> None:
    class Idle(sft.Plugin):
        name = "idle"

    summary = train(plugins=(Idle,), max_steps=2, seed=9)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert set(record) == {"status", "started", "settings", "plugins", "packages", "machine", "result"}
    assert record["status"] == "finished"
    assert record["settings"]["seed"] == 9
    assert record["settings"]["weight_decay"] == 0.0  # defaults are written too
    assert record["settings"]["model_name_or_path"] == str(models / "llama-tied-gqa")
    assert record["plugins"] == {"idle": f"given directly as {Idle.__qualname__}"}
    assert record["packages"]["paddlepaddle"] == version("paddlepaddle")
    assert set(record["machine"]) == {"system", "python", "cpu", "cores", "device", "threads"}
    assert record["result"] == json.loads(json.dumps(summary.as_dict()))
    assert record["result"]["data"]["train"]["records"] == 30
    assert record["result"]["data"]["dev"]["records"] == 7
    assert record["result"]["steps"] == 2


def test_run_json_says_while_a_run_is_not_finished(train: Train, tmp_path: Path) -> None:
    found = []

    class Look(sft.Plugin):
        name = "look"

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            found.append(json.loads((run.output_dir / "run.json").read_text()))
            assert sorted(path.name for path in run.output_dir.iterdir()) == ["metrics.jsonl", "run.json"]

    train(plugins=(Look,), max_steps=1)
    assert [record["status"] for record in found] == ["running"]
    assert "result" not in found[0]


# --- clipping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.5, 2.0, 1e6, 0.0])
def test_clipping_is_by_the_global_norm(paddle: Any, max_norm: float) -> None:
    from sft.training.strategy import SingleProcess

    generator = np.random.default_rng(8)
    gradients = [generator.standard_normal(shape).astype(np.float32) for shape in ((5, 3), (7,), (1,))]
    parameters = [paddle.create_parameter(gradient.shape, "float32") for gradient in gradients]
    idle = paddle.create_parameter([2], "float32")
    paddle.add_n([(p * paddle.to_tensor(g)).sum() for p, g in zip(parameters, gradients, strict=True)]).backward()
    found = SingleProcess(None).clip([*parameters, idle], max_norm)
    norm = np.sqrt(sum((gradient.astype(np.float64) ** 2).sum() for gradient in gradients))
    factor = min(1.0, max_norm / norm) if max_norm else 1.0
    assert found == pytest.approx(norm, rel=1e-6)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        np.testing.assert_allclose(parameter.grad.numpy(), gradient * factor, rtol=1e-6)
    assert idle.grad is None


def test_without_gradients_the_norm_is_zero(paddle: Any) -> None:
    from sft.training.strategy import SingleProcess

    assert SingleProcess(None).clip([paddle.create_parameter([2], "float32")], 1.0) == 0.0


def test_a_run_steps_with_the_clipped_gradients(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    """With an epsilon that outweighs the gradients, AdamW's first step is rate·g/ε: it shrinks as they do."""
    settings = {"max_steps": 1, "adam_epsilon": 100.0, "learning_rate": 1.0, "do_eval": False}
    train("free", max_grad_norm=0, **settings)
    train("clipped", max_grad_norm=0.5, **settings)
    (norm,), (same,) = ([line["grad_norm"] for line in metrics(tmp_path / name)] for name in ("free", "clipped"))
    assert norm == same > 0.5  # what is written down is the norm before clipping
    original = Path(json.loads((tmp_path / "free" / "run.json").read_text())["settings"]["model_name_or_path"])
    start = weights_of(original)
    free, clipped = ({n: t - start[n] for n, t in weights_of(tmp_path / f).items()} for f in ("free", "clipped"))
    ratio = sum((clipped[n] * free[n]).sum() for n in free) / sum((free[n] ** 2).sum() for n in free)
    assert ratio == pytest.approx(0.5 / norm, rel=1e-2)


# --- samples ------------------------------------------------------------------------------------------------


def test_samples_are_answers_before_and_after(train: Train, models: Path, dataset: Path, tmp_path: Path) -> None:
    from sft.data.tokenizer import Tokenizer
    from sft.models.generation import answer
    from sft.models.loading import load_model, open_model
    from sft.settings import GenerationArguments

    summary = train(num_samples=2, max_new_tokens=6)
    records = [json.loads(line) for line in (dataset / "dev.json").read_text().splitlines()][:2]
    assert [(s["prompt"], s["reference"]) for s in summary.samples] == [(r["src"], r["tgt"]) for r in records]
    for when, folder in (("before", models / "llama-tied-gqa"), ("after", tmp_path / "out")):
        model, tokenizer = load_model(open_model(folder)), Tokenizer(folder)
        for sample in summary.samples:
            turns = [Turn("user", sample["prompt"])]
            assert sample[when] == answer(model, tokenizer, turns, GenerationArguments(max_new_tokens=6), seed=0)
    assert any(sample["before"] != sample["after"] for sample in summary.samples)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["result"]["samples"] == summary.samples


def test_without_dev_data_samples_come_from_the_training_data(
    train: Train, metrics: Metrics, dataset: Path, tmp_path: Path
) -> None:
    summary = train(dataset_name_or_path=str(dataset / "train.json"), num_samples=1, max_new_tokens=2, max_steps=1)
    first = json.loads((dataset / "train.json").read_text().splitlines()[0])
    assert [(s["prompt"], s["reference"]) for s in summary.samples] == [(first["src"], first["tgt"])]
    assert summary.eval_loss_after is None
    assert len(metrics(tmp_path / "out")) == 1


# --- the output folder, and what is refused ---------------------------------------------------------------


@needs_lora
def test_overwriting_removes_the_old_run_and_nothing_else(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(max_steps=2, save_strategy="steps", save_steps=1)
    (out / "notes.txt").write_text("mine")
    (out / "checkpoint-notes").mkdir()
    (out / "checkpoint-notes" / "more.txt").write_text("mine too")
    assert {path.name for path in out.iterdir()} >= {"model.safetensors", "config.json", "checkpoint-1", "checkpoint-2"}
    train(max_steps=1, plugin=["lora"], overwrite_output_dir=True)
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    written = {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "run.json"}
    kept = {"notes.txt", "checkpoint-notes/more.txt"}
    assert left - {"generation_config.json"} == tokenizer | written | kept
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    assert (out / "notes.txt").read_text() == "mine"


def test_a_folder_that_holds_a_run_is_left_alone(train: Train, tmp_path: Path) -> None:
    train(max_steps=1)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(sft.UsageError, match=r"already holds a run; choose another folder, .*--overwrite_output_dir"):
        train(max_steps=1)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*")} == before


def test_the_models_own_folder_is_no_output(train: Train, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llama-tied-gqa", tmp_path / "model")
    with pytest.raises(sft.UsageError, match=r"contains model_name_or_path .* which would be overwritten"):
        train("model", model_name_or_path=str(tmp_path / "model"), overwrite_output_dir=True)


def test_a_file_is_no_output(train: Train, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(sft.UsageError, match="is a file; give a folder"):
        train()


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name_or_path", "output_dir"])
def test_what_a_run_needs_is_asked_for(tmp_path: Path, models: Path, dataset: Path, name: str) -> None:
    settings = {
        "model_name_or_path": str(models / "llama-tied-gqa"),
        "dataset_name_or_path": str(dataset),
        "output_dir": str(tmp_path / "out"),
    }
    del settings[name]
    with pytest.raises(sft.UsageError, match=f"{name} is not set; add --{name} VALUE"):
        sft.run(settings)


def refused(train: Train, tmp_path: Path, message: str, **settings: Any) -> None:
    """Refused, and nothing has been written."""
    with pytest.raises(sft.UsageError, match=message):
        train(**settings)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(train: Train, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "llama-untied", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models / "llama-tied-gqa" / name, folder)
    refused(train, tmp_path, "its tokenizer has 320 tokens, its model 128", model_name_or_path=str(folder))


def test_records_longer_than_the_models_positions_are_refused(train: Train, models: Path, tmp_path: Path) -> None:
    data = tmp_path / "long.json"
    data.write_text(json.dumps({"src": "a b c " * 30, "tgt": "d e f"}))
    message = r"longest record has \d+ tokens and .* reads 64 \(max_position_embeddings\)"
    refused(train, tmp_path, message, dataset_name_or_path=str(data))


def test_evaluation_without_dev_data_is_refused(train: Train, dataset: Path, tmp_path: Path) -> None:
    data = str(dataset / "train.json")
    refused(train, tmp_path, "Evaluation is asked for", dataset_name_or_path=data, evaluation_strategy="epoch")
    refused(train, tmp_path, "Evaluation is asked for", dataset_name_or_path=data, do_eval=True)


def test_settings_can_come_from_a_file(paddle: Any, models: Path, dataset: Path, tmp_path: Path) -> None:
    said: list[str] = []
    values = {
        "model_name_or_path": str(models / "llama-tied-gqa"),
        "dataset-name-or-path": str(dataset),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
    }
    (tmp_path / "run.json").write_text(json.dumps(values))
    summary = sft.run(tmp_path / "run.json", say=said.append)
    assert summary.steps == 1
    assert summary.output_dir == tmp_path / "out"
    assert any(line.startswith("train data: 30 records") for line in said)

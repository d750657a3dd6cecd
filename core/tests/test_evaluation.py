"""Evaluation: perplexity, accuracy and answers of the dev data, in a run and of a finished model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.inference.evaluate import evaluate_finished
from sft.inference.open import load_for_inference
from sft.testing import forward
from sft.training import answer_scores as measures

Train = Callable[..., sft.Summary]
GENERATES = {"eval_with_do_generation": True, "max_new_tokens": 8}


class Catch(sft.Plugin):
    """Keeps the run, and what evaluations found."""

    name = "catch"
    api_version = 1
    runs: list[sft.Run] = []
    records: list[dict[str, Any]] = []

    @sft.hookimpl
    def sft_run_started(self, run: sft.Run) -> None:
        self.runs[:] = [run]

    @sft.hookimpl
    def sft_evaluated(self, run: sft.Run, record: dict[str, Any]) -> None:
        self.records.append(record)


@pytest.fixture(autouse=True)
def _forget() -> None:
    Catch.runs.clear()
    Catch.records.clear()


def quiet(text: str) -> None:
    pass


def evaluate(model: Path, dataset: Path, adapter: Path | None = None, **given: Any) -> dict[str, Any]:
    generations = given.pop("generations", None)
    requested = given.pop("plugins", ())
    values = {"model_name_or_path": str(model), "dataset_name_or_path": str(dataset), **given}
    return evaluate_finished(values, adapter, quiet, requested, generations)


def loss_and_accuracy(folder: Path, run: sft.Run) -> tuple[float, float]:
    """From full logits, one record at a time, in float64."""
    model, _ = load_for_inference(str(folder), None, quiet)
    loss, correct, count = 0.0, 0, 0
    assert run.dev_data is not None
    (data,) = run.dev_data.sets.values()
    for index in range(len(data)):
        example = data[index]
        logits = forward(model, example.input_ids[None])[0].astype(np.float64)
        places = np.flatnonzero(example.labels != -100)
        labels = example.labels[places]
        log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        loss -= log_softmax[places, labels].sum()
        correct += int((logits[places].argmax(-1) == labels).sum())
        count += len(places)
    return loss / count, correct / count


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def without_time(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("eval_seconds", "step", "epoch")}


# --- in a run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied"])
def test_perplexity_and_accuracy(train: Train, models: Path, tmp_path: Path, case: str) -> None:
    train(plugins=(Catch,), model_name_or_path=str(models / case), max_steps=12, per_device_eval_batch_size=3)
    before, after = Catch.records
    for record, folder in ((before, models / case), (after, tmp_path / "out")):
        loss, accuracy = loss_and_accuracy(folder, Catch.runs[0])
        assert record["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert record["eval_ppl"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert record["eval_accuracy"] == accuracy
    assert 0 <= before["eval_accuracy"] < after["eval_accuracy"] < 1


def test_perplexity_does_not_overflow(train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A loss of 2,000 nats: JSON knows no infinity."""
    from sft.training.loss import target_scores as own

    measured = "sft.training.objective.target_scores"
    monkeypatch.setattr(measured, lambda *a: (2000.0 * int((a[1] != -100).sum()), own(*a)[1]))
    train(plugins=(Catch,), max_steps=1)
    assert Catch.records[0]["eval_loss"] == 2000.0
    assert 1e300 < Catch.records[0]["eval_ppl"] < math.inf
    monkeypatch.setattr(measured, lambda *a: (math.nan, 0))
    with pytest.raises(sft.SftError, match=r"The dev loss is not finite \(nan\); nothing has been learned yet"):
        train("again", max_steps=1)


def test_a_progress_line_shows_all_of_it(train: Train) -> None:
    said: list[str] = []
    train(plugins=(Catch,), say=said.append, max_steps=2, evaluation_strategy="steps", eval_steps=1, **GENERATES)
    record = Catch.records[1]
    shown = next(line for line in said if line.startswith("step 1/2  dev"))
    for name in ("loss", "accuracy", "bleu4", "rouge1", "rouge2", "rougel"):
        assert f"{name} {record[f'eval_{name}']:.4f}" in shown
    assert f"ppl {record['eval_ppl']:,.2f}" in shown


def test_answers_are_those_of_the_model_and_are_scored(train: Train, dataset: Path, tmp_path: Path) -> None:
    """The last file is what a model that is loaded again answers, one prompt at a time."""
    from sft.data.questions import encode_prompt
    from sft.models.generation import answers
    from sft.settings.arguments import GenerationArguments

    train(plugins=(Catch,), max_steps=4, evaluation_strategy="steps", eval_steps=2, **GENERATES)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("generations-*")) == [f"generations-{n}.jsonl" for n in (0, 2, 4)]
    model, tokenizer = load_for_inference(str(out), None, quiet)
    records = lines_of(dataset / "dev.json")
    for step, record in zip((0, 2, 4), Catch.records, strict=True):
        lines = lines_of(out / f"generations-{step}.jsonl")
        assert [(line["prompt"], line["reference"]) for line in lines] == [(r["src"], r["tgt"]) for r in records]
        found = measures.scores(measures.count([line["answer"] for line in lines], [r["tgt"] for r in records]))
        assert {name: record[f"eval_{name}"] for name in measures.ANSWER_SCORES} == found
    for line in lines:
        prompt = encode_prompt([sft.Turn("user", line["prompt"])], tokenizer)
        assert [line["answer"]] == answers(model, tokenizer, [prompt], GenerationArguments(max_new_tokens=8), 0)


def test_measuring_does_not_change_training(train: Train, metrics: Any, tmp_path: Path) -> None:
    """Evaluation with draws leaves the losses of every step as they are."""
    settings = {"max_steps": 4, "evaluation_strategy": "steps", "eval_steps": 1}
    train("plain", max_steps=4)
    train("measured", **settings, **GENERATES, top_k=0)
    plain, measured = ([r for r in metrics(tmp_path / n, same=True) if "loss" in r] for n in ("plain", "measured"))
    assert plain == measured


def test_the_last_answer_of_a_conversation_is_what_is_asked_for(train: Train, tmp_path: Path, models: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    line = json.dumps({"src": ["one", "two", "three"], "tgt": ["1", "2", "3"]})
    for name in ("train", "dev"):
        (folder / f"{name}.json").write_text(line)
    settings = {"dataset_name_or_path": str(folder), "max_steps": 1, **GENERATES, "max_new_tokens": 1}
    train(plugins=(Catch,), **settings)
    (question,) = Catch.runs[0].questions
    assert (question.prompt, question.reference) == ("three", "3")
    text = Catch.runs[0].tokenizer.decode(question.ids)
    assert all(word in text for word in ("one", "1", "two", "2", "three"))
    shorter = len(question.ids) - 1
    train("short", (Catch,), src_length=shorter, **settings)
    (question,) = Catch.runs[0].questions
    assert "one" not in Catch.runs[0].tokenizer.decode(question.ids)
    assert len(question.ids) <= shorter


def test_processes_share_the_questions(train: Train, tmp_path: Path) -> None:
    """Three strategies over the same run: their answers are those of one process, and so are the summed scores."""
    from sft.training.evaluation import dev_loss, score
    from sft.training.strategy import SingleProcess

    train(plugins=(Catch,), max_steps=1, per_device_eval_batch_size=2, **GENERATES)
    run = Catch.runs[0]
    alone = {**dev_loss(run), **score(run, tmp_path / "alone.jsonl")}
    sums: list[list[list[float]]] = []

    class Share(SingleProcess):
        data_world = 3
        is_main = False

        def __init__(self, rank: int) -> None:
            self.data_rank, self.sums = rank, []

        def sum(self, values: Any) -> list[float]:
            self.sums.append(list(values))
            return list(values)

    for rank in range(3):
        run.strategy = Share(rank)
        dev_loss(run)
        score(run, tmp_path / "shared.jsonl")
        sums.append(run.strategy.sums)  # type: ignore[attr-defined]
    (losses, counts) = (np.sum([one[kind] for one in sums], axis=0) for kind in (0, 1))
    assert losses[0] / losses[2] == pytest.approx(alone["eval_loss"], rel=1e-6)
    assert losses[1] / losses[2] == alone["eval_accuracy"]
    for name, value in measures.scores(list(counts)).items():
        assert value == pytest.approx(alone[f"eval_{name}"], rel=1e-12)
    lines = [lines_of(tmp_path / f"shared-rank-{rank}.jsonl") for rank in range(3)]
    assert [len(part) for part in lines] == [3, 2, 2]
    assert [lines[n % 3][n // 3] for n in range(7)] == lines_of(tmp_path / "alone.jsonl")
    run.strategy.is_first = False  # another process has the same share, and writes
    score(run, tmp_path / "again.jsonl")
    assert not list(tmp_path.glob("again*"))


def test_a_process_makes_the_batches_of_its_own_share_alone(train: Train) -> None:
    """Seven records in batches of two, of which the second of three processes has the second: records 2 and 3."""
    from sft.training.evaluation import dev_loss

    train(plugins=(Catch,), max_steps=1, per_device_eval_batch_size=2)
    run, made = Catch.runs[0], []
    assert run.dev_data is not None
    own = run.collator.batch
    run.collator.batch = lambda rows: made.append(rows) or own(rows)  # type: ignore[method-assign,func-returns-value]
    run.strategy.data_rank, run.strategy.data_world = 1, 3
    assert dev_loss(run)["eval_tokens"] == run.dev_data.tokens
    ((first,), (second,)) = made[0]
    assert len(made) == 1
    for example, index in ((first, 2), (second, 3)):
        np.testing.assert_array_equal(example.input_ids, next(iter(run.dev_data.sets.values()))[index].input_ids)


def test_loss_and_answers_are_computed_in_the_precision_of_the_run(train: Train) -> None:
    """The model goes forward in the run's autocast context, whatever that is, and nowhere else."""
    from contextlib import contextmanager

    from sft.training.evaluation import answer, dev_loss, score

    train(plugins=(Catch,), max_steps=1, num_samples=2, **GENERATES)
    run, within, seen = Catch.runs[0], [False], []

    class Precision:
        @contextmanager
        def autocast(self) -> Any:
            within[0] = True
            yield
            within[0] = False

    run.precision = Precision()  # type: ignore[assignment]
    run.model.model.register_forward_pre_hook(lambda layer, inputs: seen.append(within[0]))
    for compute in (lambda: dev_loss(run), lambda: score(run, None), lambda: answer(run, run.samples)):
        seen.clear()
        assert compute()
        assert seen
        assert all(seen)


def test_what_cannot_be_answered_is_refused_before_training(train: Train, tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(sft.UsageError, match="eval_with_do_generation answers dev data"):
        train(dataset_name_or_path=str(dataset / "train.json"), **GENERATES)
    with pytest.raises(sft.UsageError, match="do not fit into the model's 64 positions"):
        train(eval_with_do_generation=True)
    assert not (tmp_path / "out").exists()


# --- of a finished model ------------------------------------------------------------------------------------


def test_a_finished_model_has_the_numbers_of_its_run(train: Train, dataset: Path, tmp_path: Path) -> None:
    settings = {**GENERATES, "per_device_eval_batch_size": 3, "max_length": 60}
    train(plugins=(Catch,), max_steps=5, **settings)
    answers = tmp_path / "new" / "answers.jsonl"
    found = evaluate(tmp_path / "out", dataset, generations=answers, **settings)
    assert without_time(found) == without_time(Catch.records[-1])
    assert lines_of(answers) == lines_of(tmp_path / "out" / "generations-5.jsonl")
    assert set(found) == {*without_time(Catch.records[-1]), "eval_seconds"}


def test_data_is_the_dev_split_or_the_file_itself(models: Path, dataset: Path, tmp_path: Path) -> None:
    model = models / "llama-tied-gqa"
    assert without_time(evaluate(model, dataset)) == without_time(evaluate(model, dataset / "dev.json"))
    assert evaluate(model, dataset / "train.json")["eval_tokens"] > evaluate(model, dataset)["eval_tokens"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "train.json").write_text((dataset / "train.json").read_text())
    with pytest.raises(sft.UsageError, match="has no dev data; give a folder that has some"):
        evaluate(model, tmp_path / "only")


def test_what_would_be_ignored_is_refused(models: Path, dataset: Path, distribute: Any, tmp_path: Path) -> None:
    model = models / "llama-tied-gqa"
    distribute(
        "idle", "import sft\n\nclass Idle(sft.Plugin):\n    name = 'idle'\n    api_version = 1\n", {"idle": "Idle"}
    )
    with pytest.raises(sft.UsageError, match="Plugin idle has no part in sft evaluate"):
        evaluate(model, dataset, plugins=["idle"])
    with pytest.raises(sft.UsageError, match="generations: no answers are asked for; set eval_with_do_generation"):
        evaluate(model, dataset, generations=tmp_path / "answers")


def test_an_attention_can_be_requested(models: Path, dataset: Path, distribute: Any) -> None:
    """One that returns zeros gives another loss: it is used."""
    source = """
    import sft

    class Zeros:
        packed = True
        describes_padding = False

        def mask(self, ends):
            return None

        def attend(self, query, key, value, mask):
            return query * 0.0

    class Blind(sft.Plugin):
        name = "blind"
        api_version = 1

        @sft.hookimpl
        def sft_attention_backend(self, run, config):
            return Zeros()
    """
    distribute("blind", source, {"blind": "Blind"})
    model = models / "llama-tied-gqa"
    assert abs(evaluate(model, dataset, plugins=["blind"])["eval_loss"] - evaluate(model, dataset)["eval_loss"]) > 0.01


def test_a_record_that_the_model_cannot_read_is_refused(models: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.json"
    long.write_text(json.dumps({"src": "a b c " * 60, "tgt": "d"}))
    with pytest.raises(sft.UsageError, match=r"A record has \d+ tokens and .* reads at most 65"):
        evaluate(models / "llama-tied-gqa", long)

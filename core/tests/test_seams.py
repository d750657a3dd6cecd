"""Every other seam of a run, through toy plugins given to ``sft.run``: each is asked and obeyed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from toy_plugins import providing, toy

import sft
from sft.data.batches import assemble

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]


def steps_of(folder: Path, metrics: Metrics) -> list[dict[str, Any]]:
    return [line for line in metrics(folder, same=True) if "loss" in line]


# --- the collator -------------------------------------------------------------------------------------------


class Pairs:
    """Two records a row."""

    packs = True

    def __init__(self, run: sft.Run) -> None:
        self.pad_id = run.tokenizer.pad_id

    def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
        return [tuple(int(index) for index in order[start : start + 2]) for start in range(0, len(order), 2)]

    def batch(self, rows: Any) -> sft.Batch:
        return assemble(rows, self.pad_id)


Packing = providing("sft_collator", Pairs, "packing")


def test_a_collator_that_packs_changes_rows_and_not_what_is_learned(
    train: Train, metrics: Metrics, tmp_path: Path
) -> None:
    """All records in one step, so that both runs see the same ones: as 30 padded rows, and as 15 packed ones."""
    settings = {"per_device_train_batch_size": 30, "max_steps": 2, "max_grad_norm": 0}
    padded = train("padded", **settings)
    packed = train("packed", (Packing,), **settings)
    for one, other in zip(*(steps_of(tmp_path / name, metrics) for name in ("packed", "padded")), strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["target_tokens"] == other["target_tokens"]
        assert one["padding_tokens"] < other["padding_tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert packed.eval_loss_before == pytest.approx(padded.eval_loss_before, rel=1e-5)
    assert packed.eval_loss_after == pytest.approx(padded.eval_loss_after, rel=1e-4)


# --- the attention backend ----------------------------------------------------------------------------------


class Backend:
    """The default backend, counting its calls."""

    def __init__(self, run: sft.Run, packed: bool = True) -> None:
        from sft.models.attention import DefaultAttention

        self.own, self.packed, self.calls = DefaultAttention(), packed, 0

    @property
    def kernels(self) -> Any:
        return self.own.kernels

    @kernels.setter
    def kernels(self, kernels: Any) -> None:
        self.own.kernels = kernels

    def mask(self, ends: Any) -> Any:
        return self.own.mask(ends)

    def attend(self, query: Any, key: Any, value: Any, mask: Any) -> Any:
        self.calls += 1
        return self.own.attend(query, key, value, mask)


class Attention(sft.Plugin):
    name = "attention"
    api_version = 1
    packs = True

    @sft.hookimpl
    def sft_attention_backend(self, run: sft.Run, config: Any) -> Any:
        assert config is run.source.architecture
        run.backend = Backend(run, self.packs)  # type: ignore[attr-defined]
        return run.backend  # type: ignore[attr-defined]

    @sft.hookimpl
    def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
        run.say(f"attention was asked {run.backend.calls} times")  # type: ignore[attr-defined]


class PlainAttention(Attention):
    name = "plain-attention"
    packs = False


def test_an_attention_backend_computes_training_and_evaluation(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    """2 layers × (3 steps of 2 micro-batches + 2 evaluations of 7 records in batches of 4)."""
    said: list[str] = []
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4,
    }
    train("with", (Attention,), say=said.append, num_samples=1, max_new_tokens=3, **settings)
    train("without", **settings)
    assert f"attention was asked {2 * (3 * 2 + 2 * 2)} times" in said
    assert metrics(tmp_path / "with", same=True) == metrics(tmp_path / "without", same=True)


def test_a_backend_that_cannot_keep_documents_apart_refuses_packing(train: Train, tmp_path: Path) -> None:
    """At once where the collator says that it packs; at the first such row where it does not."""
    message = "Plugin packing packs several records into a row, and attention backend plain-attention"
    with pytest.raises(sft.UsageError, match=message):
        train("out", (Packing, PlainAttention))
    assert not (tmp_path / "out").exists()

    class Silent(Pairs):
        packs = False

    silent = providing("sft_collator", Silent, "silent")
    with pytest.raises(sft.UsageError, match="attention backend Backend would let them see each other"):
        train("out", (silent, PlainAttention), do_eval=False)


def test_such_a_backend_is_welcome_where_nothing_is_packed(train: Train) -> None:
    assert train("out", (PlainAttention,), max_steps=1).steps == 1


# --- the parallel strategy ----------------------------------------------------------------------------------


def test_a_parallel_strategy_is_asked_for_everything_that_crosses_processes(
    train: Train, metrics: Metrics, tmp_path: Path
) -> None:
    calls: list[Any] = []

    def strategy(run: sft.Run) -> Any:
        from sft.training.strategy import SingleProcess

        class Noting(SingleProcess):
            def divide(self, model: Any) -> None:
                assert not any(parameter._is_initialized() for parameter in model.parameters())
                calls.append(("divide",))
                super().divide(model)

            def connect(self, model: Any) -> None:
                calls.append(("connect", model is run.model))
                super().connect(model)

            def share(self, groups: Any) -> Any:
                calls.append(("share", [group.name for group in groups]))
                return super().share(groups)

            def updated(self) -> None:
                calls.append(("updated",))
                super().updated()

            def scores(self, model: Any, batches: Any, *more: Any) -> list[float]:
                calls.append(("scores", len(batches)))
                return super().scores(model, batches, *more)

            def accumulate(self, learning: Any, batches: Any) -> float:
                calls.append(("accumulate", sum(batch.target_tokens for batch in batches) * learning.weight))
                return super().accumulate(learning, batches)

            def sum(self, values: Any) -> list[float]:
                calls.append(("sum", len(values)))
                return super().sum(values)

            def grad_norm(self, stepped: Any) -> float:
                calls.append(("grad_norm", len(stepped)))
                return super().grad_norm(stepped)

        return Noting()

    train("with", (providing("sft_parallel_strategy", strategy),), max_steps=2, max_grad_norm=0.7)
    train("without", max_steps=2, max_grad_norm=0.7)
    measured = [("scores", 1), ("sum", 4)]
    step = [("sum", 4), ("accumulate", pytest.approx(1.0)), ("sum", 1), ("grad_norm", 20), ("updated",)]
    before = [("divide",), ("connect", True), ("share", ["decay", "no_decay"])]
    assert calls == [*before, *measured, *step, *step, *measured]
    assert metrics(tmp_path / "with", same=True) == metrics(tmp_path / "without", same=True)


def test_a_strategy_schedules_forward_loss_and_backward_itself(train: Train, tmp_path: Path, metrics: Metrics) -> None:
    """All forward passes, then all losses and backward passes, as in a pipeline, and an idle micro-batch at the end."""
    announced: list[sft.Batch] = []
    idle_batches: list[sft.Batch] = []

    def strategy(run: sft.Run) -> Any:
        from sft.training.strategy import SingleProcess

        class Schedule(SingleProcess):
            def accumulate(self, learning: sft.Learning, batches: Any) -> float:
                assert len(batches) == 2
                idle, nothing = learning.idle(), replace(batches[0], labels=np.full_like(batches[0].labels, 1))
                idle_batches.append(nothing)
                hidden = [learning.forward(batch) for batch in batches] + [idle.forward(nothing)]
                losses = [learning.loss(one, batch) for one, batch in zip(hidden, batches, strict=False)]
                for loss in losses:
                    learning.backward(loss)
                idle.backward(idle.loss(hidden[-1], nothing))
                return sum(map(float, losses))

        return Schedule()

    listening = toy(
        sft_parallel_strategy=lambda self, run: strategy(run),
        sft_micro_batch=lambda self, batch: announced.append(batch),
    )

    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    train("scheduled", (listening,), **settings)
    train("one-after-the-other", **settings)
    assert metrics(tmp_path / "scheduled", same=True) == metrics(tmp_path / "one-after-the-other", same=True)
    assert len(announced) == 4
    assert not any(one is other for one in announced for other in idle_batches)


def test_ranks_share_the_rows_of_a_step(train: Train) -> None:
    """Each of two ranks, run one after the other, reads every second row of what one process would read."""

    def rows_of(rank: int, world: int) -> list[list[tuple[int, ...]]]:
        seen: list[list[tuple[int, ...]]] = []

        def strategy(run: sft.Run) -> Any:
            from sft.training.strategy import SingleProcess

            class Rank(SingleProcess):
                data_rank, data_world = rank, world

                def accumulate(self, learning: sft.Learning, batches: Any) -> float:
                    assert all(len(batch.input_ids) <= 2 for batch in batches)
                    rows = [(batch, row) for batch in batches for row in range(len(batch.input_ids))]
                    seen.append([tuple(batch.input_ids[row, : batch.lengths[row][0]]) for batch, row in rows])
                    return super().accumulate(learning, batches)

            return Rank()

        train(
            f"{rank}-of-{world}",
            (providing("sft_parallel_strategy", strategy),),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2 // world,
            num_train_epochs=1,
            do_eval=False,
        )
        return seen

    whole, first, second = rows_of(0, 1), rows_of(0, 2), rows_of(1, 2)
    assert [len(rows) for rows in whole] == [4] * 7 + [2]
    for together, one, other in zip(whole, first, second, strict=True):
        assert one == together[0::2]
        assert other == together[1::2]


# --- optimizer, data, checks --------------------------------------------------------------------------------


def test_parameter_groups_are_what_the_optimizer_uses(train: Train, models: Path, tmp_path: Path) -> None:
    """Matrices stand still at rate 0, vectors move by rate × factor: AdamW's first step is that long."""

    class Rates(sft.Plugin):
        name = "rates"
        api_version = 1

        @sft.hookimpl
        def sft_parameter_groups(self, run: sft.Run, groups: list[sft.ParameterGroup]) -> None:
            assert [group.name for group in groups] == ["decay", "no_decay"]
            groups[0].learning_rate, groups[1].learning_rate = 0.0, 4.0

    train("out", (Rates,), max_steps=1, learning_rate=1e-3)
    before = load_file(models / "llama-tied-gqa" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in before.items():
        moved = np.abs(after[name] - tensor)
        if tensor.ndim > 1:
            assert not moved.any()
        else:
            np.testing.assert_allclose(moved, 4e-3, rtol=1e-2)


def test_a_plugin_that_loses_a_parameter_is_found_out(train: Train, tmp_path: Path) -> None:
    class Losing(sft.Plugin):
        name = "losing"
        api_version = 1

        @sft.hookimpl
        def sft_parameter_groups(self, run: sft.Run, groups: list[sft.ParameterGroup]) -> None:
            groups.pop()

    with pytest.raises(sft.UsageError, match=r"Parameter .*norm.* is in 0 optimizer groups"):
        train("out", (Losing,))
    assert not (tmp_path / "out").exists()


class Questions(sft.Plugin):
    name = "questions"
    api_version = 1

    @sft.hookimpl
    def sft_record_format(self, record: dict[str, Any]) -> list[sft.Turn] | None:
        if "question" not in record:
            return None
        if not record["answer"]:
            raise ValueError('"answer" is empty')
        return [sft.Turn("user", record["question"]), sft.Turn("assistant", record["answer"], trains=True)]


def test_a_record_format_is_read_beside_the_cores_own(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    pairs = [("What is red?", "A colour."), ("Hello", "Good day to you"), ("type#coat", "A coat.")]
    own = [{"src": source, "tgt": target} for source, target in pairs]
    other = [{"question": source, "answer": target} for source, target in pairs]
    said: list[str] = []
    for name, records in (("own", own), ("other", other)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records))
        data = str(tmp_path / f"{name}.jsonl")
        train(name, (Questions,), dataset_name_or_path=data, max_steps=2, say=said.append)
    assert metrics(tmp_path / "other", same=True) == metrics(tmp_path / "own", same=True)
    told = [line for line in said if line.startswith("train data: 3 records of ")]
    assert [line.split(",")[0].partition(" of ")[2] for line in told] == ["src/tgt", "the format of plugin questions"]


def test_what_a_record_format_finds_wrong_gets_file_and_line(train: Train, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"src": "a", "tgt": "b"}\n{"question": "a", "answer": ""}\n')
    with pytest.raises(sft.UsageError, match=r'data\.jsonl, line 2: "answer" is empty'):
        train("out", (Questions,), dataset_name_or_path=str(data))


def test_a_check_comes_before_anything_is_read(train: Train, tmp_path: Path) -> None:
    class Picky(sft.Plugin):
        name = "picky"
        api_version = 1

        @sft.hookimpl
        def sft_check(self, run: sft.Run) -> None:
            if run.settings.training.seed == 13:
                raise sft.UsageError("seed 13 is unlucky; take another.")

    with pytest.raises(sft.UsageError, match="seed 13 is unlucky"):
        train("out", (Picky,), seed=13, model_name_or_path="/nowhere", dataset_name_or_path="/nowhere")
    with pytest.raises(sft.UsageError, match="Data /nowhere does not exist"):
        train("out", (Picky,), seed=14, model_name_or_path="/nowhere", dataset_name_or_path="/nowhere")

"""Packed rows through real models and runs: the same loss and gradients, less padding, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.plugins.discovery import import_plugin
from sft.plugins.requests import by_device
from sft.testing import needs, read_metrics

PAD = 319


def examples_of(*lengths: int, seed: int = 0) -> list[sft.Example]:
    """Random tokens, of which the second half is learned."""
    generator = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = generator.integers(0, 300, length + 1)
        labels = ids[1:].copy()
        labels[: length // 2] = -100
        made.append(sft.Example(ids[:-1], labels))
    return made


def collators(capacity: int) -> list[Any]:
    from sft_data_packing.collators import BestFitCollator, NextFitCollator

    return [NextFitCollator(capacity, PAD), BestFitCollator(capacity, PAD, 4096)]


# --- what a row is ------------------------------------------------------------------------------------------


def test_a_packed_row_by_hand() -> None:
    """Documents of 3 and 2 tokens beside one of 7: positions begin again, the indices end each document."""
    for collator in collators(8):
        batch = collator.batch([examples_of(3, 2), examples_of(7)])
        assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]]
        assert batch.startend_row_indices.shape == (2, 1, 7, 1)
        assert batch.startend_row_indices.dtype == np.int32
        assert batch.startend_row_indices[:, 0, :, 0].tolist() == [[3, 3, 3, 5, 5, 6, 7], [7] * 7]
        assert batch.lengths == ((3, 2), (7,))
        assert batch.input_ids[0, 5:].tolist() == [PAD, PAD]
        assert batch.labels[0].tolist()[5:] == [-100, -100]
        assert batch.packed
        assert batch.padding_tokens == 2


def test_trap_no_dense_mask_travels() -> None:
    """What a batch holds grows with the row, not with its square."""
    sizes = []
    for length in (500, 1000):
        batch = collators(2048)[0].batch([examples_of(length, length)])
        arrays = (batch.input_ids, batch.labels, batch.position_ids, batch.startend_row_indices)
        sizes.append(sum(array.nbytes for array in arrays))
    assert sizes[1] == 2 * sizes[0]


# --- the loss -----------------------------------------------------------------------------------------------

LENGTHS = (9, 23, 4, 1, 17, 31, 2, 12, 30)


def attention_of(name: str) -> Any:
    """The attention of a plugin, or the core's own."""
    if name == "default":
        from sft.models.attention import DefaultAttention

        return DefaultAttention()
    return import_plugin(name)(None).sft_attention_backend(run=None, config=None)


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied", "mistral-gqa", "gemma-tied"])
@pytest.mark.parametrize(
    "backend", ["default", *(pytest.param(name, marks=needs(name)) for name in ("flashmask", "flash-attention"))]
)
def test_trap_packed_loss_and_gradients_are_the_unpacked_ones(
    paddle: Any, models: Path, case: str, backend: str
) -> None:
    """Every parameter trains; rows are longer than any document may be. Elsewhere packed documents see each other."""
    from sft.models.loading import load_model, open_model
    from sft.training.loss import batch_loss

    model = load_model(open_model(models / case))
    model.attention = attention_of(backend)
    examples = examples_of(*LENGTHS)

    def loss_and_gradients(batches: Sequence[sft.Batch]) -> tuple[float, dict[str, np.ndarray]]:
        targets = sum(batch.target_tokens for batch in batches)
        total = 0.0
        for batch in batches:
            loss = batch_loss(model, batch) / targets
            loss.backward()
            total += float(loss)
        found = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.clear_gradient()
        return total, found

    alone = [sft.assemble([[example]], PAD) for example in examples]
    expected, slopes = loss_and_gradients(alone)
    for collator in collators(80):
        rows = collator.rows(np.array(LENGTHS), np.random.default_rng(0))
        assert len(rows) < 4
        batch = collator.batch([[examples[number] for number in row] for row in rows])
        assert batch.packed
        assert batch.input_ids.shape[1] > 64  # max_position_embeddings
        found, gradients = loss_and_gradients([batch])
        assert found == pytest.approx(expected, rel=1e-5)
        assert gradients.keys() == slopes.keys()
        for name, gradient in gradients.items():
            largest = np.abs(slopes[name]).max()
            np.testing.assert_allclose(gradient, slopes[name], atol=1e-5 * largest, rtol=0, err_msg=name)


def test_documents_that_saw_each_other_would_be_noticed(paddle: Any, models: Path) -> None:
    """The tolerance above is no empty one: with one document for the whole row the loss is another."""
    from sft.models.loading import load_model, open_model
    from sft.training.loss import batch_loss

    model = load_model(open_model(models / "llama-tied-gqa"))
    model.attention = attention_of("default")
    right = sft.assemble([examples_of(*LENGTHS)], PAD)
    width = right.input_ids.shape[1]
    wrong = sft.Batch(
        right.input_ids,
        right.labels,
        right.position_ids,
        np.full_like(right.startend_row_indices, width),
        right.lengths,
    )
    with paddle.no_grad():
        losses = [float(batch_loss(model, batch)) / right.target_tokens for batch in (right, wrong)]
    assert abs(losses[0] - losses[1]) > 0.01


# --- runs ---------------------------------------------------------------------------------------------------

KINDS = ["zero-padding", "greedy-zero-padding"]


class Keep(sft.Plugin):
    """Every batch of every run that it is given to."""

    name = "keep"
    api_version = 1
    batches: list[sft.Batch] = []

    @sft.hookimpl
    def sft_run_started(self, run: sft.Run) -> None:
        self.batches.clear()

    @sft.hookimpl
    def sft_micro_batch(self, run: sft.Run, batch: sft.Batch) -> None:
        self.batches.append(batch)


def documents(batches: Sequence[sft.Batch]) -> list[bytes]:
    found = []
    for batch in batches:
        for row, lengths in enumerate(batch.lengths):
            for end, length in zip(np.cumsum(lengths), lengths, strict=True):
                found.append(batch.input_ids[row, end - length : end].tobytes())
    return sorted(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_reads_every_record_once_an_epoch_in_fewer_rows_with_less_padding(
    train: Any, tmp_path: Path, kind: str
) -> None:
    settings = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 4, "max_length": 256}
    said: list[str] = []
    plain = train("plain", (Keep,), **settings)
    records, rows = documents(Keep.batches), sum(len(batch.lengths) for batch in Keep.batches)
    packed = train("packed", (Keep,), plugin=[kind], say=said.append, **settings)
    assert documents(Keep.batches) == records
    fewer = sum(len(batch.lengths) for batch in Keep.batches)
    assert (rows, plain.steps) == (24, 6)
    assert packed.steps == -(-fewer // 4) < 6
    assert (packed.tokens, packed.target_tokens) == (plain.tokens, plain.target_tokens)
    assert packed.padding_tokens < 0.75 * plain.padding_tokens  # the last row is never full
    assert all(sum(lengths) <= 256 for batch in Keep.batches for lengths in batch.lengths)
    result = json.loads((tmp_path / "packed" / "run.json").read_text())["result"]
    assert result["padding_tokens"] == packed.padding_tokens
    fill = 100 * packed.tokens / (256 * fewer)
    assert f"{kind}: 24 records in {fewer} rows of 256 tokens, {fill:.1f} % full" in said


@pytest.mark.parametrize("kind", KINDS)
def test_the_dev_loss_is_the_unpacked_one(train: Any, kind: str) -> None:
    plain, packed = train("plain", max_steps=1), train("packed", plugin=[kind], max_steps=1, max_length=200)
    assert packed.eval_loss_before == pytest.approx(plain.eval_loss_before, rel=1e-6)


@needs("lora")
@pytest.mark.parametrize("kind", KINDS)
def test_beside_lora_end_to_end(train: Any, kind: str) -> None:
    """Also the mission's smallest example of packing: sft run --plugin lora --plugin zero-padding."""
    settings = {"plugin": ["lora", kind], "learning_rate": 1e-2, "num_train_epochs": 4, "max_steps": -1}
    summary = train("out", per_device_train_batch_size=2, max_length=128, **settings)
    assert summary.eval_loss_after < summary.eval_loss_before - 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_bit_by_bit(train: Any, tmp_path: Path, kind: str) -> None:
    settings = {"plugin": [kind], "max_steps": 6, "per_device_train_batch_size": 2, "max_length": 128}
    train("whole", **settings, save_strategy="steps", save_steps=3)
    train("resumed", **settings, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


@pytest.mark.slow
@pytest.mark.parametrize("lazy", [False, True], ids=["whole", "lazy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_inside_a_group_of_packed_records(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lazy: bool
) -> None:
    """In the first pass and the second, where 24 records are windows of 9, 9 and 6."""
    from sft.data.stream import Stream

    monkeypatch.setattr(Stream.__init__, "__defaults__", (9,))
    settings = {"plugin": [kind], "max_steps": 16, "max_length": 128, "do_eval": False, "logging_steps": 3}
    settings.update(lazy=lazy, save_strategy="steps", save_steps=1, per_device_train_batch_size=1)
    train("whole", **settings)
    assert read_metrics(tmp_path / "whole")[-1]["epoch"] >= 1
    for step in (2, 5, 9, 14):
        source = tmp_path / "whole" / f"checkpoint-{step}"
        train("resumed", resume_from_checkpoint=str(source), overwrite_output_dir=True, **settings)
        assert read_metrics(tmp_path / "resumed", same=True) == read_metrics(tmp_path / "whole", same=True), step
        for name in ("model.safetensors", "checkpoint-16/trainer/optimizer.safetensors"):
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), step


def test_greedy_supersedes_where_the_settings_of_both_are_true(train: Any, tmp_path: Path) -> None:
    """As PaddleNLP's files have them."""
    said: list[str] = []
    settings = {"zero_padding": True, "greedy_zero_padding": True}
    train("out", say=said.append, max_length=128, max_steps=1, do_eval=False, **settings)
    active = json.loads((tmp_path / "out" / "run.json").read_text())["plugins"]
    assert {*active} == {"greedy-zero-padding", *by_device({})}
    assert len([line for line in said if line.startswith(("zero-padding: ", "greedy-zero-padding: "))]) == 1


@pytest.mark.parametrize(
    "settings",
    [{"plugin": KINDS}, {"plugin": KINDS[::-1]}, {"plugin": ["zero-padding"], "greedy_zero_padding": "true"}],
    ids=["names", "reversed", "name and setting"],
)
def test_one_asked_for_by_name_is_not_superseded(train: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(sft.UsageError, match="both provide sft_collator, which has one place"):
        train("out", max_length=128, **settings)


def test_the_size_of_groups_is_a_setting(train: Any, adapt: Callable[..., sft.Run]) -> None:
    run = adapt(plugin=["greedy-zero-padding"], packing_group_size=8, max_length=128)
    rows = run.collator.rows(run.train_data.lengths, None)
    assert all(len({number // 8 for number in row}) == 1 for row in rows)
    collator: Any = adapt(plugin=["greedy-zero-padding"]).collator
    assert collator.group == 4096
    with pytest.raises(sft.UsageError, match="packing_group_size"):
        train("refused", plugin=["greedy-zero-padding"], packing_group_size=0)


@pytest.mark.parametrize("kind", KINDS)
def test_trap_records_that_are_too_long_are_truncated_and_counted_and_not_lost(
    train: Any, tmp_path: Path, kind: str
) -> None:
    """The policy is the core's: the end of the answer goes, and the run's report says how often."""
    said: list[str] = []
    settings = {"max_steps": -1, "num_train_epochs": 1, "max_length": 28}
    train("out", (Keep,), plugin=[kind], say=said.append, **settings)
    counts = json.loads((tmp_path / "out" / "run.json").read_text())["result"]["data"]["train"]
    assert (counts["records"], counts["records_dropped"]) == (24, 0)
    assert counts["targets_truncated"] > 0
    assert any(f"{counts['targets_truncated']} answers cut" in line for line in said)
    assert sum(len(row) for batch in Keep.batches for row in batch.lengths) == 24
    assert max(sum(row) for batch in Keep.batches for row in batch.lengths) <= 28


# --- what is refused ----------------------------------------------------------------------------------------


class Blind(sft.Plugin):
    """An attention that cannot tell documents apart."""

    name = "blind"
    api_version = 1

    @sft.hookimpl
    def sft_attention_backend(self, run: sft.Run, config: Any) -> Any:
        from sft.models.attention import DefaultAttention

        class Backend(DefaultAttention):
            packed = False

        return Backend()


@pytest.mark.parametrize("kind", KINDS)
def test_trap_an_attention_that_ignores_the_indices_is_refused(train: Any, tmp_path: Path, kind: str) -> None:
    with pytest.raises(sft.UsageError, match=rf"Plugin {kind} packs .* and attention backend blind would let them see"):
        train("out", (Blind,), plugin=[kind], max_length=128)
    assert not (tmp_path / "out").exists()
    train("out", (Blind,), max_steps=1)  # a record a row: nothing to tell apart


def test_two_collators_are_refused(train: Any, tmp_path: Path) -> None:
    class Other(sft.Plugin):
        name = "other"
        api_version = 1

        @sft.hookimpl
        def sft_collator(self, run: sft.Run) -> Any:
            raise AssertionError("never asked")

    with pytest.raises(sft.UsageError, match=r"both provide sft_collator, which has one place; leave one out"):
        train("out", (Other,), plugin=["zero-padding"])
    assert not (tmp_path / "out").exists()

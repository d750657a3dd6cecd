"""NEFTune: the size of the noise by hand, the noise as a real model's embedding shows it, and where there is none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.testing import needs
from sft.training.loop import Learning

ALPHA, HIDDEN = 5.0, 32
"""The plugin's default, and d of llama-tied-gqa."""


def batch_of(*rows: Sequence[int], seed: int = 0) -> sft.Batch:
    """Rows of documents of these lengths, with random tokens that are all learned."""
    generator = np.random.default_rng(seed)

    def example(length: int) -> sft.Example:
        ids = generator.integers(0, 300, length + 1)
        return sft.Example(ids[:-1], ids[1:])

    return sft.assemble([[example(length) for length in row] for row in rows], 319)


class Pairs(sft.Plugin):
    """Two consecutive records a row."""

    name = "pairs"
    api_version = 1

    @sft.hookimpl
    def sft_collator(self, run: sft.Run) -> Any:
        class Collator:
            def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
                return [tuple(range(start, min(start + 2, len(lengths)))) for start in range(0, len(lengths), 2)]

            def batch(self, rows: Sequence[Sequence[sft.Example]]) -> sft.Batch:
                return sft.assemble(rows, run.tokenizer.pad_id)

        return Collator()


def listen(run: sft.Run) -> list[np.ndarray]:
    """What the plugin adds to the embeddings, forward by forward: the output less the table's rows."""
    embedding, heard = run.model.get_input_embeddings(), []

    def hear(layer: Any, inputs: Any, output: Any) -> None:
        heard.append(output.numpy() - layer.weight.numpy()[inputs[0].numpy()])

    embedding.register_forward_post_hook(hear)
    return heard


def noise_of(run: sft.Run, batch: sft.Batch) -> np.ndarray:
    """The noise of one micro-batch in training, [B, S, d]."""
    heard = listen(run)
    run.model.train()
    run.strategy.accumulate(Learning(run, 1.0), [batch])
    return heard[-1]


def documents(batch: sft.Batch) -> list[tuple[int, slice]]:
    """Row and place of each document."""
    found = []
    for row, lengths in enumerate(batch.lengths):
        ends = np.cumsum(lengths)
        found += [(row, slice(int(end - length), int(end))) for end, length in zip(ends, lengths, strict=True)]
    return found


# --- the size, by hand --------------------------------------------------------------------------------------


def test_the_size_of_packed_and_padded_rows_by_hand() -> None:
    from sft_noise_neftune.neftune import noise_size

    size = noise_size(batch_of([4, 1], [9], [2]), 6.0, 16)
    assert (size.dtype, size.shape) == (np.float32, (3, 9))
    # 6 / √(L · 16) = 1.5 / √L
    np.testing.assert_allclose(size[0], [0.75] * 4 + [1.5] + [0] * 4, rtol=1e-6)
    np.testing.assert_allclose(size[1], [0.5] * 9, rtol=1e-6)
    np.testing.assert_allclose(size[2], [1.5 / math.sqrt(2)] * 2 + [0] * 7, rtol=1e-6)


def test_the_size_where_processes_share_rows() -> None:
    """Documents are as long as they are, whatever of them is here."""
    from sft_noise_neftune.neftune import noise_size

    whole, columns = batch_of([4, 1], [9], [2]), np.array([1, 4, 7])
    share = dataclasses.replace(whole, input_ids=whole.input_ids[:, columns], columns=columns)
    np.testing.assert_array_equal(noise_size(share, 6.0, 16), noise_size(whole, 6.0, 16)[:, columns])


def test_trap_divided_by_the_root_of_b_times_l() -> None:
    """Elsewhere it is α / √(B·L): at d = 4096 and a batch of 1 that is 64 times too loud."""
    from sft_noise_neftune.neftune import noise_size

    alone = noise_size(batch_of([25]), ALPHA, 4096)
    assert alone[0, 0] == pytest.approx(5 / math.sqrt(25 * 4096))
    assert 64 * alone[0, 0] == pytest.approx(5 / math.sqrt(1 * 25))
    beside = noise_size(batch_of([25], [40], [3]), ALPHA, 4096)
    np.testing.assert_array_equal(beside[0, :25], alone[0])  # whatever else is in the batch
    assert not beside[0, 25:].any()


# --- the noise, measured ------------------------------------------------------------------------------------

ROWS = {"padded": ([30], [12], [5]), "packed": ([20, 7, 3], [11, 14], [30])}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("alpha", [5.0, 15.0])
def test_trap_each_document_has_the_noise_of_its_own_length_and_padding_none(
    adapt: Any, kind: str, alpha: float
) -> None:
    """At most α/√(L·d), and close to it; its square sums to α²/3 over a document of any length."""
    batch = batch_of(*ROWS[kind])
    noise = noise_of(adapt(neftune_noise_alpha=alpha), batch)
    assert noise.shape == (*batch.input_ids.shape, HIDDEN)
    real = np.zeros(batch.input_ids.shape, bool)
    for row, place in documents(batch):
        own, length = noise[row, place], place.stop - place.start
        bound = alpha / math.sqrt(length * HIDDEN)
        largest = np.abs(own).max()
        # The sum with the embedding is rounded.
        assert 0.9 * bound < largest <= bound + 1e-6, (row, place)  # at least 96 draws
        deviation = math.sqrt(4 / 45 / (length * HIDDEN))  # of the mean of squares of U(-1, 1)
        assert np.square(own / bound).mean() == pytest.approx(1 / 3, abs=4 * deviation), (row, place)
        real[row, place] = True
    assert not noise[~real].any()
    assert (~real).any()


def test_in_gemma_it_is_added_to_the_embeddings_before_they_are_scaled(adapt: Any, models: Path) -> None:
    """Gemma multiplies what the embedding gives by √d, noise and all (as the plugin's paper has it: noise on the
    embeddings; transformers did so too until version 5 moved the factor into the embedding layer)."""
    run, seen = adapt(model_name_or_path=str(models / "gemma-tied")), []
    run.model.model.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].numpy()))
    batch = batch_of([20, 7], [11])
    noise = noise_of(run, batch)
    assert np.abs(noise[0, :20]).max() == pytest.approx(ALPHA / math.sqrt(20 * HIDDEN), rel=0.05)
    table = run.model.get_input_embeddings().weight.numpy()
    expected = (table[batch.input_ids] + noise) * math.sqrt(HIDDEN)
    np.testing.assert_allclose(seen[0], expected, rtol=1e-5, atol=1e-5)


def test_the_noise_is_uniform(adapt: Any) -> None:
    """In units of its size: mean 0, variance 1/3, kurtosis 9/5, and a tenth of it in every tenth of [-1, 1]."""
    run = adapt()
    batch = batch_of(*[[40]] * 25)
    unit = (noise_of(run, batch) / (ALPHA / math.sqrt(40 * HIDDEN))).ravel().astype(np.float64)
    count = unit.size
    assert count == 32_000
    assert abs(unit.mean()) < 4 * math.sqrt(1 / 3 / count)
    assert unit.var() == pytest.approx(1 / 3, abs=4 * math.sqrt(4 / 45 / count))
    assert (unit**4).mean() / unit.var() ** 2 == pytest.approx(9 / 5, rel=0.03)
    shares = np.histogram(unit, 10, (-1, 1))[0] / count
    np.testing.assert_allclose(shares, 0.1, atol=4 * math.sqrt(0.1 * 0.9 / count))
    # Independent from one hidden unit, token and row to the next.
    field = unit.reshape(25, 40, HIDDEN)
    for one, other in ((field[1:], field[:-1]), (field[:, 1:], field[:, :-1]), (field[..., 1:], field[..., :-1])):
        assert abs((one * other).mean()) < 4 / 3 / math.sqrt(one.size)


@pytest.mark.parametrize("plugins", [(), (Pairs,)], ids=["a-record-a-row", "packed"])
def test_every_micro_batch_of_a_run_has_the_noise_of_its_own_documents(train: Any, plugins: tuple[type, ...]) -> None:
    heard: list[np.ndarray] = []
    batches: list[sft.Batch] = []

    class Hear(sft.Plugin):
        name = "hear"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            self.heard = listen(run)

        @sft.hookimpl
        def sft_micro_batch(self, run: sft.Run, batch: sft.Batch) -> None:
            batches.append(batch)

        @sft.hookimpl
        def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
            heard.extend(self.heard)

    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "do_eval": False}
    train("out", (*plugins, Hear), learning_rate=0.0, max_steps=3, **settings)
    assert len(heard) == len(batches) == (5 if plugins else 6)  # six rows of two end an epoch with one micro-batch
    assert any(len(row) > 1 for batch in batches for row in batch.lengths) is bool(plugins)
    for noise, batch in zip(heard, batches, strict=True):
        for row, place in documents(batch):
            bound = ALPHA / math.sqrt((place.stop - place.start) * HIDDEN)
            assert 0.9 * bound < np.abs(noise[row, place]).max() <= bound + 1e-6
        assert noise.any(axis=-1).sum() == batch.tokens


# --- where there is none ------------------------------------------------------------------------------------


def test_trap_none_in_evaluation_and_generation(adapt: Any, models: Path, logits_of: Any) -> None:
    """After a micro-batch in training, an evaluated model computes bit by bit what it does without the plugin."""
    from sft.data.questions import encode_prompt
    from sft.inference.open import load_for_inference
    from sft.models.generation import answers
    from sft.settings.arguments import GenerationArguments
    from sft.training.loss import batch_loss

    base = models / "llama-tied-gqa"
    plain, tokenizer = load_for_inference(str(base), None, lambda text: None)
    run, batch = adapt(), batch_of([20, 7], [11])
    assert noise_of(run, batch).any()
    run.model.eval()
    ids = load_file(base / "reference.safetensors")["input_ids"]
    np.testing.assert_array_equal(logits_of(run.model, ids), logits_of(plain, ids))
    assert float(batch_loss(run.model, batch)) == float(batch_loss(run.model, batch))

    run.model.train()  # answers are drawn in the middle of training too
    prompt, settings = encode_prompt([sft.Turn("user", "type#coat")], tokenizer), GenerationArguments(max_new_tokens=12)
    assert answers(run.model, tokenizer, [prompt], settings, 1) == answers(plain, tokenizer, [prompt], settings, 1)
    assert run.model.training


def test_dev_losses_are_those_of_a_run_without_it(train: Any) -> None:
    """Before training, and after steps that learn nothing; those of training differ."""
    settings = {"learning_rate": 0.0, "max_steps": 2}
    noisy, plain = train("noisy", **settings), train("plain", plugin=[], **settings)
    assert noisy.eval_loss_before == plain.eval_loss_before
    assert noisy.eval_loss_after == plain.eval_loss_after == plain.eval_loss_before
    assert abs(noisy.train_loss_last - plain.train_loss_last) > 1e-4


# --- what it depends on -------------------------------------------------------------------------------------


@pytest.fixture
def heard(train: Any) -> Callable[..., list[np.ndarray]]:
    """The noise of each step of a run."""

    def make(name: str, **settings: Any) -> list[np.ndarray]:
        found: list[list[np.ndarray]] = []

        class Hear(sft.Plugin):
            name = "hear"
            api_version = 1

            @sft.hookimpl
            def sft_run_started(self, run: sft.Run) -> None:
                found.append(listen(run))

        train(name, (Hear,), do_eval=False, overwrite_output_dir=True, learning_rate=0.0, **settings)
        return found[0]

    return make


def test_the_noise_follows_seed_and_step(heard: Any) -> None:
    first, again, other = heard("first", seed=1), heard("again", seed=1), heard("other", seed=2)
    assert len(first) == len(again) == 3
    for one, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, same)
    # In units of its size, so that other records in a batch do not count.
    units = [np.sign(noise[0, :4]) for noise in (*first, other[0])]
    assert len({unit.tobytes() for unit in units}) == 4


def test_a_resumed_run_hears_what_it_would_have_heard(heard: Any, tmp_path: Path) -> None:
    whole = heard("whole", max_steps=4, save_strategy="steps", save_steps=2)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = heard("resumed", max_steps=4, resume_from_checkpoint=checkpoint)
    assert len(resumed) == 2
    for one, same in zip(whole[2:], resumed, strict=True):
        np.testing.assert_array_equal(one, same)


def test_training_with_noise_learns_and_changes_no_layers(train: Any, models: Path, tmp_path: Path) -> None:
    summary = train("out", max_steps=6)
    assert summary.eval_loss_after < summary.eval_loss_before - 0.05
    before = load_file(models / "llama-tied-gqa" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in after.items()} == {n: tensor.shape for n, tensor in before.items()}


@needs("lora")
def test_beside_lora(train: Any) -> None:
    noisy, plain = (
        train(name, plugin=[*extra, "lora"], learning_rate=1e-2, max_steps=4)
        for name, extra in (("noisy", ["neftune"]), ("plain", []))
    )
    assert noisy.eval_loss_before == plain.eval_loss_before
    assert noisy.eval_loss_after < noisy.eval_loss_before - 0.05
    assert noisy.trainable_parameters == plain.trainable_parameters


@needs("parallel-4d")
def test_a_plan_is_that_without_noise(models: Path) -> None:
    """And says nothing about it: there is nothing on paper that it leaves out."""
    from click.testing import CliRunner

    from sft_parallel_4d.command import command

    words = ["--model_name_or_path", str(models / "llama-tied-gqa"), "--max_length", "64"]
    words += ["--devices", "2", "--device_memory", "1GiB"]
    plain, noisy = (CliRunner().invoke(command, [*words, *more]) for more in ([], ["--plugin", "neftune"]))
    assert noisy.exit_code == 0
    assert noisy.output == plain.output


@pytest.mark.parametrize("alpha", [0, -5, "loud"])
def test_a_size_that_is_none_is_refused(train: Any, tmp_path: Path, alpha: Any) -> None:
    with pytest.raises(sft.UsageError, match="neftune_noise_alpha"):
        train(neftune_noise_alpha=alpha)
    assert not (tmp_path / "out").exists()

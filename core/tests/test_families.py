"""Models as training uses them: losses, gradients, recomputation, copies, shards. Families: test_decoder.py."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sft
from sft.data.batches import assemble
from sft.seams import Batch, Example

CASES = ["llama-tied-gqa", "qwen2-untied", "mistral-gqa", "gemma-tied"]
Found = tuple[float, dict[str, np.ndarray]]


def load(folder: Path, backend: Any = None) -> Any:
    """The model with an attention backend installed (None: the default one)."""
    from sft.models.attention import DefaultAttention
    from sft.models.loading import load_model, open_model

    model = load_model(open_model(folder))
    model.attention = backend or DefaultAttention()
    return model


def batch_of(*rows: tuple[int, ...]) -> Batch:
    """Documents of these lengths, the same tokens for the same length; the first third of each is a prompt."""

    def example(size: int) -> Example:
        ids = np.random.default_rng(size).integers(0, 320, size)
        labels = np.append(ids[1:], -100)
        labels[: size // 3] = -100
        return Example(ids, labels)

    return assemble([[example(size) for size in row] for row in rows], pad_id=0)


def gradients_of(model: Any) -> dict[str, np.ndarray]:
    """Of every parameter, which has none afterwards."""
    found = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.clear_gradient()
    return found


def loss_and_gradients(model: Any, *batches: Batch) -> Found:
    from sft.training.loss import batch_loss

    total = 0.0
    for batch in batches:
        loss = batch_loss(model, batch)
        loss.backward()
        total += float(loss)
    return total, gradients_of(model)


def compare(found: Found, expected: Found) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert np.abs(found[1][name] - gradient).max() <= 1e-5 * np.abs(gradient).max(), name


# --- every family -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_cross_entropy_of_the_logits_of_transformers(paddle: Any, models: Path, case: str) -> None:
    from sft.training.loss import batch_loss

    found = load_file(models / case / "reference.safetensors")
    ids, logits = found["input_ids"], found["logits"].astype(np.float64)[:, :-1]
    chosen = np.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    largest = logits.max(-1)
    expected = (np.log(np.exp(logits - largest[..., None]).sum(-1)) + largest - chosen).sum()
    labels = np.concatenate([ids[:, 1:], np.full((2, 1), -100)], axis=1)
    batch = assemble([[Example(*row)] for row in zip(ids, labels, strict=True)], pad_id=0)
    assert float(batch_loss(load(models / case), batch)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_packed_and_padded_rows_are_single_rows(paddle: Any, models: Path, case: str) -> None:
    """Loss and gradients of every parameter."""
    model = load(models / case)
    alone = loss_and_gradients(model, *(batch_of((size,)) for size in (5, 9, 12, 20, 3)))
    compare(loss_and_gradients(model, batch_of((5, 9, 12), (20, 3))), alone)
    compare(loss_and_gradients(model, batch_of((5,), (9,), (12,), (20,), (3,))), alone)


@pytest.mark.parametrize("case", CASES)
def test_rotary_positions_are_the_batchs(paddle: Any, models: Path, case: str) -> None:
    """Only distances count: positions that begin elsewhere give the same logits, those twice as far apart do not."""
    from sft.models.forward import hidden_states

    ids = np.random.default_rng(1).integers(0, 320, (1, 24))
    ends, model = np.full((1, 1, 24, 1), 24, np.int32), load(models / case)

    def logits(positions: np.ndarray) -> np.ndarray:
        batch = Batch(ids, np.full_like(ids, -100), positions[None], ends, ((24,),))
        with paddle.no_grad():
            return np.asarray(model.lm_head(hidden_states(model, batch)).numpy())

    plain = logits(np.arange(24))
    np.testing.assert_allclose(logits(np.arange(24) + 7), plain, atol=5e-5, rtol=0)
    assert np.abs(logits(2 * np.arange(24)) - plain).max() > 0.05


class Counting:
    """The default backend, counting its calls."""

    packed = describes_padding = True

    def __init__(self) -> None:
        from sft.models.attention import DefaultAttention

        self.own, self.calls, self.masks = DefaultAttention(), 0, 0

    def mask(self, ends: Any) -> Any:
        assert ends is not None
        self.masks += 1
        return self.own.mask(ends)

    def attend(self, query: Any, key: Any, value: Any, mask: Any) -> Any:
        self.calls += 1
        return self.own.attend(query, key, value, mask)


@pytest.mark.parametrize("case", CASES)
def test_recomputation_passes_the_masks_again(paddle: Any, models: Path, case: str) -> None:
    """Both forwards come before either backward, so a mask kept aside would be wrong."""
    from sft.training.loss import batch_loss

    backend = Counting()
    model = load(models / case, backend)
    model.train()
    batches = batch_of((5, 9, 12), (20, 3)), batch_of((7, 7, 4))
    expected = loss_and_gradients(model, *batches)
    assert (backend.calls, backend.masks) == (4, 2)  # two layers, two batches
    model.recompute = True
    losses = [batch_loss(model, batch) for batch in batches]
    for loss in losses:
        loss.backward()
    assert (backend.calls, backend.masks) == (4 + 4 + 4, 2 + 2)  # a mask is made for all layers, and their backward
    compare((sum(map(float, losses)), gradients_of(model)), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_copy_of_a_model_is_a_model_of_its_own(paddle: Any, models: Path, case: str) -> None:
    model = load(models / case)
    expected = loss_and_gradients(model, batch_of((5, 9)))
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.set_value(parameter * 2)
    compare(loss_and_gradients(twin, batch_of((5, 9))), expected)


@pytest.mark.parametrize("case", CASES)
def test_shards_give_what_one_file_gives(paddle: Any, models: Path, variant: Callable[..., Path], case: str) -> None:
    folder = variant(case)
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((tensors[:5], tensors[5:])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file(dict(part), folder / file)
        weight_map.update(dict.fromkeys(dict(part), file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole, sharded = (dict(load(place).named_parameters()) for place in (models / case, folder))
    assert whole.keys() == sharded.keys()
    for name, parameter in whole.items():
        np.testing.assert_array_equal(sharded[name].numpy(), parameter.numpy())


def test_an_untied_gemma_loads_and_learns(paddle: Any, models: Path, variant: Callable[..., Path]) -> None:
    """With the embedding as lm_head it is the tied model; the two gradients add up to the tied one."""
    folder = variant("gemma-tied", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / "model.safetensors")
    loss, gradients = loss_and_gradients(load(folder), batch_of((9, 4)))
    expected, tied = loss_and_gradients(load(models / "gemma-tied"), batch_of((9, 4)))
    assert loss == pytest.approx(expected, rel=1e-5)
    both = gradients["model.embed_tokens.weight"] + gradients["lm_head.weight"].T
    assert np.abs(both - tied["model.embed_tokens.weight"]).max() <= 1e-5 * np.abs(both).max()


def test_trap_the_padding_tokens_embedding_is_not_zero(paddle: Any, models: Path) -> None:
    """Often it is the end token, which has a meaning."""
    values = json.loads((models / "mistral-gqa" / "config.json").read_text())
    stored = load_file(models / "mistral-gqa" / "model.safetensors")["model.embed_tokens.weight"]
    found = load(models / "mistral-gqa").model.embed_tokens(paddle.to_tensor([values["pad_token_id"]]))
    np.testing.assert_array_equal(found.numpy()[0], stored[values["pad_token_id"]])
    assert np.abs(found.numpy()).max() > 0.1


def test_an_unknown_family_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    from sft.models.loading import open_model

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(sft.UsageError, match="use one of llama, qwen2, mistral, gemma, qwen3"):
        open_model(tmp_path)

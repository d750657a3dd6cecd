"""Attention: the default backend against the formula in float64, packed rows, and what installing leaves alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from attention_formula import attention_formula

from sft.data.batches import assemble
from sft.data.tokenizer import Tokenizer
from sft.seams import Example
from sft.testing import forward

CASES = ["llama-untied", "llama-tied-gqa", "llama3-scaled", "qwen2-untied", "mistral-gqa", "gemma-tied"]
PADDED_DOCUMENTS = [[(0, 3), (3, 5), (5, 6), (6, 7)], [(0, 4), (4, 6), (6, 7)]]
"""Two packed rows of 7: documents of 3 and 2, then of 4 and 2; each padding token is a document of its own."""


def packed_mask(documents: list[list[tuple[int, int]]], length: int) -> np.ndarray:
    """Query i sees key j when j <= i and both are in one document."""
    seen = np.zeros((len(documents), length, length), bool)
    for row, spans in zip(seen, documents, strict=True):
        for start, stop in spans:
            row[start:stop, start:stop] = np.tril(np.ones((stop - start, stop - start), bool))
    return seen


def packed_indices(documents: list[list[tuple[int, int]]], length: int) -> np.ndarray:
    """FlashMask's causal form: for each key, the first query row that no longer sees it."""
    indices = np.zeros((len(documents), 1, length, 1), np.int32)
    for row, spans in zip(indices, documents, strict=True):
        for start, stop in spans:
            row[0, start:stop, 0] = stop
    return indices


class Dense:
    """What 16 bits on a GPU get."""

    def mask(self, ends: np.ndarray | None) -> Any:
        from sft.models.dense_attention import dense_mask

        return None if ends is None else dense_mask(ends)

    def attend(self, query: Any, key: Any, value: Any, mask: Any, cap: float | None = None) -> Any:
        from sft.models.dense_attention import dense_attention

        return dense_attention(query, key, value, mask, cap)


def backend_of(dense: bool) -> Any:
    from sft.models.attention import DefaultAttention

    return Dense() if dense else DefaultAttention()


@pytest.mark.parametrize("dense", [False, True], ids=["documents", "dense"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed"])
def test_the_default_backend_is_softmax_attention(
    paddle: Any, packed: bool, heads: int, kv_heads: int, dense: bool
) -> None:
    """Value and gradients; numbers of size 1 in float32, so 1e-5 is some 50 roundings."""

    batch, length, size = 2, 7, 8
    generator = np.random.default_rng(heads)
    shapes = [(batch, length, h, size) for h in (heads, kv_heads, kv_heads, heads)]
    query, key, value, upstream = (generator.standard_normal(shape).astype(np.float32) for shape in shapes)
    seen = packed_mask(PADDED_DOCUMENTS if packed else [[(0, length)]] * batch, length)
    backend = backend_of(dense)
    mask = backend.mask(packed_indices(PADDED_DOCUMENTS, length) if packed else None)
    tensors = [paddle.to_tensor(array, stop_gradient=False) for array in (query, key, value)]
    out = backend.attend(*tensors, mask)
    (out * paddle.to_tensor(upstream)).sum().backward()

    expected = attention_formula(query, key, value, upstream, seen)
    found = (out.numpy(), *(tensor.grad.numpy() for tensor in tensors))
    for name, one, other in zip(("output", "query", "key", "value"), found, expected, strict=True):
        assert one.shape == other.shape, name
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=0, err_msg=name)


def test_the_dense_mask_is_the_documents(paddle: Any) -> None:
    from sft.models.dense_attention import dense_mask

    mask = dense_mask(packed_indices(PADDED_DOCUMENTS, 7)).numpy()
    assert mask.shape == (2, 1, 7, 7)
    np.testing.assert_array_equal(mask[:, 0] == 0, packed_mask(PADDED_DOCUMENTS, 7))
    assert (mask[mask != 0] == -3e4).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_dense_mask_stays_finite_in_16_bits_block_by_block(paddle: Any, dtype: Any) -> None:
    """As flash kernels with a dense mask compute: scores and softmax in float32, one block of keys after the other. In
    the last rows the first two blocks are of another document, so nothing in them is seen."""
    from sft.models.dense_attention import HIDDEN, dense_mask

    length, size, block, documents = 96, 16, 16, [[(0, 40), (40, 41), (41, 96)]]
    generator = np.random.default_rng(0)
    query, key, value = (3 * generator.standard_normal((1, length, 1, size)).astype(dtype) for _ in range(3))
    wide = [tensor.astype(np.float32) for tensor in (query, key, value)]
    mask = dense_mask(packed_indices(documents, length)).numpy()[0, 0]
    expected, *_ = attention_formula(*wide, np.zeros_like(wide[0]), packed_mask(documents, length))

    def recurrence(mask: np.ndarray) -> np.ndarray:
        q, k, v = (tensor[0, :, 0] for tensor in wide)
        best, total = np.full((length, 1), -np.inf, np.float32), np.zeros((length, 1), np.float32)
        out = np.zeros_like(q)
        for start in range(0, length, block):
            keys = slice(start, start + block)
            scores = q @ k[keys].T / np.float32(np.sqrt(size)) + mask[:, keys].astype(np.float32)
            highest = np.maximum(best, scores.max(1, keepdims=True))
            weights, shrinks = np.exp(scores - highest), np.exp(best - highest)
            total = total * shrinks + weights.sum(1, keepdims=True)
            out, best = out * shrinks + weights @ v[keys], highest
        return out / total

    np.testing.assert_allclose(recurrence(mask.astype(dtype)), expected[0, :, 0], atol=1e-5, rtol=0)
    if dtype is np.float16:
        with np.errstate(all="ignore"):
            assert np.isnan(recurrence(np.where(mask == HIDDEN, np.float32(-1e30), mask).astype(dtype))).any()


# --- through whole models -----------------------------------------------------------------------------------


class Counting:
    """The default backend, counting its calls and what it was given."""

    packed = True

    def __init__(self, factor: float = 1.0) -> None:
        from sft.models.attention import DefaultAttention

        self.own, self.factor, self.calls = DefaultAttention(), factor, 0
        self.shapes: set[tuple[tuple[int, ...], ...]] = set()
        self.ends: list[np.ndarray | None] = []

    def mask(self, ends: np.ndarray | None) -> Any:
        self.ends.append(ends)
        return self.own.mask(ends)

    def attend(self, query: Any, key: Any, value: Any, mask: Any) -> Any:
        self.calls += 1
        self.shapes.add(tuple(tuple(tensor.shape) for tensor in (query, key, value)))
        return self.own.attend(query, key, value, mask) * self.factor


def load(folder: Path, backend: Any = None) -> Any:
    from sft.models.loading import load_model, open_model

    model = load_model(open_model(folder))
    if backend is not None:
        model.attention = backend
    return model


def logits_of(model: Any, rows: list[list[np.ndarray]], indices: bool = True) -> np.ndarray:
    """Logits [B, S, V] of documents packed into rows, through the installed backend."""
    import paddle

    from sft.models.forward import hidden_states

    batch = assemble([[Example(ids, np.full_like(ids, -100)) for ids in row] for row in rows], pad_id=0)
    if not indices:  # as if each row were one document
        ends, lengths = np.full_like(batch.startend_row_indices, 1), tuple((sum(sizes),) for sizes in batch.lengths)
        batch = dataclasses.replace(batch, startend_row_indices=ends * batch.input_ids.shape[1], lengths=lengths)
    with paddle.no_grad():
        return model.lm_head(hidden_states(model, batch)).numpy()


def own_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits [S, V] of one document with the default backend, unpacked."""
    return forward(model, ids[None])[0]


@pytest.mark.parametrize(
    "case", ["llama-untied", "llama-tied-gqa", "llama3-scaled", "qwen2-untied", "mistral-gqa", "gemma-tied"]
)
def test_trap_documents_in_a_packed_row_compute_what_they_compute_alone(paddle: Any, models: Path, case: str) -> None:
    """Against each document alone. 5e-5 is five times the float32 noise at logits of up to 7."""
    from sft.models.attention import DefaultAttention

    generator = np.random.default_rng(3)
    rows = [[generator.integers(3, 128, size) for size in sizes] for sizes in ((5, 9), (3, 4, 6), (8,))]
    own = load(models / case)
    model = load(models / case, DefaultAttention())
    packed, mixed = logits_of(model, rows), logits_of(model, rows, indices=False)
    for number, row in enumerate(rows):
        start = 0
        for place, ids in enumerate(row):
            alone = own_logits(own, ids)
            found = packed[number, start : start + len(ids)]
            np.testing.assert_allclose(found, alone, atol=5e-5, rtol=0)
            if place:  # without the indices a later document sees the one before it
                assert np.abs(mixed[number, start : start + len(ids)] - alone).max() > 0.1
            start += len(ids)


@pytest.mark.parametrize("case", [*CASES, "qwen2-tied-sharded"])
def test_what_goes_into_the_first_block_may_be_given(paddle: Any, models: Path, case: str) -> None:
    """Instead of the embedding of the batch's tokens, which then do not count; a gradient comes back for it."""
    from sft.models.attention import DefaultAttention
    from sft.models.forward import hidden_states

    ids = np.random.default_rng(5).permutation(np.arange(3, 128))[:14]  # each once, so each has its row's gradient
    documents = [Example(part, np.full_like(part, -100)) for part in (ids[:5], ids[5:])]
    batch = assemble([documents], pad_id=0)
    other = dataclasses.replace(batch, input_ids=batch.input_ids[:, ::-1].copy())
    model = load(models / case, DefaultAttention())
    embedding = model.model.embed_tokens
    embedded = model.model.embed(paddle.to_tensor(batch.input_ids)).detach()
    embedded.stop_gradient = False
    expected, found = hidden_states(model, batch), hidden_states(model, other, embedded)
    np.testing.assert_array_equal(found.numpy(), expected.numpy())
    assert np.abs(hidden_states(model, other).numpy() - expected.numpy()).max() > 0.1
    for hidden in (expected, found):
        hidden.square().sum().backward()
    gradient = embedded.grad.numpy()[0]
    assert np.abs(gradient).max() > 0.1
    # Gemma scales what it embeds.
    np.testing.assert_array_equal(
        gradient * np.float32(model.model.embedding_scale), embedding.weight.grad.numpy()[ids]
    )


def test_padding_after_a_document_changes_nothing(paddle: Any, models: Path) -> None:
    from sft.models.attention import DefaultAttention

    generator = np.random.default_rng(4)
    short, long = generator.integers(3, 128, 5), generator.integers(3, 128, 12)
    model = load(models / "llama-tied-gqa", DefaultAttention())
    together = logits_of(model, [[short], [long]])
    np.testing.assert_allclose(together[0, :5], own_logits(model, short), atol=5e-5, rtol=0)
    np.testing.assert_allclose(together[1], own_logits(model, long), atol=5e-5, rtol=0)


def test_a_backend_gets_grouped_heads_as_they_are(paddle: Any, models: Path) -> None:
    """4 query and 2 key/value heads of 8; one call a layer, one mask a batch; None where causality says everything."""
    backend = Counting()
    model = load(models / "llama-tied-gqa", backend)
    ids = np.arange(3, 9)
    logits_of(model, [[ids]])
    assert backend.calls == 2
    assert backend.shapes == {((1, 6, 4, 8), (1, 6, 2, 8), (1, 6, 2, 8))}
    assert backend.ends == [None]
    logits_of(model, [[ids, ids]])
    (ends,) = backend.ends[1:]
    assert ends.dtype == np.int32
    assert ends.shape == (1, 1, 12, 1)
    assert ends.ravel().tolist() == [6] * 6 + [12] * 6


def test_two_models_in_one_process_keep_their_own_backends(paddle: Any, models: Path) -> None:
    ids = np.arange(3, 20)
    first, second = Counting(), Counting(factor=0.5)
    plain = load(models / "llama-tied-gqa")
    one, other = load(models / "llama-tied-gqa", first), load(models / "llama-tied-gqa", second)
    found = [logits_of(model, [[ids]])[0] for model in (one, other, one)]
    assert (first.calls, second.calls) == (4, 2)
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_allclose(found[0], own_logits(plain, ids), atol=5e-5, rtol=0)
    assert np.abs(found[1] - found[0]).max() > 0.1
    assert (first.calls, second.calls) == (4, 2)  # a model without a backend called neither


@pytest.mark.parametrize("case", CASES[1:])
def test_answers_never_ask_the_backend(paddle: Any, models: Path, case: str) -> None:
    """They have a key/value cache, and compute the same with any backend."""
    from sft.models.generation import answers
    from sft.settings.arguments import GenerationArguments

    tokenizer, backend = Tokenizer(models / case), Counting(factor=0.0)
    prompt, settings = tokenizer.encode("Hello there, how are you?"), GenerationArguments(max_new_tokens=12)
    found = [answers(load(models / case, one), tokenizer, [prompt], settings, 0) for one in (None, backend)]
    assert found[0] == found[1]
    assert backend.calls == 0


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_a_window_is_a_document_that_ends_early(paddle: Any, window: int, packed: bool) -> None:
    """Of two blocks, the second sees ``window`` tokens: what its backend is given, against the definition."""
    from sft.models.architecture import Architecture, Block
    from sft.models.forward import RowReading

    documents = [np.arange(3, 3 + size) for size in ((4, 6) if packed else (10,))]
    batch = assemble([[Example(ids, np.full_like(ids, -100)) for ids in documents]], pad_id=0)
    architecture = Architecture(
        vocabulary=16, hidden=4, inner=4, heads=1, kv_heads=1, head_size=4, positions=64,
        blocks=(Block(rotary=None), Block(rotary=None, window=window)), rotaries=(), norm_epsilon=1e-6, tied=False,
    )  # fmt: skip
    backend = Counting()
    reading = RowReading(architecture, batch, backend)
    tensor = paddle.zeros([1, 10, 1, 4])
    for layer in (0, 1):
        reading.attend(layer, tensor, tensor, tensor)
    whole, seen = backend.ends[0], backend.ends[-1]
    assert len(backend.ends) == (1 if packed and window == 7 else 2)  # a window that no document fills is none
    assert (whole is None) == (not packed)
    starts = np.repeat([0, 4], [4, 6]) if packed else np.zeros(10, int)
    query, key = np.arange(10)[:, None], np.arange(10)[None]
    expected = (key <= query) & (key >= starts[:, None]) & (key > query - window)
    np.testing.assert_array_equal((query >= key) & (query < seen[0, 0, :, 0][None]), expected)


@pytest.mark.parametrize("dense", [False, True], ids=["documents", "dense"])
@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed"])
def test_a_cap_bends_scores(paddle: Any, packed: bool, dense: bool) -> None:
    """cap · tanh(s / cap), in float64, before the mask."""
    generator, cap = np.random.default_rng(1), 0.7
    query, key, value = (generator.standard_normal((2, 7, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    seen = packed_mask(PADDED_DOCUMENTS if packed else [[(0, 7)]] * 2, 7)
    backend = backend_of(dense)
    mask = backend.mask(packed_indices(PADDED_DOCUMENTS, 7) if packed else None)
    found = backend.attend(*map(paddle.to_tensor, (query, key, value)), mask, cap=cap).numpy()
    expected, *_ = attention_formula(query, key, value, np.zeros_like(query), seen, cap)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)

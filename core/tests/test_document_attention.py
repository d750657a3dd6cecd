"""Attention by documents: the formula in float64 for every kind of them, its gradients, how many scores it computes,
what it keeps, and how often a model asks for masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attention_formula import attention_formula

from sft.data.batches import assemble
from sft.seams import Example

LENGTHS = (1, 7, 60, 128, 1000)


def ends_of(rows: list[tuple[int, ...]], length: int, window: int | None = None) -> np.ndarray:
    """FlashMask's causal form; each token behind a row's documents is one of its own."""
    found = np.tile(np.arange(1, length + 1, dtype=np.int32), (len(rows), 1))
    for row, sizes in zip(found, rows, strict=True):
        row[: sum(sizes)] = np.repeat(np.cumsum(sizes), sizes)
    if window is not None:
        found = np.minimum(found, np.arange(length, dtype=np.int32) + np.int32(window))
    return found[:, None, :, None]


def formula(inputs: list[np.ndarray], ends: np.ndarray, cap: float | None) -> list[np.ndarray]:
    """Output and gradients of query, key and value, of query, key, value and what comes from above."""
    i, j = np.ogrid[: ends.shape[2], : ends.shape[2]]
    return attention_formula(*inputs, (j <= i) & (i < ends[:, 0, None, :, 0]), cap)


def computed(
    inputs: list[np.ndarray], ends: np.ndarray | None, cap: float | None, dtype: str = "float32"
) -> list[np.ndarray]:
    import paddle

    from sft.models.attention import DefaultAttention

    backend = DefaultAttention()
    tensors = [paddle.to_tensor(x).astype(dtype) for x in inputs]
    for tensor in tensors[:3]:
        tensor.stop_gradient = False
    out = backend.attend(*tensors[:3], backend.mask(ends), cap)
    out.backward(tensors[3])
    assert all(x.dtype == tensors[0].dtype for x in (out, *(tensor.grad for tensor in tensors[:3])))
    return [x.astype("float32").numpy() for x in (out, *(tensor.grad for tensor in tensors[:3]))]


def arrays(rows: int, length: int, heads: int, shared: int, size: int = 16) -> list[np.ndarray]:
    generator = np.random.default_rng(length + heads)
    shapes = [(rows, length, count, size) for count in (heads * shared, heads, heads, heads * shared)]
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def compare(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 2e-6) -> None:
    for name, one, other in zip(("output", "query", "key", "value"), found, expected, strict=True):
        assert one.shape == other.shape, name
        assert np.abs(one - other).max() <= tolerance * max(1, np.abs(other).max()), name


CASES = [
    pytest.param([LENGTHS], 1210, 2, 2, None, None, id="all-lengths"),
    pytest.param([LENGTHS[:4], (200, 3)], 210, 1, 3, None, None, id="one-key-head"),
    pytest.param([(300,), (130, 170)], 300, 4, 1, None, None, id="own-keys"),
    pytest.param([(390, 1), (40, 300)], 400, 2, 2, 5, None, id="narrow-window"),
    pytest.param([(390, 1), (40, 300)], 400, 2, 2, 140, None, id="wide-window"),
    pytest.param([(390, 1), (40, 300)], 400, 2, 2, 128, 1.5, id="capped-window"),
    pytest.param([(150, 7), (40,)], 170, 2, 3, None, 0.7, id="capped"),
]


@pytest.mark.parametrize(("rows", "length", "heads", "shared", "window", "cap"), CASES)
def test_value_and_gradients_are_the_formula(
    paddle: Any, rows: Any, length: int, heads: int, shared: int, window: int | None, cap: float | None
) -> None:
    inputs, ends = arrays(len(rows), length, heads, shared), ends_of(rows, length, window)
    compare(computed(inputs, ends, cap), formula(inputs, ends, cap))


@pytest.mark.parametrize("length", [1, 17, 300])
def test_without_ends_rows_are_documents(paddle: Any, length: int) -> None:
    inputs = arrays(3, length, 2, 2)
    compare(computed(inputs, None, None), formula(inputs, ends_of([(length,)] * 3, length), None))


def test_ends_that_are_no_documents_are_computed_too(paddle: Any) -> None:
    """Two continuations of 3 and 4 of one beginning of 5, which both see: nothing in a run makes them."""
    ends = np.int32([12] * 5 + [8] * 3 + [12] * 4).reshape(1, 1, 12, 1)
    inputs = arrays(1, 12, 2, 2)
    for cap in (None, 0.9):
        compare(computed(inputs, ends, cap), formula(inputs, ends, cap))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_computed_in_float32(paddle: Any, dtype: str) -> None:
    """Results are those of the formula for the rounded arguments, rounded once: half a unit of their last bit."""
    inputs, ends = arrays(1, 200, 2, 2), ends_of([(130, 70)], 200)
    rounded = [paddle.to_tensor(x).astype(dtype).astype("float32").numpy() for x in inputs]
    expected = formula(rounded, ends, None)
    # Of the gradients, one uses the rounded output beside.
    compare(computed(inputs, ends, None, dtype), expected, 2**-8 if dtype == "bfloat16" else 2**-11)


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["query", "key", "value"])
def test_only_what_wants_a_gradient_gets_one(paddle: Any, wanted: int) -> None:
    from sft.models.attention import DefaultAttention

    backend, inputs, ends = DefaultAttention(), arrays(1, 40, 2, 2), ends_of([(30, 10)], 40)
    tensors = [paddle.to_tensor(x, stop_gradient=number != wanted) for number, x in enumerate(inputs[:3])]
    backend.attend(*tensors, backend.mask(ends)).backward(paddle.to_tensor(inputs[3]))
    np.testing.assert_array_equal(tensors[wanted].grad.numpy(), computed(inputs, ends, None)[1 + wanted])
    assert [tensor.grad is None for tensor in tensors] == [number != wanted for number in range(3)]


def test_one_row_of_4096_loses_no_small_weights(paddle: Any) -> None:
    """One key is looked at much, all others hardly: paddle's softmax of such a row does not add up to 1."""
    length = 4096
    inputs = arrays(1, length, 1, 1)
    inputs[0][:], inputs[1][:] = 1.0, 0.0
    inputs[1][:, 5] = 17.375 / 4  # times 16 inputs over √16
    inputs[3][:, :-1] = 0.0
    found = computed(inputs, None, None)
    weights = np.ones(length)
    weights[5] = np.exp(17.375)
    weights /= weights.sum()
    output = weights @ inputs[2][0, :, 0].astype(np.float64)
    np.testing.assert_allclose(found[0][0, -1, 0], output, rtol=0, atol=1e-6 * np.abs(output).max())
    expected = weights[:, None] * inputs[3][0, -1]
    np.testing.assert_allclose(found[3][0, :, 0], expected, rtol=1e-5, atol=1e-9)


# --- cost ---------------------------------------------------------------------------------------------------


def scores_of(monkeypatch: pytest.MonkeyPatch, rows: list[tuple[int, ...]], length: int, window: int | None) -> int:
    """How many scores of a head go through a softmax, forward and backward, and the most of them at a time."""
    import paddle

    counts: list[int] = []
    softmax = paddle.nn.functional.softmax_

    def counted(scores: Any, axis: int) -> Any:
        counts.append(int(scores.size))
        return softmax(scores, axis=axis)

    monkeypatch.setattr(paddle.nn.functional, "softmax_", counted)
    computed(arrays(len(rows), length, 1, 1, 4), ends_of(rows, length, window), None)
    monkeypatch.undo()
    assert max(counts) <= max(4 * 128 * 128, 128 * length)
    return sum(counts) // 2


def test_short_documents_cost_what_they_are(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scores_of(monkeypatch, [(16,) * 64], 1024, None) == 64 * 16 * 16
    assert scores_of(monkeypatch, [(1,) * 300], 300, None) == 300


@pytest.mark.parametrize("window", [None, 100])
def test_scores_follow_the_sum_of_squares(paddle: Any, monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """Of documents from 1 token to 30, 300 and 2,000. A bucket more costs what 8,192 scores cost, so up to so many are
    wasted to have one less."""
    generator = np.random.default_rng(0)
    for most in (30, 300, 2000):
        sizes = tuple(int(size) for size in generator.integers(1, most, 4096 // most))
        found = scores_of(monkeypatch, [sizes], sum(sizes), window)
        needed = sum(size * min(size, 128 + (window or size)) for size in sizes)
        assert found <= 1.25 * needed + 8192 * (1 + -(-max(sizes) // 128)), most


def test_padding_costs_nothing(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 rows, one of 512 tokens and the others of 16: of 512 · 512 · 32 scores a 40th are computed."""
    assert scores_of(monkeypatch, [(512,)] + [(16,)] * 31, 512, None) < 512 * 512 * 32 / 40


def peak_of(length: int) -> int:
    """Bytes beyond the arguments and their gradients at the highest point of forward and backward."""
    import paddle
    from paddle.base import core

    from sft.models.attention import DefaultAttention

    backend = DefaultAttention()
    tensors = [paddle.to_tensor(x, stop_gradient=False) for x in arrays(1, length, 1, 2)[:3]]
    mask = backend.mask(None)
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    backend.attend(*tensors, mask).sum().backward()
    return int(core.host_memory_stat_peak_value("Allocated", 0) - before)


def test_memory_is_linear_in_the_row(paddle: Any) -> None:
    """Twice the row takes at most twice the memory; a square would take four times."""
    short, long = peak_of(1024), peak_of(2048)
    assert long <= 2.1 * short
    assert long < 2048 * 2048 * 4 * 2  # the scores of both heads


# --- in a model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("case", "kinds"), [("llama-tied-gqa", 1), ("gemma2", 2)])
def test_masks_are_made_once_for_all_layers(
    paddle: Any, models: Path, monkeypatch: pytest.MonkeyPatch, case: str, kinds: int, recompute: bool
) -> None:
    """One a batch, and one more for a window; rows to gather are found once too, forward and backward."""
    from sft.models import document_attention
    from sft.models.loading import load_model, open_model
    from sft.training.loss import batch_loss

    made = {"documents": 0, "places": 0, "masks": 0}

    def count(name: str, owner: Any, attribute: str) -> None:
        own = getattr(owner, attribute)

        def counted(*arguments: Any) -> Any:
            made[name] += 1
            return own(*arguments)

        monkeypatch.setattr(owner, attribute, counted)

    count("documents", document_attention.Documents, "__init__")
    count("places", document_attention._Places, "__init__")
    folder = models / case
    model = load_model(open_model(folder if folder.is_dir() else models.parent / "families" / case))
    count("masks", model.attention, "mask")
    model.train()
    model.recompute = recompute
    ids = np.arange(3, 60)
    parts = [Example(part, part) for part in (ids[:9], ids[9:14], ids[14:])]
    for batches in (1, 2):
        batch_loss(model, assemble([parts], pad_id=0)).backward()
        assert len(model.architecture.blocks) > 1
        assert made == dict.fromkeys(made, kinds * batches)


def test_a_batch_takes_what_was_made_for_it_along(paddle: Any) -> None:
    """Held in a circle, tables of O(S) rows would stay until Python next looks for circles."""
    import gc
    import weakref

    from sft.models.document_attention import document_attention, rows_of

    query = paddle.ones([2, 6, 2, 4])
    documents = rows_of(2, 6)
    document_attention(query, query, query, documents, None)
    gc.collect()
    gc.disable()
    try:
        seen = weakref.ref(documents)
        del documents
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("window", [None, 100])
def test_a_prompt_takes_linear_memory(paddle: Any, window: int | None) -> None:
    """Two prompts, one padded on the left: no mask of all its tokens by all its tokens."""
    from paddle.base import core

    from sft.models.architecture import Architecture, Block
    from sft.models.cache import CachedReading

    architecture = Architecture(
        vocabulary=16, hidden=32, inner=4, heads=2, kv_heads=1, head_size=16, positions=9999,
        blocks=(Block(rotary=None, window=window),), rotaries=(), norm_epsilon=1e-6, tied=False,
    )  # fmt: skip

    def peak(length: int) -> int:
        query, key, value, _ = (paddle.to_tensor(x) for x in arrays(2, length, 1, 2))
        before = core.host_memory_stat_current_value("Allocated", 0)
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        with paddle.no_grad():
            reading = CachedReading(architecture, np.asarray([0, length // 3]))
            reading.expect(length)
            out = reading.attend(0, query, key, value)
        ends = np.minimum(length, np.arange(length) + (window or length)).astype(np.int32)
        alone = formula([x.numpy()[:1] for x in (query, key, value, query)], ends[None, None, :, None], None)[0]
        assert np.abs(out.numpy()[:1] - alone).max() <= 2e-6
        return int(core.host_memory_stat_peak_value("Allocated", 0) - before)

    assert peak(1024) <= 2.2 * peak(512)

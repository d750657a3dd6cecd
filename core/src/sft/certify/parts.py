"""What the objects behind seams must keep, by their protocols: quantizers, attention, collators."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from sft.certify.checking import check
from sft.certify.comparing import CLOSE, FailedError, NotTriedError, close, same
from sft.certify.lab import Lab
from sft.certify.runs import settings_of, variants
from sft.certify.token_loss import token_loss
from sft.context import Run
from sft.seams import Example

# --- quantizers ---------------------------------------------------------------------------------------------


def _quantizes(lab: Lab) -> bool:
    return lab.subject.has("sft_quantizer")


def _quantizer(lab: Lab, case: str) -> Any:
    """That of a run, by its options."""
    return lab.run(started=lambda run: run.hook.sft_quantizer(run=run), **settings_of(lab, case)).started


_SIZES = ((256, 384), (1024, 1152))
_SMALL = slice(8, 16)
"""Outputs whose weights are a tenth of the others'."""


def _weight(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """W [in, out] and a bias [out]; some outputs are much smaller than the others."""
    generator = np.random.default_rng(size[0])
    weight = generator.standard_normal(size, dtype=np.float32)
    weight[:, _SMALL] /= 10
    return weight, generator.standard_normal(size[1], dtype=np.float32)


def _layers(quantizer: Any) -> Iterator[tuple[np.ndarray, np.ndarray, Any, np.ndarray]]:
    """W, bias, the layer that stands for them, and W̃ [in, out] that it says it holds."""
    for size in _SIZES:
        weight, bias = _weight(size)
        layer = quantizer.quantize("model.layers.0.mlp.up_proj", weight, bias)
        if layer is None:
            raise NotTriedError("it leaves this Linear as it is")
        yield weight, bias, layer, np.asarray(layer.dequantize().numpy())


@check("A quantized weight is near the weight, for each of its outputs, small ones too.", _quantizes, variants)
def quantizes_nearly(lab: Lab, case: str) -> str:
    worst = 0.0
    for weight, _, _, held in _layers(_quantizer(lab, case)):
        if held.shape != weight.shape:
            raise FailedError(f"dequantize gives {held.shape} of a weight [in, out] of {weight.shape}")
        off = np.sqrt(((held - weight) ** 2).mean(0) / (weight**2).mean(0))
        worst = max(worst, float(off.max()))
        small, usual = float(off[_SMALL].max()), float(np.median(off))
        if small > 3 * usual:
            raise FailedError(f"an output of small weights is {small:.1%} off, where others are {usual:.1%} off")
    if not worst <= 0.3:
        raise FailedError(f"an output is {worst:.0%} off its weight")
    return f"at most {worst:.1%} off"


@check(
    "The layer of a quantized weight computes x·W̃ + b, and its gradient, with the W̃ that it gives.",
    _quantizes,
    variants,
)
def quantized_layers_multiply(lab: Lab, case: str) -> None:
    import paddle

    for _, bias, layer, held in _layers(_quantizer(lab, case)):
        generator = np.random.default_rng(1)
        x, upstream = (generator.standard_normal((2, 3, width), dtype=np.float32) for width in held.shape)
        given = paddle.to_tensor(x, stop_gradient=False)
        y = layer(given)
        (y * paddle.to_tensor(upstream)).sum().backward()
        wide = held.astype(np.float64)
        close(y.numpy(), x @ wide + bias, "the product")
        close(given.grad.numpy(), upstream @ wide.T, "the gradient of x")


@check("A part of a quantized layer holds the same values as that part of the whole.", _quantizes, variants)
def quantized_parts_are_the_same(lab: Lab, case: str) -> None:
    quantizer = _quantizer(lab, case)
    weight, bias = _weight((256, 384))
    weight *= np.linspace(0.5, 2.0, 384, dtype=np.float32)
    for axis, given in ((0, None), (1, bias)):
        layer = quantizer.quantize("model.layers.0.mlp.up_proj", weight, given)
        if not hasattr(layer, "part"):
            raise NotTriedError("its layers have no part(), so they are refused where processes share layers")
        held = np.asarray(layer.dequantize().numpy())
        for index in range(2):
            part = layer.part(axis, index, 2)
            expected = np.split(held, 2, axis)[index]
            if not np.array_equal(np.asarray(part.dequantize().numpy()), expected):
                raise FailedError(f"part {index} of 2 along {'outputs' if axis else 'inputs'} holds other values")
            if axis and not np.array_equal(np.asarray(part.bias.numpy()), np.split(bias, 2)[index]):
                raise FailedError(f"part {index} of 2 along outputs has another bias")


# --- losses of tokens ---------------------------------------------------------------------------------------


def _weighs_tokens(lab: Lab) -> bool:
    return lab.subject.has("sft_token_loss")


@check(
    "The loss of a token is its own, whichever others are in its chunk, and so is its gradient.",
    _weighs_tokens,
    variants,
)
def counts_each_token_alone(lab: Lab, case: str) -> None:
    (part, *_) = lab.run(started=lambda run: run.hook.sft_token_loss(run=run), **settings_of(lab, case)).started
    generator = np.random.default_rng(0)
    # Of some tokens the model is sure, of others it knows nothing.
    logits = generator.standard_normal((8, 40), dtype=np.float32) * np.geomspace(0.1, 10, 8, dtype=np.float32)[:, None]
    labels = np.where(generator.random(8) < 0.5, logits.argmax(-1), generator.integers(0, 40, 8))
    loss, gradient = token_loss(part, logits, labels)
    alone = [token_loss(part, logits[row : row + 1], labels[row : row + 1]) for row in range(len(labels))]
    close(loss, sum(value for value, _ in alone), "the loss of eight tokens together, and one by one")
    close(gradient, np.concatenate([one for _, one in alone]), "its gradient in the logits")


# --- attention ----------------------------------------------------------------------------------------------


def _attends(lab: Lab) -> bool:
    return lab.subject.has("sft_attention_backend")


_LENGTHS = (150, 1, 37, 90)
_KINDS = ("plain", "packed", "padded", "window", "capped")


def _kinds(lab: Lab) -> Iterator[str]:
    return iter(_KINDS)


@check(
    "attend() and its gradients are those of the formula, in float64: packed, padded, in windows, capped.",
    _attends,
    _kinds,
)
def attends_by_the_formula(lab: Lab, case: str) -> None:
    from sft.models.kernels import PLAIN

    backend = lab.run(started=lambda run: run.model.attention).started
    _attends_as(backend, case, "")
    if hasattr(backend, "kernels"):  # what it leaves to the model's kernels, and what it does itself
        backend.kernels = PLAIN
        _attends_as(backend, case, "with plain kernels, ")


def _attends_as(backend: Any, case: str, how: str) -> None:
    import paddle

    cap = 2.0 if case == "capped" else None
    if cap is not None and not getattr(backend, "caps", False):
        raise NotTriedError("it does not claim to cap scores, and models that do are refused")
    if case in ("packed", "padded") and not getattr(backend, "packed", False):
        raise NotTriedError("it does not claim packed rows, which are refused")
    length, heads, kept, size = sum(_LENGTHS), 4, 2, 16
    ends = _ends(case, length)
    generator = np.random.default_rng(0)
    shapes = ((2, length, heads, size), (2, length, kept, size), (2, length, kept, size), (2, length, heads, size))
    query, key, value, upstream = (generator.standard_normal(shape, dtype=np.float32) for shape in shapes)
    tensors = [paddle.to_tensor(one, stop_gradient=False) for one in (query, key, value)]
    mask = backend.mask(ends)
    out = backend.attend(*tensors, mask, cap) if cap is not None else backend.attend(*tensors, mask)
    (out * paddle.to_tensor(upstream)).sum().backward()
    expected = _formula(query, key, value, upstream, ends, cap)
    close(out.numpy(), expected[0], f"{how}what it computes")
    for name, tensor, gradient in zip(("queries", "keys", "values"), tensors, expected[1:], strict=True):
        close(tensor.grad.numpy(), gradient, f"{how}the gradient of {name}")


def _ends(case: str, length: int) -> np.ndarray | None:
    """From which query on each key is not seen: int32 [2, 1, S, 1]."""
    if case in ("plain", "capped"):
        return None
    ends = np.concatenate([np.full(n, stop) for n, stop in zip(_LENGTHS, np.cumsum(_LENGTHS), strict=True)])
    places = np.arange(length)
    if case == "padded":
        ends = np.where(places < 200, 200, places + 1)
    if case == "window":
        ends = np.minimum(places + 20, length)
    other = np.where(places < 130, 130, length)  # the second row of the batch has other documents
    return np.stack([ends, other]).astype(np.int32)[:, None, :, None]


def _formula(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    upstream: np.ndarray,
    ends: np.ndarray | None,
    cap: float | None,
) -> tuple[np.ndarray, ...]:
    """softmax(Q·Kᵀ/√D)·V and the gradients of Q, K and V for ``upstream``, in float64."""
    length, heads, kept = query.shape[1], query.shape[2], key.shape[2]
    places = np.arange(length)
    seen = places[:, None] >= places[None]
    masks = [seen] * 2 if ends is None else [seen & (places[:, None] < one[0, None, :, 0]) for one in ends]
    q, k, v, dy = (one.astype(np.float64).transpose(0, 2, 1, 3) for one in (query, key, value, upstream))
    k, v = (np.repeat(one, heads // kept, axis=1) for one in (k, v))
    scale = 1.0 / math.sqrt(query.shape[3])
    scores = q @ k.swapaxes(2, 3) * scale
    bent = np.ones_like(scores)
    if cap is not None:
        scores = np.tanh(scores / cap) * cap
        bent = 1.0 - (scores / cap) ** 2
    scores = np.where(np.stack(masks)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ v
    change = dy @ v.swapaxes(2, 3)
    slope = weights * (change - (weights * change).sum(-1, keepdims=True)) * bent * scale
    grads = slope @ k, slope.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ dy

    def back(one: np.ndarray, groups: int) -> np.ndarray:
        shape = one.shape
        return one.reshape(shape[0], -1, groups, *shape[2:]).sum(2).transpose(0, 2, 1, 3)

    shared = heads // kept
    return back(out, 1), back(grads[0], 1), back(grads[1], shared), back(grads[2], shared)


# --- collators ----------------------------------------------------------------------------------------------


def _collates(lab: Lab) -> bool:
    return lab.subject.has("sft_collator")


def _collator(lab: Lab, case: str) -> tuple[Any, int]:
    def look(run: Run) -> tuple[Any, int]:
        return run.hook.sft_collator(run=run), run.settings.data.max_length

    found: tuple[Any, int] = lab.run(started=look, **settings_of(lab, case)).started
    return found


def _lengths() -> np.ndarray:
    return np.random.default_rng(3).integers(1, 65, 300)


@check(
    "Each record is in one row of a pass, no row is longer than max_length, and the order depends on its rng alone.",
    _collates,
    variants,
)
def rows_hold_each_record_once(lab: Lab, case: str) -> None:
    collator, most = _collator(lab, case)
    lengths = _lengths()
    passes: list[list[tuple[int, ...]]] = []
    for seed in (None, 1, 1, 2):
        np.random.seed(len(passes))
        rows = collator.rows(lengths, None if seed is None else np.random.default_rng(seed))
        passes.append([tuple(map(int, row)) for row in rows])
        numbers = sorted(number for row in passes[-1] for number in row)
        same(numbers, list(range(len(lengths))), "the records of a pass")
        longest = max(int(lengths[list(row)].sum()) for row in rows)
        if longest > most:
            raise FailedError(f"a row has {longest} tokens, and max_length is {most}")
    same(passes[2], passes[1], "the same rng again gives other rows")
    if passes[3] == passes[1] or passes[1] == passes[0]:
        raise FailedError("training rows come in the same order whatever the rng is")


@check(
    "A batch holds its rows' records as documents, one after the other, with their own labels and positions.",
    _collates,
    variants,
)
def batches_hold_documents(lab: Lab, case: str) -> None:
    collator, _ = _collator(lab, case)
    lengths = _lengths()
    generator = np.random.default_rng(4)
    examples = [
        Example(generator.integers(3, 100, n), np.where(generator.random(n) < 0.5, generator.integers(3, 100, n), -100))
        for n in lengths
    ]
    rows = collator.rows(lengths, np.random.default_rng(1))[:6]
    batch = collator.batch([[examples[number] for number in row] for row in rows])
    for place, row in enumerate(rows):
        same(list(batch.lengths[place]), [int(lengths[number]) for number in row], "the lengths of a row's documents")
        start = 0
        for number in row:
            stop = start + int(lengths[number])
            for key, expected in (
                ("input_ids", examples[number].input_ids),
                ("labels", examples[number].labels),
                ("position_ids", np.arange(stop - start)),
            ):
                if not np.array_equal(getattr(batch, key)[place, start:stop], expected):
                    raise FailedError(f"{key} of a record are others in its row")
            if (batch.startend_row_indices[place, 0, start:stop, 0] != stop).any():
                raise FailedError("records of a row see each other")
            start = stop
        if (batch.labels[place, start:] != -100).any():
            raise FailedError("padding is learned")


@check("Dev data measures the same in its rows as with a row for each record.", _collates, variants)
def rows_measure_the_same(lab: Lab, case: str) -> None:
    own = lab.run(**settings_of(lab, case))
    plain = lab.run(without=True)
    for key in ("eval_loss", "eval_tokens", "eval_accuracy"):
        close(own.evaluations[0][key], plain.evaluations[0][key], key, CLOSE)


CHECKS = (
    quantizes_nearly,
    quantized_layers_multiply,
    quantized_parts_are_the_same,
    counts_each_token_alone,
    attends_by_the_formula,
    rows_hold_each_record_once,
    batches_hold_documents,
    rows_measure_the_same,
)

"""On a GPU: rotary embedding and attention, against float64."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpu_measures import NARROW, apart, dtypes, own_kernels, tensor

from sft import deterministic
from sft.models.rotary import KINDS, Rotary
from sft.testing import needs

pytestmark = pytest.mark.gpu

Row = Callable[..., None]
POSITIONS = np.stack([np.arange(4032, 4096), np.arange(64)])


def rotation_error(paddle: Any, rotary: Rotary, head: int, frequencies: np.ndarray, scale: float, dtype: str) -> float:
    """How far heads of ``head`` values, turned up to position 4095 inside the automatic casts of a run, are from those
    that float64 ``frequencies`` and ``scale`` give; or their gradient from what turns back."""
    from sft.models.turning import tables

    angles, size = POSITIONS[..., None, None] * frequencies, rotary.size
    given = tensor(paddle, np.random.default_rng(1).standard_normal((2, 64, 3, head)), dtype)
    narrow = {} if dtype == "float32" else {"dtype": dtype}
    with paddle.amp.auto_cast(enable=bool(narrow), level="O2", **narrow):
        y = own_kernels().rotate(given, rotary, *tables(rotary, POSITIONS, np.full_like(POSITIONS, 4096)))
    assert y.dtype == given.dtype
    (y.astype("float32") * y.astype("float32").detach()).sum().backward()
    wide = given.astype("float32").numpy().astype(np.float64)
    turning = wide[..., :size]
    first, second = (turning[..., 0::2], turning[..., 1::2]) if rotary.interleaved else np.split(turning, 2, -1)
    pair = (
        scale * (first * np.cos(angles) - second * np.sin(angles)),
        scale * (second * np.cos(angles) + first * np.sin(angles)),
    )
    turned = np.stack(pair, -1).reshape(turning.shape) if rotary.interleaved else np.concatenate(pair, -1)
    back = np.concatenate([scale**2 * turning, wide[..., size:]], -1)
    return max(apart(y, np.concatenate([turned, wide[..., size:]], -1)), apart(given.grad, back))


ANGLES = {"float32": 1e-4, "bfloat16": 4e-3, "float16": 1e-3}


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("size", [64, 32], ids=["whole", "part"])
def test_rotation(paddle: Any, on_gpu: bool, row: Row, interleaved: bool, size: int) -> None:
    rotary = Rotary(10_000.0, size, 4096, interleaved=interleaved)
    frequencies = 10_000.0 ** -(np.arange(size // 2) * 2 / size)
    for dtype in dtypes(on_gpu):
        kind = f"{'pairs' if interleaved else 'halves'}, {size} of 64, {dtype}"
        error = rotation_error(paddle, rotary, 64, frequencies, 1.0, dtype)
        row(f"rotary embedding, {kind}", error, ANGLES[dtype])


def test_rotation_of_every_family(paddle: Any, on_gpu: bool, cases: Path, row: Row) -> None:
    """Of all configs among the core's fixtures: bases, scalings, shares of a head and layouts as they come. Frequencies
    are float64; the core's tests hold them against published ones."""
    from sft.models.families.known import family_of

    configs = [json.loads(path.read_text()) for path in sorted(cases.parent.glob("*/*/config.json"))]
    published = json.loads((cases.parent / "published.json").read_text(encoding="utf-8"))
    configs += [entry["config"] for entry in published.values()]
    found: dict[str, tuple[Rotary, int]] = {}  # each once
    for config in configs:
        shape = family_of(config, "here").architecture(config, "here")
        found |= {f"{one}": (one, max(one.size, getattr(shape, "head_size", 0))) for one in shape.rotaries}
    assert {one.kind for one, _ in found.values()} == set(KINDS)
    for dtype in dtypes(on_gpu):
        errors = {
            name: rotation_error(paddle, rotary, head, *rotary.frequencies(4096), dtype)
            for name, (rotary, head) in found.items()
        }
        worst = max(errors, key=errors.__getitem__)
        (rotary, head), many = found[worst], f"{len(errors)} of models' configs"
        which = f"{rotary.kind}, base {rotary.base:g}, {rotary.size} of {head}"
        row(f"rotary embedding, {many}, {dtype}; worst is {which}", errors[worst], ANGLES[dtype])


def documents(length: int) -> np.ndarray:
    """int32 [1, 1, S, 1]: a row of three documents, the second of one token; or of fewer where they have no room."""
    starts = sorted({0, length // 3, min(length - 1, length // 3 + 1)})
    sizes = np.diff([*starts, length])
    return np.repeat(np.cumsum(sizes), sizes).astype(np.int32).reshape(1, 1, -1, 1)


def exact_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, slope: np.ndarray, ends: np.ndarray | None
) -> list[np.ndarray]:
    """float64, of one row: what comes out [S, H, D], and the gradients of query, key and value where ``slope``, of the
    same shape, comes back. ``ends`` None: one document."""
    length, heads, size = query.shape
    groups = heads // key.shape[1]
    place = np.arange(length)
    seen = place[:, None] >= place[None]
    if ends is not None:
        seen &= place[:, None] < ends.reshape(-1)[None]
    out, of_query, of_key, of_value = (np.zeros_like(one) for one in (query, query, key, value))
    for head in range(heads):
        q, k, v, steep = query[:, head], key[:, head // groups], value[:, head // groups], slope[:, head]
        scores = q @ k.T / np.sqrt(size)
        chances = np.exp(scores - np.where(seen, scores, -np.inf).max(-1, keepdims=True)) * seen
        chances /= chances.sum(-1, keepdims=True)
        out[:, head] = chances @ v
        of_scores = chances * (steep @ v.T - (steep * out[:, head]).sum(-1, keepdims=True)) / np.sqrt(size)
        of_query[:, head] = of_scores @ k
        of_key[:, head // groups] += of_scores.T @ q
        of_value[:, head // groups] += chances.T @ steep
    return [out, of_query, of_key, of_value]


@contextlib.contextmanager
def in_one_order(paddle: Any) -> Iterator[None]:
    """As setting ``deterministic`` has it; a build for CPUs has none of its flags."""
    before = deterministic.flags_in_effect()
    if before:
        paddle.set_flags({name: deterministic.FLAGS[name] for name in before})
    try:
        yield
    finally:
        if before:
            paddle.set_flags(before)


LONG = {(64, 8): (True,), (128, 4): (True, False), (256, 1): (True,)}
"""Sizes of heads and queries a key for which a GPU tries 4,096 tokens, too: with a mask, and without one."""


@pytest.mark.parametrize(
    "name", ["default", *(pytest.param(name, marks=needs(name)) for name in ("flash-attention", "flashmask"))]
)
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_attention(paddle: Any, on_gpu: bool, row: Row, name: str, size: int, groups: int) -> None:
    """Forward and backward against float64, of rows of documents and of one; a document that changes leaves the others
    as they were, forward and backward: on a GPU to the last bit, where sums have one order, on a CPU as far as its
    softmax does, which gives masked scores 1e-28."""
    if not on_gpu and (size, groups) != (64, 4):
        pytest.skip("a GPU tries all sizes, a CPU one")
    cases = [(length, True) for length in (1, 7, 130, 1000)] + [(length, False) for length in (7, 130)]
    cases += [(4096, masked) for masked in LONG.get((size, groups), ()) if on_gpu]
    for dtype in NARROW if on_gpu else ("float32",):
        backend = attention(paddle, name, dtype, size)
        if backend is None:
            row(f"attention by {name}, heads of {size}, {dtype}", "left to the core")
            continue
        worst = [0.0, 0.0]
        for length, masked in cases:
            heads = 8 if length < 4096 else groups  # the reference takes half a second a head there
            random, ends = np.random.default_rng(length), documents(length) if masked else None
            shapes = [(1, length, count, size) for count in (heads, heads // groups, heads // groups, heads)]
            arrays = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
            mask = backend.mask(ends)

            def work(
                arrays: list[np.ndarray], mask: Any = mask, backend: Any = backend, dtype: str = dtype
            ) -> list[Any]:
                *given, slope = (tensor(paddle, array, dtype) for array in arrays)
                y = backend.attend(*given, mask)
                (y * slope.detach()).sum().backward()
                return [y, *(one.grad for one in given)]

            found = [one.astype("float32").numpy()[0].astype(np.float64) for one in work(arrays)]
            rounded = [one.astype(dtype).astype("float32").numpy()[0] for one in map(paddle.to_tensor, arrays)]
            exact = exact_attention(*(one.astype(np.float64) for one in rounded), ends)
            # Of a single token nothing depends on query and key: their gradients are a number less itself.
            least = float(np.linalg.norm(rounded[3])) if length == 1 else 0.0
            off = [
                float(np.linalg.norm(one - other)) / max(float(np.linalg.norm(other)), least)
                for one, other in zip(found, exact, strict=True)
            ]
            worst = [max(worst[0], off[0]), max(worst[1], *off[1:])]
            if ends is None or (first := int(ends.reshape(-1)[0])) == length:
                continue
            changed = [array.copy() for array in arrays]
            for array in changed:
                array[:, :first] = random.standard_normal(array[:, :first].shape)
            with in_one_order(paddle):
                for one, other in zip(work(arrays), work(changed), strict=True):
                    kept, again = one[:, first:], other[:, first:]
                    assert bool((kept == again).all()) if on_gpu else apart(kept, again) < 1e-6
        tolerance = {"bfloat16": 2e-2, "float16": 2e-3, "float32": 1e-5}[dtype]
        row(f"attention by {name}, heads of {size}, {groups} queries a key, {dtype}", worst[0], tolerance)
        row("… gradients of queries, keys and values", worst[1], tolerance)


def attention(paddle: Any, name: str, dtype: str, size: int) -> Any:
    if name == "default":
        from sft.models.attention import DefaultAttention

        return DefaultAttention()
    from sft_attn_flashmask.backends import FlashAttention, FlashMask

    plugin: Any = {"flash-attention": FlashAttention, "flashmask": FlashMask}[name]()
    said: list[str] = []
    run: Any = SimpleNamespace(say=said.append, precision=SimpleNamespace(dtype=dtype))
    return plugin.sft_attention_backend(run=run, config=SimpleNamespace(attention_cap=None, head_size=size))

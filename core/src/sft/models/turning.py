"""Rotary position embedding at work: cosines and sines of a batch, and queries and keys turned by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from sft.models.rotary import Rotary


def tables(rotary: Rotary, positions: np.ndarray, lengths: np.ndarray) -> tuple[Any, Any]:
    """Cosines and sines, float32 [B, S, 1, size], of tokens at ``positions`` int64 [B, S] of documents that are
    ``lengths`` int64 [B, S] tokens long. Of two dimensions that turn together, x becomes x·cos - y·sin and y becomes
    y·cos + x·sin, so the first has a negative sine. Angles are float32, as those that the published models were
    trained with."""
    limit = rotary.limit
    places = positions[..., None].astype(np.float32)
    if limit is None or lengths.max(initial=0) <= limit:
        frequencies, scale = rotary.frequencies()
        angles = places * frequencies.astype(np.float32)
    else:
        different, which = np.unique(lengths, return_inverse=True)
        own = [rotary.frequencies(int(length)) for length in different]
        scale = own[0][1]
        each = np.stack([frequencies for frequencies, _ in own]).astype(np.float32)[which]
        angles = places * each.reshape(*lengths.shape, -1)
    cosines, sines = np.cos(angles) * np.float32(scale), np.sin(angles) * np.float32(scale)
    return tuple(paddle.to_tensor(_paired(*pair, rotary)[:, :, None]) for pair in ((cosines, cosines), (-sines, sines)))


def _paired(first: np.ndarray, second: np.ndarray, rotary: Rotary) -> np.ndarray:
    """[B, S, size / 2] of the first dimensions of pairs, and of the second ones → [B, S, size]."""
    if rotary.interleaved:
        return np.stack([first, second], -1).reshape(*first.shape[:-1], -1)
    return np.concatenate([first, second], -1)


def rotate(x: Any, rotary: Rotary, cosines: Any, sines: Any) -> Any:
    """Turn the first ``rotary.size`` dimensions of each head of ``x`` [B, S, heads, D]."""
    if rotary.size == x.shape[-1]:
        return _turn(x, rotary.interleaved, cosines, sines)
    turning, still = x[..., : rotary.size], x[..., rotary.size :]
    return paddle.concat([_turn(turning, rotary.interleaved, cosines, sines), still], axis=-1)


def _turn(x: Any, interleaved: bool, cosines: Any, sines: Any) -> Any:
    if x.stop_gradient or not paddle.is_grad_enabled():
        return _turned(x, interleaved, cosines, sines)
    return _Turn.apply(x, interleaved, cosines, sines)


class _Turn(paddle.autograd.PyLayer):
    """The rotation as one differentiable step: its gradient turns back, so nothing is kept but the tables, which all
    layers share. (As single operations it would keep both factors of its two products, in float32.)"""

    @staticmethod
    def forward(ctx: Any, x: Any, interleaved: bool, cosines: Any, sines: Any) -> Any:
        ctx.save_for_backward(cosines, sines)
        ctx.interleaved = interleaved
        return _turned(x, interleaved, cosines, sines)

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        cosines, sines = ctx.saved_tensor()
        return _turned(upstream, ctx.interleaved, cosines, -sines), None, None


def _turned(x: Any, interleaved: bool, cosines: Any, sines: Any) -> Any:
    if interleaved:
        partner = paddle.roll(x.reshape([0, 0, 0, -1, 2]), 1, axis=-1).reshape(x.shape)
    else:
        partner = paddle.roll(x, x.shape[-1] // 2, axis=-1)
    # In float32 whatever x is: a 16-bit cosine is wrong in the third digit.
    turned = x * cosines + partner * sines
    return turned if turned.dtype == x.dtype else turned.astype(x.dtype)

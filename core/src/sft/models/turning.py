"""Rotary position embedding at work: cosines and sines of a batch, and queries and keys turned by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from sft.models.rotary import Rotary


def tables(rotary: Rotary, positions: np.ndarray, lengths: np.ndarray) -> tuple[Any, Any]:
    """Cosines and sines, float32 [B, S, 1, size], of tokens at ``positions`` int64 [B, S] of documents that are
    ``lengths`` int64 [B, S] tokens long. Angles are float32, as those that the published models were trained with."""
    limit = rotary.limit
    places = positions[..., None].astype(np.float32)
    if limit is None or lengths.max(initial=0) <= limit:
        frequencies, scale = rotary.frequencies()
        angles = places * frequencies.astype(np.float32)
    else:
        own = {int(length): rotary.frequencies(int(length)) for length in np.unique(lengths)}
        scale = next(iter(own.values()))[1]
        each = np.stack([own[int(length)][0] for length in lengths.flat]).astype(np.float32)
        angles = places * each.reshape(*lengths.shape, -1)
    angles = np.repeat(angles, 2, -1) if rotary.interleaved else np.concatenate([angles, angles], -1)
    factor = np.float32(scale)
    return paddle.to_tensor(np.cos(angles)[:, :, None] * factor), paddle.to_tensor(np.sin(angles)[:, :, None] * factor)


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
        pairs = x.reshape([0, 0, 0, -1, 2])
        partner = paddle.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    else:
        half = x.shape[-1] // 2
        partner = paddle.concat([-x[..., half:], x[..., :half]], axis=-1)
    # In float32 whatever x is: a 16-bit cosine is wrong in the third digit.
    return (x * cosines + partner * sines).astype(x.dtype)

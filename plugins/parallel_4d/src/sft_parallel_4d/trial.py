"""Whether adapter layers compute in parts what they compute whole: tried once for each kind, before the first step.

A layer says by its ``sides`` how its tensors are divided; that its ``forward`` is then still right, nobody can read. A
norm over all inputs, taken of a part of them, would train to wrong numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import paddle
from paddle.base.framework import EagerParamBase

from sft import UsageError
from sft.models.layers import linear_weight
from sft.models.parts import part_of
from sft_parallel_4d.topology import Axis

TOLERANCE = 1e-3
"""Of the largest output, in float32: far above its noise, and far below what a forgotten sum changes."""


@paddle.no_grad()
def check(layers: Iterable[tuple[Any, str]], axis: Axis) -> None:
    """Refuse a layer whose parts compute something else; ``layers`` are whole, each with its Linear's divided side.

    Of each class and side, the layer over the smallest Linear is tried. Raises :class:`UsageError`, in all processes.
    """
    smallest: dict[tuple[type, str], tuple[Any, Any]] = {}
    for layer, side in layers:
        bases = [one for one in layer.children() if part_of(one) is not None]
        if len(bases) == 1:
            known = smallest.setdefault((type(layer), side), (layer, bases[0]))
            if _size(bases[0]) < _size(known[1]):
                smallest[type(layer), side] = (layer, bases[0])
    for (kind, side), (layer, base) in smallest.items():
        if _differs(layer, base, side, axis):
            raise UsageError(
                f"{kind.__name__} computes something else where processes share the {side}puts of its Linear (its "
                "forward needs all of them, and lacks sft.sum_over); leave its plugin out, or tensor parallelism."
            )


def _size(base: Any) -> int:
    part = part_of(base)
    return 0 if part is None else part.shape[0] * part.shape[1]


def _differs(layer: Any, base: Any, side: str, axis: Axis) -> bool:
    """Whether ``layer`` over its divided ``base`` computes something else in parts; it is left as it was."""
    (name,) = (name for name, one in layer.named_children() if one is base)
    held = {key: getattr(layer, key) for key in layer.sides if getattr(layer, key) is not None}
    training = layer.training
    # Those that begin at zero would hide what is done with them.
    moved = {key: _moved(tensor) for key, tensor in held.items()}
    part = linear_weight(base)
    whole = axis.gather(part, 0 if side == "in" else 1)
    x = _waves([1, 2, whole.shape[0]])
    layer.eval()
    try:
        setattr(layer, name, _linear(whole))
        _put(layer, held, moved)
        expected = layer(x)
        setattr(layer, name, _linear(part, part_of(base)))
        _put(layer, held, {key: _own(axis, value, layer.sides[key], side) for key, value in moved.items()})
        layer.sft_sums = {side: lambda values: axis.sum(values.clone())}
        found = layer(axis.own(x, -1) if side == "in" else x)
        found = axis.sum(found.clone()) if side == "in" else axis.gather(found, -1)
    except Exception:
        return False  # over another layer than its own; what is wrong with it is said when it is trained
    finally:
        setattr(layer, name, base)
        _put(layer, held, held)
        layer.sft_sums = {}
        if training:
            layer.train()
    scale, apart = float(expected.abs().max()), float((found - expected).abs().max())
    return apart > TOLERANCE * scale


def _moved(tensor: Any) -> Any:
    whole = tensor.detach().astype("float32")
    return (whole + _waves(whole.shape) * (0.1 * whole.abs().mean() + 0.05)).astype(tensor.dtype)


def _waves(shape: list[int]) -> Any:
    """Values between -1 and 1, the same in all processes, and of no pattern that parts of it repeat."""
    count = 1
    for length in shape:
        count *= length
    return paddle.cos(paddle.arange(count, dtype="float32") * 1.7).reshape(shape)


def _linear(weight: Any, part: Any = None) -> Any:
    # Not drawn at random: that would change what is drawn afterwards.
    begins = paddle.ParamAttr(initializer=paddle.nn.initializer.Constant(0.0))
    linear = paddle.nn.Linear(*weight.shape, weight_attr=begins, bias_attr=False)
    linear.weight.set_value(weight)
    linear.sft_part = part
    return linear


def _own(axis: Axis, value: Any, sides: tuple[str | None, ...], side: str) -> Any:
    return axis.own(value, list(sides).index(side)) if side in sides else value


def _put(layer: Any, held: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(held[key], EagerParamBase):
            layer._parameters[key] = value if value is held[key] else EagerParamBase.from_tensor(value.clone())
        else:
            setattr(layer, key, value)

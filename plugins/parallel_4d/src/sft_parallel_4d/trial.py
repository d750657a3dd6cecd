"""Whether adapter layers compute in parts what they compute whole: tried once for each kind, before the first step.

A layer says by its ``sides`` how its tensors are divided; that its ``forward`` is then still right, nobody can read. A
norm over all inputs, taken of a part of them, would train to wrong numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import paddle

from sft import UsageError
from sft.parallel import Part, mark_part, mark_sums, part_of
from sft_parallel_4d.internals import is_parameter, parameter_of
from sft_parallel_4d.topology import Axis

TOLERANCE = 1e-3
"""Of the largest output, in float32: far above its noise, and far below what a forgotten sum changes."""


def _marked_layer() -> Any:
    layer = paddle.nn.Layer()
    mark_part(layer, None)
    return layer


_EVERY = frozenset(vars(_marked_layer()))
"""What any layer has that a strategy has divided: a name that counts up, and the marks."""


class _UntriedError(Exception):
    """Why nothing can be said of a layer."""


@paddle.no_grad()
def check(layers: Iterable[tuple[Any, str]], axis: Axis, say: Callable[[str], None]) -> None:
    """Refuse a layer whose parts compute something else; ``layers`` are whole, each with its Linear's divided side.

    Of layers that differ in no attribute one is tried, as it trains; where that cannot be done ``say`` gets one line
    for each class and reason. Raises :class:`UsageError`, in all processes of ``axis``.
    """
    trials: dict[Hashable, tuple[Any, str]] = {}
    for layer, side in layers:
        trials.setdefault((side, _kind(layer)), (layer, side))
    said: set[str] = set()
    linears = _Linears(axis)
    # One after the other over Linears of one shape, of which only those of one are kept.
    for layer, side in sorted(trials.values(), key=lambda one: (one[1], _shape(one[0]))):
        name = type(layer).__name__
        try:
            differs = _differs(layer, side, axis, linears)
        except _UntriedError as reason:
            line = f"note: whether {name} computes in parts what it computes whole could not be tried ({reason})"
            if line not in said:
                say(f"{line}; compare a few steps with a run without tensor parallelism.")
            said.add(line)
            continue
        if differs:
            raise UsageError(
                f"{name} computes something else where processes share the {side}puts of its Linear (its "
                "forward needs all of them, and lacks sft.sum_over); leave its plugin out, or tensor parallelism."
            )


def _bases(layer: Any) -> list[tuple[str, Any]]:
    """The divided Linears in a layer (or what stands for them), by their names in it."""
    return [(name, one) for name, one in layer.named_children() if part_of(one) is not None]


def _shape(layer: Any) -> tuple[int, ...]:
    """Of the whole weight beneath."""
    part = next((part_of(base) for _, base in _bases(layer)), None)
    return () if part is None else part.shape


def _own_layers(layer: Any) -> list[Any]:
    """The layer and those in it, without its Linear."""
    bases = {id(base) for _, base in _bases(layer)}
    return [layer, *(one for one in layer.sublayers() if id(one) not in bases)]


def _kind(layer: Any) -> Hashable:
    """Equal for layers that can be expected to compute alike: of one class, over Linears of one shape, with tensors of
    the same shapes and with the same values in all other attributes (or the very same objects)."""
    found: list[Any] = [_shape(layer)]
    for one in _own_layers(layer):
        found.append(type(one))
        tensors = [(key, tuple(p.shape), str(p.dtype)) for key, p in one._parameters.items() if p is not None]
        found.append((tuple(tensors), *one._buffers))
        for key, value in sorted(vars(one).items()):
            if key in _EVERY:
                continue
            plain = value is None or isinstance(value, bool | int | float | str)
            tensor = (tuple(value.shape), str(value.dtype)) if isinstance(value, paddle.Tensor) else None
            found.append((key, type(value), value if plain else tensor or id(value)))
    return tuple(found)


def _differs(layer: Any, side: str, axis: Axis, linears: _Linears) -> bool:
    """Whether ``layer`` computes something else over a part of its Linear; it is left as it was."""
    bases = _bases(layer)
    if len(bases) != 1:
        raise _UntriedError(f"it holds {len(bases)} Linears of the model")
    ((name, base),) = bases
    held = {key: getattr(layer, key) for key in layer.sides if getattr(layer, key) is not None}
    # Those that begin at zero would hide what is done with them.
    moved = {key: _moved(tensor) for key, tensor in held.items()}
    whole, part = linears.of(base, side)
    x = _drawn([1, 2, whole.weight.shape[0]])
    linear = part_of(base)
    assert linear is not None
    own_x = axis.own(x, -1) if side == "in" else x
    own = {key: _own(axis, value, layer.sides[key], side, linear) for key, value in moved.items()}
    share = float(axis.answers_for(linear))
    with _kept(layer):
        try:
            setattr(layer, name, whole)
            _put(layer, held, moved)
            expected, again = _tried(lambda: layer(x), axis), _tried(lambda: layer(x), axis)
            draws = not bool((expected == again).all())
            if draws:  # which parts draw in another order
                layer.eval()
                expected = _tried(lambda: layer(x), axis)
            setattr(layer, name, part)
            _put(layer, held, own)
            mark_sums(layer, side, lambda values: axis.sum(values * share))
            found = _tried(lambda: layer(own_x), axis)
        finally:
            setattr(layer, name, base)
            _put(layer, held, held)
    found = axis.sum(found.clone()) if side == "in" else axis.whole(found, _like(linear, expected.shape, 2))
    scale, apart = float(expected.abs().max()), float((found - expected).abs().max())
    if not np.isfinite(scale):
        raise _UntriedError("what it gives is not finite")
    if not apart <= TOLERANCE * scale:
        return True
    if draws:
        raise _UntriedError("it draws by itself as it trains, and only evaluation was tried")
    return False


def _tried(forward: Callable[[], Any], axis: Axis) -> Any:
    """What ``forward`` gives, in float32; where it fails in one process no other one waits for it."""
    failure = None
    try:
        result = forward().astype("float32")
    except Exception as error:
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": .")
    if float(axis.maximum(paddle.to_tensor([float(failure is not None)]))):
        raise _UntriedError(failure or "it failed in another process")
    return result


@contextlib.contextmanager
def _kept(layer: Any) -> Iterator[None]:
    """Within it a layer trains, but drops nothing; what it changes of itself, and what it draws, is as if not done."""
    own = [(one, dict(vars(one))) for one in _own_layers(layer)]
    buffers = [(buffer, buffer.clone()) for one, _ in own for buffer in one._buffers.values() if buffer is not None]
    state = paddle.get_rng_state()
    for one, _ in own:
        one.training = True
        if "dropout" in type(one).__name__.lower() and hasattr(one, "p"):
            one.p = 0.0
    try:
        yield
    finally:
        for one, attributes in own:
            vars(one).clear()
            vars(one).update(attributes)
        for buffer, value in buffers:
            buffer.set_value(value)
        paddle.set_rng_state(state)


class _Linears:
    """Linears to try layers over, of drawn values: theirs would have to be collected."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._made: tuple[Any, tuple[Any, Any]] | None = None

    def of(self, base: Any, side: str) -> tuple[Any, Any]:
        """One as wide as the whole of ``base``, and this process's part of it."""
        part = part_of(base)
        assert part is not None
        if self._made is None or self._made[0] != (part, side):
            self._made = None
            whole = _drawn(part.shape) / part.shape[0] ** 0.5
            own = self._axis.part(whole, part)
            self._made = (part, side), (_linear(whole), _linear(own, part))
        return self._made[1]


def _moved(tensor: Any) -> Any:
    whole = tensor.detach().astype("float32")
    return (whole + _drawn(whole.shape) * (0.1 * whole.abs().mean() + 0.05)).astype(tensor.dtype)


def _drawn(shape: Iterable[int]) -> Any:
    """Values around zero, the same in all processes."""
    return paddle.to_tensor(np.random.default_rng(0).standard_normal(tuple(shape), dtype=np.float32))


def _linear(weight: Any, part: Part | None = None) -> Any:
    # Not drawn at random: that would change what is drawn afterwards.
    begins = paddle.ParamAttr(initializer=paddle.nn.initializer.Constant(0.0))
    linear = paddle.nn.Linear(*weight.shape, weight_attr=begins, bias_attr=False)
    linear.weight.set_value(weight)
    mark_part(linear, part)
    return linear


def _own(axis: Axis, value: Any, sides: tuple[str | None, ...], side: str, linear: Part) -> Any:
    return axis.part(value, _like(linear, value.shape, list(sides).index(side))) if side in sides else value


def _like(linear: Part, shape: Iterable[int], axis: int) -> Part:
    """The same part along ``axis`` of another tensor."""
    return replace(linear, shape=tuple(shape), axis=axis)


def _put(layer: Any, held: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if is_parameter(held[key]):
            layer._parameters[key] = value if value is held[key] else parameter_of(value.clone())
        else:
            setattr(layer, key, value)

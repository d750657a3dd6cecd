"""Every name of paddle's tensors that is not public and that the engine uses, beside those of fleet (``fleet.py``).

tests/test_internals_contract.py holds paddle to each, and says what breaks here where one has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
from paddle.base.framework import EagerParamBase


def parameter_of(value: Any) -> Any:
    """A parameter with the memory of ``value``."""
    return EagerParamBase.from_tensor(value)


def is_parameter(tensor: Any) -> bool:
    return isinstance(tensor, EagerParamBase)


def alias(tensor: Any, shape: list[int] | None = None) -> Any:
    """Another tensor over the same memory, which lives on where ``tensor`` is emptied."""
    return paddle._C_ops.reshape(tensor, tensor.shape if shape is None else shape)


# --- memory ---


def share(values: Any, tensor: Any) -> None:
    """Let ``tensor`` be over the memory of ``values``, which has its shape."""
    values._share_buffer_to(tensor)


def empty(tensor: Any) -> None:
    """Let it keep its shape, and no memory."""
    tensor._clear_data()


def has_memory(tensor: Any) -> bool:
    return bool(tensor._is_initialized())


def piece_over(values: Any) -> Any:
    """A parameter over the memory of the flat ``values``."""
    piece = EagerParamBase(shape=[1], dtype=values.dtype)
    piece.stop_gradient = False
    _share_flat(values, piece)
    return piece


def put_back(piece: Any, values: Any) -> None:
    """Let ``values`` have what :func:`piece_over` them has become: an optimizer may have given it another memory."""
    if piece.data_ptr() != values.data_ptr():
        paddle.assign(piece, values)
        _share_flat(values, piece)


def _share_flat(values: Any, piece: Any) -> None:
    share(values, piece)
    piece.get_tensor()._set_dims(values.shape)


# --- gradients ---


def when_reached(parameter: Any, call: Callable[[], Any]) -> None:
    """``call`` whenever backward has added to the parameter's gradient."""
    parameter._register_backward_hook(lambda *_: call())


def taken(parameter: Any) -> Any:
    """The parameter's gradient, flat and in float32, since 16 bits would lose summands beside their sum; the parameter
    has none then. None if it had none."""
    gradient = parameter.grad
    if gradient is None:
        return None
    flat = alias(gradient, [-1]).astype("float32")  # the gradient itself is empty after the next line
    parameter.clear_gradient(False)  # set_to_zero, which paddle ignores by name: it would keep zeros
    return flat


def give(parameter: Any, gradient: Any) -> None:
    """Let ``gradient`` itself be that of the parameter: to ``grad`` paddle copies, and waits for the device."""
    parameter.grad_ = gradient


# --- draws ---


def seed_now() -> int:
    """From which what is drawn on a CPU has begun, as ``paddle.seed`` was told."""
    return int(paddle.base.core.default_cpu_generator().initial_seed())

"""What every optimizer has: parameters by structured name, float32 masters, gradients as they are to be applied, a
place to compute, and state that goes into checkpoints and comes back. How values are stepped is a subclass's own
(``training/adamw.py``, or a plugin's)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import paddle

from sft.distributed.place import beside
from sft.errors import SftError
from sft.seams import ParameterGroup


class Optimizer(ABC):
    """Steps parameters that it knows by structured name. A subclass says what it keeps of each (:meth:`new_state`) and
    how it steps them (:meth:`update`); all else is here.

    For a 16-bit parameter a float32 master copy is stepped, and rounded to it, so that small updates add up. Parameters
    may lie on the host while the run computes on a GPU: then their state is there too, and they are stepped there.

    Attributes:
        elementwise: Whether each value is stepped by itself, whatever the others are, or in blocks as ``grains`` says.
            Only then may processes share the values of a parameter; otherwise a run that divides one is refused.
        grains: Of each kind of state, how many values of its parameter one number stands for, in memory order (the last
            ones may be fewer); 0: it belongs to the parameter as a whole. Kinds that are not listed have a number for
            each value, and its shape.
        groups: The parameters in their groups, as this process steps them.
        parameters: The same by name. Float32 or 16 bits, of any shape; where processes share the values of one, flat.
        values: What is stepped for each of them, float32: the parameter itself, or its master.
        kept: The state of each, by kind. Empty before the first step.
    """

    elementwise: ClassVar[bool] = False
    grains: ClassVar[Mapping[str, int]] = {}

    def __init__(self, groups: Sequence[ParameterGroup]) -> None:
        self.groups = list(groups)
        self.parameters: dict[str, Any] = {name: p for group in groups for name, p in group.parameters.items()}
        self.values: dict[str, Any] = {name: _master(p) for name, p in self.parameters.items()}
        self.kept: dict[str, dict[str, Any]] = {}

    # --- what a subclass says ---

    @abstractmethod
    def new_state(self, name: str, value: Any) -> dict[str, Any]:
        """The state of parameter ``name`` before its first step: tensors by kind, a word. ``value`` is what is stepped,
        float32. Paddle computes on its device here, and so it does in :meth:`update`."""

    @abstractmethod
    def update(self, gradients: dict[str, Any], rate: float, decay: float) -> None:
        """Step ``values`` and ``kept`` in place, for the names in ``gradients``, which are of one group.

        ``gradients`` are float32, of the values' shapes, summed, scaled and clipped, and may be changed. ``rate`` is
        the learning rate of this step and group, ``decay`` the group's weight decay. What backward has not
        reached, as an expert that no token has chosen, has a gradient of zeros: so it has where other processes' tokens
        may choose it, too. Gradients are not recorded here.
        """

    # --- what all have ---

    @paddle.no_grad()
    def step(self, rate: float, factor: float = 1.0) -> None:
        """Apply the gradients, each times ``factor``, at learning rate ``rate``, and clear them."""
        if not self.parameters:  # all that trains is in other processes
            return
        with self.__beside():
            self.__step(rate, factor)
        self.clear()

    # Names that are this class's alone: those of subclasses are theirs to choose.

    def __beside(self) -> AbstractContextManager[None]:
        """Within it paddle computes where the parameters are."""
        return beside(next(iter(self.values.values()))) if self.values else nullcontext()

    def __step(self, rate: float, factor: float) -> None:
        self.__make_state()
        gradients = {name: _gradient(parameter) for name, parameter in self.parameters.items()}
        if factor != 1.0:
            scaled, inverse = list(gradients.values()), paddle.full([1], 1.0 / factor)
            for start in range(0, len(scaled), TENSORS):  # paddle's loss scaling, many in a call: it divides
                paddle._C_ops.check_finite_and_unscale_(scaled[start : start + TENSORS], inverse)
        for group in self.groups:
            if own := {name: gradients[name] for name in group.parameters}:
                self.update(own, rate * group.learning_rate, group.weight_decay)
        for name in gradients:
            if self.values[name] is not self.parameters[name]:
                paddle.assign(self.values[name].astype(self.parameters[name].dtype), self.parameters[name])

    def __make_state(self) -> None:
        if self.kept:
            return
        kept = {name: self.new_state(name, value) for name, value in self.values.items()}
        for name, tensors in kept.items():
            for kind, tensor in tensors.items():
                self.__check(kind, list(tensor.shape), list(self.values[name].shape), name)
        self.kept = kept

    def __check(self, kind: str, shape: list[int], values: list[int], name: str) -> None:
        """What a checkpoint could not tell apart, or not cut."""
        grain = self.grains.get(kind, 1)
        wanted = values if grain == 1 else [-(-math.prod(values) // grain)] if grain else shape
        if "." in kind or kind == MASTER or shape != wanted:
            raise SftError(
                f"{type(self).__name__} keeps a tensor of {shape} as {kind!r} of {name}, which has {values} values; "
                "let its grains say how many values one number stands for (0: all). A tensor of one each has the shape "
                f"of the values, one of blocks has a single dimension, and its kind is a word other than {MASTER}."
            )

    def clear(self) -> None:
        """Clear the gradients."""
        for parameter in self.parameters.values():
            parameter.clear_gradient(False)  # set_to_zero, which paddle ignores by name: it would keep zeros

    def state(self) -> dict[str, np.ndarray]:
        """``NAME.KIND`` for what is kept of every parameter, by structured name, in the dtype in which it is kept;
        ``NAME.master`` (float32) where there is one."""
        return {key: tensor.numpy() for key, tensor in self.__tensors().items()}

    def __tensors(self) -> dict[str, Any]:
        kept = {f"{name}.{kind}": tensor for name, own in self.kept.items() for kind, tensor in own.items()}
        masters = {f"{n}.{MASTER}": value for n, value in self.values.items() if value is not self.parameters[n]}
        return {**kept, **masters}

    @paddle.no_grad()
    def load(self, state: dict[str, np.ndarray]) -> None:
        """Restore what :meth:`state` returned, for the same parameters; raises :class:`SftError` where it is of
        others."""
        with self.__beside():
            self.__make_state()
            tensors = self.__tensors()
            if set(tensors) != set(state):
                odd = sorted(set(tensors) ^ set(state))[0]
                raise SftError(f"The checkpoint's optimizer state does not fit this run (first difference: {odd}).")
            for key, tensor in tensors.items():
                tensor.set_value(state[key])


MASTER = "master"
"""The kind of state that a master copy is."""
TENSORS = 4096
"""Tensors that are scaled in a call. A GPU's kernel has a number for each in its shared memory, which holds 6,143."""


def _gradient(parameter: Any) -> Any:
    """The parameter's, float32."""
    return paddle.zeros(parameter.shape) if parameter.grad is None else _aligned(parameter.grad.astype("float32"))


def _aligned(gradient: Any) -> Any:
    """``gradient``, from where four values of a GPU's memory can be read at a time. paddle's fused AdamW reads so, and
    looks whether it can at all its tensors but these, which may be views of a buffer."""
    return gradient if gradient.data_ptr() % 16 == 0 else gradient.clone()


def _master(parameter: Any) -> Any:
    """The tensor that is stepped for ``parameter``: itself if it is float32, else a float32 copy."""
    if parameter.dtype == paddle.float32:
        return parameter
    copy = paddle.base.framework.EagerParamBase.from_tensor(parameter.astype("float32"))
    copy.stop_gradient = False
    return copy

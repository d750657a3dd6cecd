"""The model before training, beside the one that trains: what an objective compares it with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import paddle
from paddle.base.framework import EagerParamBase

from sft.distributed.parts import copy_marks
from sft.errors import UsageError
from sft.models.layers import STANDS_FOR, trainable


class Reference:
    """A model as it is when this is made, for forward passes without gradients beside those of ``model``, which trains.

    With an adapter it is the model with the adapter's places given back (:meth:`sft.Target.replace`), and takes no
    memory. Where the whole model trains, it is a copy of what trains. Make it in ``sft_objective``: there a run that
    goes on from a checkpoint still has the weights with which it began.

    Raises :class:`UsageError` where an adapter is more than such layers, so that it cannot be switched off, and where
    this process has no whole parameters to copy (sharding stage 3).

    Attributes:
        copied: Bytes of the copy in this process; 0 with an adapter.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._copies: dict[int, Any] = {}
        if any(STANDS_FOR in vars(layer) for layer in model.sublayers()):
            with _without_adapter(model):
                pass  # what could not be compared with is refused before anything is
        else:
            for name, parameter in trainable(model).items():
                self._copies[id(parameter)] = _copy(name, parameter)
        self.copied = sum(one.size * one.element_size() for one in self._copies.values())

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Within it the model computes what it did before training, in evaluation mode."""
        if not self._copies:
            with _without_adapter(self._model):
                yield
            return
        was_training, places = self._model.training, list(self._places())
        try:
            for own, name, parameter in places:
                own[name] = self._copies[id(parameter)]
            self._model.eval()
            yield
        finally:
            for own, name, parameter in places:
                own[name] = parameter
            if was_training:
                self._model.train()

    def _places(self) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """Where the model has what trains: a tied matrix is in several places."""
        for layer in self._model.sublayers(include_self=True):
            for name, parameter in layer._parameters.items():
                if id(parameter) in self._copies:
                    yield layer._parameters, name, parameter


@contextlib.contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """Within it each layer of ``model`` that has taken another's place gives it back; in evaluation mode."""
    replaced = [
        (parent, attribute, layer)
        for parent in model.sublayers(include_self=True)
        for attribute, layer in parent.named_children()
        if STANDS_FOR in vars(layer)
    ]
    was_training = model.training
    try:
        for parent, attribute, layer in replaced:
            while STANDS_FOR in vars(layer):
                layer = vars(layer)[STANDS_FOR]
            setattr(parent, attribute, layer)
        left = next(iter(trainable(model)), None)
        if left is not None:
            raise UsageError(
                f"Parameter {left} trains and is no part of an adapter that can be switched off, so there is no frozen "
                "model to compare with; train an adapter, and nothing beside it."
            )
        model.eval()
        yield
    finally:
        for parent, attribute, layer in replaced:
            setattr(parent, attribute, layer)
        if was_training:
            model.train()


@paddle.no_grad()
def _copy(name: str, parameter: Any) -> Any:
    if not parameter._is_initialized():
        raise UsageError(
            f"{name} is kept in pieces (sharding stage3), and the model before training, with which this run compares, "
            "would have to be whole; use stage2, or train an adapter."
        )
    copy = EagerParamBase.from_tensor(parameter.detach().clone())
    copy.stop_gradient = True
    copy_marks(parameter, copy)
    return copy

"""Adapter layers: made whole, as on one process, then divided as the Linear beneath is; and whole again to be saved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import paddle

from sft import UsageError
from sft.parallel import Part, copy_place, is_elsewhere, mark_part, owner_of, stage_of
from sft_parallel_4d import trial
from sft_parallel_4d.internals import empty, is_parameter, parameter_of
from sft_parallel_4d.tensor import adapters, part_beneath
from sft_parallel_4d.topology import Axis


class Adapters:
    """Those of all ``blocks``, and those at the ``outer`` ends of the model, each with the side that is the vocabulary;
    these only where there is one stage.

    ``whole`` gives the whole tensor of a parameter that has been divided, ``store`` takes a whole value for one.
    """

    def __init__(
        self, blocks: Iterable[Any], outer: Iterable[tuple[Any, str]], tensor: Axis,
        whole: Callable[[Any], Any], store: Callable[[Any, Callable[[tuple[slice, ...]], Any]], None],
    ) -> None:  # fmt: skip
        self._tensor, self._whole, self._store = tensor, whole, store
        self.is_whole = False
        """Whether layers hold whole tensors now."""
        self._layers = [pair for block in blocks for pair in adapters(block)]
        self._tried = list(self._layers)  # of the others none is in the place of a Linear
        self._layers += outer
        self._parts: dict[tuple[int, str], Part | None] = {}
        """Of each layer's tensors, by the layer's identity, what is here."""
        for layer, _ in self._layers:
            _place_as_linear(layer)

    def check(self, say: Callable[[str], None]) -> None:
        """Refuse a layer that does not say how its parameters are divided, or is wrong in it; :class:`UsageError`.
        ``say`` gets a line where that could not be tried."""
        for layer, _ in self._layers:
            own = [name for name, p in layer.named_parameters(include_sublayers=False) if p is not None]
            if not set(own) <= set(getattr(layer, "sides", {})):
                raise UsageError(
                    f"{type(layer).__name__} does not say how it is divided among processes (its class lacks sides); "
                    "leave its plugin out, or tensor and pipeline parallelism and sharding stage3."
                )
        if self._tensor.size > 1:
            # Those of other stages too: they are still here, and the process that speaks must know of all.
            trial.check(self._tried, self._tensor, say)

    @paddle.no_grad()
    def divide(self) -> None:
        """Whole tensors → what this process holds of them."""
        seen: dict[Hashable, Any] = {}
        for layer, side in self._layers:
            for name, whole in _tensors(layer):
                part = self._parts[id(layer), name] = self._part(layer, name, side, tuple(whole.shape))
                if is_parameter(whole):
                    layer._parameters[name] = self._local(layer, whole, part)
                    continue
                setattr(layer, name, self._frozen(whole, part, seen))

    @contextlib.contextmanager
    def assembled(self) -> Iterator[None]:
        """Within it, all layers hold whole tensors; what they hold at its end is divided again."""
        held: list[tuple[Any, str, str, Any]] = []
        seen: dict[Hashable, Any] = {}
        with paddle.no_grad():
            for layer, side in self._layers:
                for name, local in _tensors(layer):
                    held.append((layer, name, side, local))
                    part = self._parts[id(layer), name]
                    key = (id(local), part)
                    if key not in seen:
                        seen[key] = self._undivided(local, part)
                    _put(layer, name, seen[key], local)
        self.is_whole = True
        try:
            yield
        finally:
            self.is_whole = False
            with paddle.no_grad():
                self._take_apart(held)

    def _part(self, layer: Any, name: str, side: str, shape: tuple[int, ...]) -> Part | None:
        """What of the layer's tensor, of whole ``shape``, is this process's: it is divided where it meets the Linear's
        ``side``. None: all of it."""
        sides = list(layer.sides[name])
        if self._tensor.size == 1 or side not in sides:
            return None
        axis, linear = sides.index(side), part_beneath(layer)
        if linear is None:
            return Part(shape, axis, self._tensor.rank, self._tensor.size)
        return Part(shape, axis, linear.index, linear.count, linear.fused if side == "out" else ())

    def _local(self, layer: Any, whole: Any, part: Part | None) -> Any:
        local = whole
        if part is not None:
            local = parameter_of(self._tensor.part(whole, part))
            local.stop_gradient = whole.stop_gradient
            mark_part(local, part)
        copy_place(layer, local)
        if is_elsewhere(local):
            empty(local)
        return local

    def _frozen(self, whole: Any, part: Part | None, seen: dict[Hashable, Any]) -> Any:
        """What this process has of a frozen tensor: one and the same for all layers that share it."""
        key = (id(whole), part)
        if key not in seen:  # with the whole, whose identity must not be another's meanwhile
            seen[key] = (whole, whole if part is None else self._tensor.part(whole, part))
        return seen[key][1]

    def _undivided(self, local: Any, part: Part | None) -> Any:
        if is_parameter(local):
            return self._whole(local)
        # Frozen tensors are kept by all stages, and by all that share out experts.
        return local.clone() if part is None else self._tensor.whole(local, part)

    def _take_apart(self, held: list[tuple[Any, str, str, Any]]) -> None:
        """Put what was held back, with the values that the whole tensors have now."""
        seen: dict[Hashable, Any] = {}
        for layer, name, side, local in held:
            whole = getattr(layer, name)
            if is_parameter(local):
                layer._parameters[name] = local
                if not is_elsewhere(local):
                    self._store(local, whole.astype("float32").numpy().__getitem__)
                continue
            part = self._part(layer, name, side, tuple(whole.shape))
            setattr(layer, name, self._frozen(whole, part, seen))


def _place_as_linear(layer: Any) -> None:
    """A layer that wraps a Linear that is elsewhere is there, too."""
    for inner in layer.sublayers():
        if stage_of(inner) is not None or owner_of(inner) is not None:
            copy_place(inner, layer)
            return


def _tensors(layer: Any) -> list[tuple[str, Any]]:
    """The tensors that a layer declares and has."""
    found = [(name, getattr(layer, name)) for name in getattr(layer, "sides", {})]
    return [(name, tensor) for name, tensor in found if tensor is not None]


def _put(layer: Any, name: str, whole: Any, local: Any) -> None:
    if is_parameter(local):
        parameter = parameter_of(whole)
        parameter.stop_gradient = local.stop_gradient
        layer._parameters[name] = parameter
    else:
        setattr(layer, name, whole)

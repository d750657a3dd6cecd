"""Sharding's stage 3 (ZeRO, arXiv 1910.02054): matrices exist whole only while their block (or the embedding, or
lm_head) computes, and are asked for while the one before it does.

What trains or rests together in a layer is a unit: one flat range, of which each process of the axis keeps a slice, and
which one collective puts together. In backward blocks come in turn again, from the last one on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import paddle
from paddle import distributed

from sft_parallel_4d.fleet import Bucket
from sft_parallel_4d.internals import empty, has_memory, share
from sft_parallel_4d.offload import Host
from sft_parallel_4d.topology import Axis


class Unit(Bucket):
    """A bucket whose ``parameters`` have values only between :meth:`gather` and :meth:`release`."""

    def __init__(self, parameters: list[Any], group: Any, host: Host | None) -> None:
        frozen = [parameter for parameter in parameters if parameter.stop_gradient]
        for parameter in frozen:  # fleet makes buffers of what trains
            parameter.stop_gradient = False
        super().__init__(parameters, group, cut=True, adds=False, host=host)
        for parameter in frozen:
            parameter.stop_gradient = True
        self.let_go_of_values()
        self.held = 0
        """How many want it not to go yet."""
        self._whole: Any = None
        self._coming: tuple[Any, Any] | None = None
        self._drop()

    def _keep(self) -> Any:
        own = self.own_values()
        return own.clone() if self.host is None else self._rests(own)

    def bring(self) -> None:
        """Begin to fetch the slice from where it rests."""
        if self._brought is None and self._coming is None and self._whole is None:
            self._brought = (self.kept, lambda: None) if self.host is None else self.host.give(self.rest)

    def ask(self) -> None:
        """Begin to put the whole together."""
        if self._coming is not None or self._whole is not None:
            return
        self.bring()
        assert self._brought is not None
        (own, wait), self._brought = self._brought, None
        wait()
        if self.group.nranks == 1:
            self._coming = (own, None)
            return
        whole = paddle.empty([self.buffer_size], dtype=own.dtype)
        self._coming = (whole, distributed.stream.all_gather(whole, own, group=self.group, sync_op=False))

    @paddle.no_grad()
    def gather(self) -> None:
        """From now on the parameters have their values."""
        self.ask()
        if self._coming is None:
            return
        (self._whole, task), self._coming = self._coming, None
        if task is not None:
            task.wait()
        for parameter in self.params:
            share(self.value(parameter), parameter)

    def value(self, parameter: Any) -> Any:
        """A tensor over the memory of the parameter while that is whole."""
        return self.of(self._whole, parameter).reshape(parameter.shape)

    def release(self) -> None:
        """They have none, unless they are held."""
        if self._whole is not None and not self.held:
            self._whole = None
            self._drop()

    def _drop(self) -> None:
        for parameter in self.params:
            empty(parameter)

    def renew(self) -> None:
        """What was asked for is old."""
        if self._coming is not None:
            self.gather()
        self._brought = None
        self.release()

    def spread(self) -> None:
        """New values are spread when they are asked for."""


class Shards:
    """The matrices of this process in stage 3, cut along ``axis``."""

    def __init__(self, axis: Axis, host: Host | None) -> None:
        self._axis, self._host = axis, host
        self._loose: dict[int, Any] = {}
        """Slices of single parameters, by identity, until there are units."""
        self._of: dict[int, Unit] = {}
        self._turns: list[list[Unit]] = []
        """Of the embedding, each block and lm_head, in the order of forward."""
        self._fetched: Unit | None = None
        self.goes_back = False
        """Whether backward is under way."""

    # --- before there are units: one parameter after the other, while a model is read ---

    def takes(self, parameter: Any) -> bool:
        """Whether the parameter itself is kept in pieces: vectors are too small to be worth it."""
        return bool(parameter.ndim > 1)

    @paddle.no_grad()
    def put(self, parameter: Any, value: Any) -> None:
        """Keep this process's part of ``value``, a tensor of the parameter's shape."""
        if id(parameter) in self._of:
            self._of[id(parameter)].put(parameter, value)
            self._of[id(parameter)].renew()
            return
        flat = value.astype(parameter.dtype).reshape([-1])
        missing = -flat.shape[0] % self._axis.size
        padded = paddle.concat([flat, paddle.zeros([missing], dtype=flat.dtype)]) if missing else flat
        own = self._axis.own(padded, 0)
        self._loose[id(parameter)] = own.cpu() if self._host is not None else own.clone()

    def fetch(self, parameter: Any) -> Any:
        """The parameter's whole value. What is asked for in the order of a model is put together once a unit."""
        unit = self._of.get(id(parameter))
        if unit is None:
            return self._whole_of_loose(parameter) if id(parameter) in self._loose else parameter
        if self._fetched is not None and self._fetched is not unit:
            self._fetched.release()
        self._fetched = unit
        unit.gather()
        return unit.value(parameter)

    def _whole_of_loose(self, parameter: Any) -> Any:
        own = self._loose[id(parameter)]
        if self._host is not None and paddle.device.get_device() != "cpu":
            own = own.cuda()
        return self._axis.gather(own, 0)[: math.prod(parameter.shape)].reshape(parameter.shape)

    # --- units ---

    def build(self, layers: Sequence[tuple[Any, bool]], kinds: Any) -> list[Unit]:
        """Make units of ``layers``, which go forward in this order, and let them come and go: each while it goes
        forward, and if it says so (a block) from when its backward begins. What is of one of ``kinds``, a function of a
        parameter, is together. Returns the units that train."""
        for layer, again in layers:
            groups: dict[Any, list[Any]] = {}
            for parameter in layer.parameters():
                if self.takes(parameter) and id(parameter) not in self._of:
                    key = (str(parameter.dtype), parameter.stop_gradient, kinds(parameter))
                    groups.setdefault(key, []).append(parameter)
            for some in groups.values():
                self._make(some)
            self._turns.append(self._units(layer))
            self._let_come_and_go(layer, len(self._turns) - 1, again)
        units = dict.fromkeys(self._of.values())
        return [unit for unit in units if not unit.params[0].stop_gradient]

    def _make(self, parameters: list[Any]) -> None:
        for parameter in parameters:
            if not has_memory(parameter):
                whole = self._whole_of_loose(parameter)
                del self._loose[id(parameter)]
                share(whole, parameter)
        unit = Unit(parameters, self._axis.group, self._host)
        self._of.update((id(parameter), unit) for parameter in parameters)

    def _units(self, layer: Any) -> list[Unit]:
        found = (self._of[id(parameter)] for parameter in layer.parameters() if id(parameter) in self._of)
        return list(dict.fromkeys(found))

    def _let_come_and_go(self, layer: Any, place: int, again: bool) -> None:
        units = self._turns[place]

        def before(layer: Any, _: Any) -> None:
            self._gather(units)
            self._ask(place, back=self.goes_back)

        def after(layer: Any, inputs: tuple[Any, ...], result: Any) -> None:
            if self.goes_back:  # recomputed: its backward is next
                release_with(inputs[0])
                return
            _release(units)
            if again and paddle.is_grad_enabled() and not result.stop_gradient:
                result.register_hook(lambda _: take_turn())
                release_with(inputs[0])

        def release_with(entering: Any) -> None:
            """When the gradient of what entered is there, backward is through with the layer."""
            if not entering.stop_gradient:
                entering.register_hook(lambda _: _release(units))

        def take_turn() -> None:
            self.release()  # the layer behind has its gradients now, and may not have been told yet
            self._gather(units)
            self._ask(place, back=True)

        layer.register_forward_pre_hook(before)
        layer.register_forward_post_hook(after)

    def _gather(self, units: Iterable[Unit]) -> None:
        for unit in units:
            unit.gather()

    @paddle.no_grad()
    def _ask(self, place: int, back: bool) -> None:
        """Ask for what computes after the layer at ``place``, and fetch what comes then from where it rests. The
        embedding does not go back."""
        step = -1 if back else 1
        near, far = place + step, place + 2 * step
        first, end = (1, len(self._turns) - 1) if back else (0, len(self._turns))
        for unit in self._turns[near] if first <= near < end else ():
            unit.ask()
        for unit in self._turns[far] if first <= far < end else ():
            unit.bring()

    @contextlib.contextmanager
    def whole(self, layer: Any) -> Iterator[None]:
        """Within it, the matrices of ``layer`` exist, also where another forward pass goes through a layer of them."""
        units = self._units(layer)
        loose = [parameter for parameter in layer.parameters() if id(parameter) in self._loose]
        self._gather(units)
        if units and units == self._turns[-1] and paddle.is_grad_enabled():
            self._ask(len(self._turns) - 1, back=True)
        for parameter in loose:
            share(self._whole_of_loose(parameter), parameter)
        for unit in units:
            unit.held += 1
        try:
            yield
        finally:
            for unit in units:
                unit.held -= 1
            _release(units)
            for parameter in loose:
                empty(parameter)

    def release(self) -> None:
        """Keep slices alone, of all."""
        _release(self._of.values())


def _release(units: Iterable[Unit]) -> None:
    for unit in units:
        unit.release()

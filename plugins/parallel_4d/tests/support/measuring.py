"""A rank of a real run that counts: what it holds, the most it needs at a time, and what it sends.

``train(settings, rows, length)`` is for ``run_ranks``; each micro-batch has ``rows`` full rows of ``length`` tokens.
"""

from __future__ import annotations

import collections
import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import sft
from sft.plugins.requests import by_device

STEPS = 2
PLAIN = [f"no:{name}" for name in by_device({})]
"""A plan is for paddle's own operations."""


class Allocator:
    """Bytes that paddle's CPU allocator has handed out."""

    def __init__(self) -> None:
        from paddle.base import core

        gc.collect()
        self._core, self._start = core, 0
        self._start = self.now()

    def now(self) -> int:
        return int(self._core.host_memory_stat_current_value("Allocated", 0)) - self._start

    def peak(self) -> int:
        return int(self._core.host_memory_stat_peak_value("Allocated", 0)) - self._start

    def forget(self) -> None:
        self._core.host_memory_stat_reset_peak_value("Allocated", 0)


class FullRows:
    """A collator whose batches have ``length`` tokens a row, each a target, whatever the records are."""

    packs = False

    def __init__(self, length: int, vocabulary: int) -> None:
        self._length, self._vocabulary = length, vocabulary

    def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        return [(number,) for number in range(len(lengths))]

    def batch(self, rows: Any) -> sft.Batch:
        return full_batch(len(rows), self._length, self._vocabulary)


def full_batch(rows: int, length: int, vocabulary: int) -> sft.Batch:
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, length))
    positions, ends = np.tile(np.arange(length), (rows, 1)), np.full((rows, 1, length, 1), length, np.int32)
    return sft.Batch(ids, ids, positions, ends, ((length,),) * rows)


class Sent:
    """Counts the operations of each axis, and what rings would send of them, in bytes."""

    SHARES = {
        **{"all_reduce": 2.0, "reduce_scatter_tensor": 1.0, "all_gather_into_tensor": 1.0, "all_gather": 1.0},
        "all_to_all_single": 1.0,
    }

    def __init__(self) -> None:
        self.bytes: collections.Counter[str] = collections.Counter()
        self.calls: collections.Counter[str] = collections.Counter()
        self.names: dict[int, str] = {}

    def watch(self, topology: Any) -> None:
        import groups

        for name in ("data", "sharding", "tensor", "pipe", "context"):
            axis = getattr(topology, name)
            if axis.size > 1:
                self.names[id(axis.group.process_group)] = name
        for operation, share in self.SHARES.items():
            self._wrap(groups.ProcessGroup, operation, share)
        self._wrap(groups.ProcessGroup, "send", None)

    def _wrap(self, group_class: Any, operation: str, share: float | None) -> None:
        own: Callable[..., Any] = getattr(group_class, operation)

        def counted(group: Any, first: Any, second: Any = None, *arguments: Any, **more: Any) -> Any:
            name, size = self.names.get(id(group)), group.size()
            if name is not None:
                self.calls[name] += 1
                if share is None:
                    self.bytes[name] += _bytes(first)
                else:
                    # The whole is what is reduced, what is scattered, and what parts are gathered to.
                    if operation == "all_gather":
                        whole = _bytes(second) * size
                    else:
                        whole = _bytes(second if operation == "reduce_scatter_tensor" else first)
                    self.bytes[name] += round(share * whole * (size - 1) / size)
            return own(group, first, second, *arguments, **more)

        setattr(group_class, operation, counted)


def _bytes(tensor: Any) -> int:
    return math.prod(tensor.shape) * int(tensor.element_size())


def train(settings: dict[str, Any], rows: int, length: int) -> dict[str, Any]:
    """Take STEPS steps of a run; what was found in all but the first one."""
    from sft.training import groups

    sent, found, optimizers = Sent(), {}, []
    make_optimizer = groups.make_optimizer

    def caught(run: sft.Run) -> Any:
        optimizers.append(make_optimizer(run))
        return optimizers[-1]

    groups.make_optimizer = caught

    class Measure(sft.Plugin):
        name = "measure"
        api_version = 1

        @sft.hookimpl
        def sft_collator(self, run: sft.Run) -> FullRows:
            return FullRows(length, 64)

        @sft.hookimpl
        def sft_model_config(self, run: sft.Run | None, config: Any) -> None:
            if run is None:  # as a plan is checked
                return
            self.memory = Allocator()

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            if hasattr(run.strategy, "_at"):
                sent.watch(run.strategy._at)

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] == STEPS:
                found["peak"], found["rests"] = self.memory.peak(), self.memory.now()
                found["calls"] = {name: count // (STEPS - 1) for name, count in sent.calls.items()}
                found["sent"] = {name: count // (STEPS - 1) for name, count in sent.bytes.items()}
                found.update(held(run, optimizers[0]))
            if record["step"] == 1:
                self.memory.forget()
                sent.bytes.clear()
                sent.calls.clear()

    fixed = {"max_steps": STEPS, "do_eval": False, "per_device_train_batch_size": rows, "disable_tqdm": True}
    sft.run({**settings, **fixed}, plugins=(Measure,), say=lambda text: None)
    return found


def held(run: sft.Run, optimizer: Any) -> dict[str, Any]:
    """Bytes of parameters that are allocated, or of the buffers that they are views of, with tensors that layers hold
    beside them; of slices, of optimizer state, and of each bucket of gradients, on this rank."""
    import paddle

    ways, units = [], []
    if hasattr(run.strategy, "_buckets"):
        ways = [way.bucket for way in run.strategy._buckets._ways]
    buckets = [bucket for bucket in ways if bucket.cut]
    if getattr(run.strategy, "_shards", None) is not None:
        units = list(dict.fromkeys(run.strategy._shards._of.values()))
    plain = [bucket for bucket in buckets if bucket not in units]
    views = {id(parameter) for bucket in plain for parameter in bucket.params}
    apart = [parameter for parameter in run.model.parameters() if id(parameter) not in views]
    own = [vars(layer).values() for layer in run.model.sublayers(include_self=True)]
    flat = [one for values in own for value in values for one in (value if isinstance(value, tuple) else (value,))]
    beside = {one.data_ptr(): _bytes(one) for one in flat if isinstance(one, paddle.Tensor)}
    return {
        "parameters": sum(beside.values())
        + sum(_bytes(one) for one in [*apart, *(b.param_storage for b in plain)] if one._is_initialized()),
        "pieces": sum(_bytes(one.kept) for one in [*units, *(b for b in plain if b.host is not None)]),
        "buckets": [4 * int(bucket.buffer_size) for bucket in ways],
        "stage": run.strategy._at.pipe.rank if hasattr(run.strategy, "_at") else 0,
        "optimizer": sum(array.nbytes for array in optimizer.state().values()),
        "tensors_elsewhere": sum(not p.stop_gradient for p in run.model.parameters()) - len(optimizer.parameters),
    }

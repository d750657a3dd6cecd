"""The parallel strategy: sft's seam over data, sharding, context, tensor and pipeline parallelism."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from sft import Batch, Learning, ParameterGroup, UsageError, linear_weight
from sft.parallel import (
    Part,
    Piece,
    hidden_states,
    is_elsewhere,
    linear_features,
    owner_of,
    part_of,
    set_value,
    sum_of_squares,
    whole_shape,
)
from sft_parallel_4d.adapters import Adapters
from sft_parallel_4d.buckets import Buckets, Kinds, as_met, of_experts, shared_by
from sft_parallel_4d.context import ContextParallel
from sft_parallel_4d.experts import ExpertParallel
from sft_parallel_4d.idle import evaluating, nothing
from sft_parallel_4d.internals import give
from sft_parallel_4d.offload import Host
from sft_parallel_4d.options import BUCKET
from sft_parallel_4d.phases import Phases, phase
from sft_parallel_4d.pipeline import Pipeline
from sft_parallel_4d.sharding import Shards
from sft_parallel_4d.tensor import TensorParallel, outer_adapters
from sft_parallel_4d.topology import Axis, Topology

if TYPE_CHECKING:
    from sft import Run
    from sft_parallel_4d.watch import Watch


class Parallel:
    """See :class:`sft.ParallelStrategy` for what each member means."""

    def __init__(self, run: Run, topology: Topology, watch: Watch | None = None, bucket: int = BUCKET) -> None:
        """``bucket``: bytes of gradients that travel together."""
        plan = topology.plan
        self.phases = Phases(watch, meets=paddle.device.get_device() == "cpu")
        self._run, self._at = run, topology
        self.data_rank, self.data_world = topology.data_rank, plan.data_world
        self.draw_rank = topology.replica + plan.data_world * plan.context * topology.pipe.rank
        self.is_main = topology.world.rank == 0
        self.is_first = topology.tensor.rank == topology.pipe.rank == topology.context.rank == 0
        self._tensor = TensorParallel(topology.tensor, plan.sequence, topology.world) if plan.tensor > 1 else None
        self._experts = ExpertParallel(topology.data, plan.experts, topology.world) if plan.experts > 1 else None
        host = Host() if plan.offload else None
        self._shards = Shards(topology.sharding, host) if plan.stage == 3 else None
        self._buckets = Buckets(topology, plan.stage, bucket, host)
        self._context = ContextParallel(topology.context, plan.stream_parts) if plan.context > 1 else None
        self._pipe: Pipeline | None = None
        self._trained: dict[str, Any] = {}
        self._all: list[tuple[str, Any]] | None = None
        self._adapters: Adapters | None = None

    # --- the model ------------------------------------------------------------------------------------------

    def divide(self, model: Any) -> None:
        if self._tensor is not None:
            self._tensor.divide(model)
        if self._at.pipe.size > 1:
            self._pipe = Pipeline(self._at.pipe, len(model.architecture.blocks), self._at.plan.virtual)
            self._pipe.divide(model)
        if self._experts is not None:
            self._experts.divide(model)

    def parameters(self, model: Any) -> Iterable[tuple[str, Any]]:
        return list(model.named_parameters()) if self._all is None else self._all

    def store(self, parameter: Any, read: Callable[[tuple[slice, ...]], np.ndarray]) -> None:
        part = part_of(parameter) or Part(tuple(parameter.shape), 0, 0, 1)
        value = part.read(read)
        if self._shards is not None and self._shards.takes(parameter):
            self._shards.put(parameter, paddle.to_tensor(np.ascontiguousarray(value, np.float32)))
            return
        set_value(parameter, value)
        self._buckets.put(parameter)

    @phase("reading whole weights")
    def linear_weight(self, layer: Any) -> Any:
        weight = None
        if not is_elsewhere(layer):
            with self._whole(layer):
                weight = linear_weight(layer).clone()
            weight = self._undivided(weight, part_of(layer))
        if weight is None:
            weight = paddle.empty(list(linear_features(layer) or ()), dtype="float32")
        return self._for_all(layer, weight.contiguous())

    def _for_all(self, marked: Any, value: Any) -> Any:
        """The ``value`` of a parameter or a Linear, from the process that has it; elsewhere ``value`` is a tensor as
        large, which may be overwritten."""
        owner = owner_of(marked)
        if owner is not None and self._experts is not None:
            value = self._experts.axis.broadcast(value, owner)
        return value if self._pipe is None else self._at.pipe.broadcast(value, self._pipe.stage_of(marked))

    def _whole(self, layer: Any) -> contextlib.AbstractContextManager[None]:
        """Within it, what sharding keeps of ``layer`` in pieces is whole."""
        return contextlib.nullcontext() if self._shards is None else self._shards.whole(layer)

    def _undivided(self, tensor: Any, part: Part | None) -> Any:
        return tensor if part is None else self._at.tensor.whole(tensor.detach(), part)

    def connect(self, model: Any) -> None:
        pipe, backbone = self._pipe, model.model
        outer = outer_adapters(model)
        if outer and (pipe is not None or self._at.plan.stage == 3):
            raise UsageError(
                "The embedding or lm_head is adapted, or some of their rows train, which pipeline parallelism and "
                "sharding stage3 do not divide; leave these out (tensor and data parallelism, stage1 and stage2 do), "
                "or train neither of the two."
            )
        self._adapters = Adapters(backbone.layers, outer, self._at.tensor, self._whole_value, self.store)
        if self._at.plan.stage == 3 or self._at.tensor.size * self._at.pipe.size * self._at.plan.experts > 1:
            self._adapters.check(self._run.say)
        self._adapters.divide()
        self._all = list(model.named_parameters())
        if pipe is not None:
            pipe.leave_out(model, None if self._tensor is None else self._tensor.meeting)
        if self._experts is not None:
            self._experts.connect(model)
        if self._tensor is not None:
            self._tensor.connect(model)
        if self._context is not None:
            self._context.connect(model)
        self._trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
        tied = {id(p) for p in self._trained.values() if pipe is not None and pipe.is_tied(p)}
        kinds = Kinds(self._summed_over, of_experts(backbone.layers), shared_by(backbone.layers), tied)
        units: list[Any] = []
        if self._shards is not None:  # without pipelines, so that all of the model is here
            layers = [(backbone.embed_tokens, False), *((block, True) for block in backbone.layers)]
            units = self._shards.build([*layers, (model.lm_head, False)], kinds.of)
        self._buckets.build(as_met(self._trained, model.architecture.norms), kinds, units)

    @contextlib.contextmanager
    def assembled(self, model: Any) -> Iterator[None]:
        assert self._adapters is not None
        with contextlib.ExitStack() as stack:
            if not self._adapters.is_whole:  # a checkpoint asks within what it has asked for
                with self.phases.within("collecting adapters"):
                    stack.enter_context(self._adapters.assembled())
            yield

    # --- training -------------------------------------------------------------------------------------------

    def share(self, groups: list[ParameterGroup]) -> list[ParameterGroup]:
        at = self._buckets
        groups = [
            replace(group, parameters={name: at.piece(p) for name, p in group.parameters.items() if at.holds(p)})
            for group in groups
        ]
        return [group for group in groups if group.parameters]

    @phase("forward and backward")
    def accumulate(self, learning: Learning, batches: Sequence[Batch]) -> Any:
        real, idle, losses = len(batches), learning.idle(), []
        batches = self._even(batches, lambda: learning.most)
        self._buckets.begin(len(batches))
        if self._tensor is not None:
            self._tensor.seed_dropout()

        def learning_of(batch: Batch) -> Learning:
            return idle if any(batch is one for one in batches[real:]) else learning

        def mode_of(own: Learning) -> contextlib.AbstractContextManager[None]:
            return evaluating(self._run.model) if own is idle else contextlib.nullcontext()

        def forward(batch: Batch, received: Any) -> Any:
            """What the next part of the model gets; in the last one, the loss."""
            own = learning_of(batch)
            with mode_of(own):
                hidden = own.forward(batch, received, self.phases.go_on)
                return self._finished(hidden, lambda hidden: own.loss(hidden, batch))

        def backward(output: Any, batch: Batch, upstream: Any | None = None) -> None:
            own = learning_of(batch)
            with _flag(self._shards, "goes_back"), mode_of(own):
                own.backward(output, upstream)
            self._buckets.passed()
            if upstream is None and own is not idle:  # read at the end: a reading waits for the device
                losses.append(output.detach().astype("float64"))
            self.phases.go_on()

        with self._together():
            if self._pipe is not None:
                self._pipe.train(batches, self._stream_shape, self._run.precision.weights, forward, backward)
            else:
                for batch in batches:
                    backward(forward(batch, None), batch)
                    if self._shards is not None:
                        self._shards.release()
        self._reduce_gradients()
        return paddle.add_n(losses) if losses else 0.0  # not read: outcome() does, with all the rest

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Within it a model computes what processes share."""
        tensor, context = self._tensor, self._context
        with (
            _flag(None if tensor is None else tensor.meeting, "active"),
            _flag(None if context is None else context.attention, "active"),
        ):
            yield

    def _even(self, batches: Sequence[Batch], most: Callable[[], int]) -> list[Batch]:
        """``batches``, and idle ones after them where another process has more, which has ``most`` (sharding stages 2
        and 3 wait for all processes at each micro-batch, and so do experts of whom each has some), or where a
        pipeline's schedule takes more."""
        even = [self._fit(batch) for batch in batches]
        if self._experts is not None or self._at.plan.stage >= 2:
            even += [self._fit(nothing())] * (most() - len(even))
        if self._pipe is not None and even:
            even += [self._fit(nothing())] * (self._pipe.least - len(even))
        return even

    def _fit(self, batch: Batch) -> Batch:
        """What of ``batch`` this process computes, and padding that lets processes divide it."""
        if self._context is not None:
            batch = self._context.share(batch)
        return batch if self._tensor is None else self._tensor.fit(batch)

    def _finished(self, hidden: Any, finish: Callable[[Any], Any]) -> Any:
        """What the next part of the model gets of the hidden states here; in the last what ``finish`` makes of it."""
        if self._pipe is not None and not self._pipe.last:
            return hidden.astype(self._run.precision.weights)
        with self._whole(self._run.model.lm_head):  # no longer: the loss has its gradients before backward
            return finish(hidden)

    def _stream_shape(self, batch: Batch) -> list[int]:
        rows, length = batch.input_ids.shape
        return [rows, length // self._at.plan.stream_parts, self._run.source.architecture.hidden]

    def _summed_over(self, parameter: Any) -> tuple[Axis, ...]:
        """The axes, beside sharding's, over which a gradient of ``parameter`` is summed."""
        data = self._at.data if self._experts is None else self._experts.summed_over(parameter)
        axes = (data, data if self._tensor is None else self._tensor.summed_over(parameter))
        return tuple(dict.fromkeys(axis for axis in axes if axis.size > 1))

    @paddle.no_grad()
    def _reduce_gradients(self) -> None:
        """Sums over all micro-batches and processes, of what each process steps."""
        buckets = self._buckets
        buckets.finish()
        for parameter in self._trained.values():
            if self._pipe is not None and self._pipe.is_tied(parameter) and buckets.holds(parameter):
                piece = buckets.piece(parameter)
                if piece.grad is None:
                    give(piece, paddle.zeros(piece.shape, dtype="float32"))
                self._add_other_end(piece)

    def _add_other_end(self, parameter: Any) -> None:
        """A tied matrix is in the first stage and in the last: each adds the other's gradient."""
        pipe = self._at.pipe
        other = pipe.size - 1 if pipe.rank == 0 else 0
        theirs = paddle.empty_like(parameter.grad)
        pipe.exchange([(parameter.grad.clone(), other)], [(theirs, other)])
        parameter.grad.add_(theirs)

    def grad_norm(self, stepped: Mapping[str, Any]) -> float:
        return self.outcome(0.0, (), stepped)[-1]

    @phase("the loss and the gradient norm")
    def outcome(self, loss: Any, values: Sequence[float], stepped: Mapping[str, Any]) -> list[float]:
        """In one sum over all processes, which is all that is read of what a step has computed: each number comes from
        those that have something of their own to it."""
        pieces = self.pieces(stepped)
        squares = sum_of_squares(tensor for name, tensor in stepped.items() if pieces[name].written)
        speaks = self._at.tensor.rank == 0 and (self._pipe is None or self._pipe.last)
        counts = speaks and self._at.context.rank == 0  # who share rows have the loss of their tokens, and all values
        numbers = [loss if speaks else 0.0, *(values if counts else [0.0] * len(values)), squares]
        found = self._at.world.sum(paddle.concat([_number(one) for one in numbers])).tolist()
        return [*found[:-1], math.sqrt(found[-1])]

    @phase("spreading new values")
    def updated(self) -> None:
        self._buckets.spread()

    @phase("evaluation")
    def scores(
        self, model: Any, batches: Sequence[Batch], score: Callable[[Any, Batch], Sequence[float]], count: int
    ) -> list[float]:
        real, scores = len(batches), []
        batches = self._even(batches, lambda: int(self.largest(real)))

        def forward(batch: Batch, received: Any) -> Any:
            """What the next stage gets; in the last one, the scores are noted."""
            self.phases.go_on()
            own = hidden_states(model, batch, received)
            return self._finished(own, lambda hidden: scores.append(score(hidden, batch)))

        with self._together():
            if self._pipe is not None:
                self._pipe.measure(batches, self._stream_shape, self._run.precision.weights, forward)
            else:
                for batch in batches:
                    forward(batch, None)
                    if self._shards is not None:
                        self._shards.release()
        own = scores[:real]  # idle ones come last
        sums = [float(sum(each[number] for each in own)) for number in range(count)]
        return self._at_last_stage(paddle.to_tensor(sums, dtype="float64"))

    def _at_last_stage(self, values: Any) -> list[float]:
        """What the last stage of a pipeline knows, for all, of whole rows: float64 tensors of one shape."""
        values = self._at.context.sum(values.reshape([-1]))
        return list(self._at.pipe.broadcast(values, self._at.pipe.size - 1).tolist())

    @contextlib.contextmanager
    def answering(self) -> Iterator[Callable[[], None]]:
        together = contextlib.nullcontext() if self._pipe is None else self._pipe.answering(self._run.precision.weights)
        with self.phases.within("answers"), together:
            yield self.phases.go_on

    def sum(self, values: Sequence[float]) -> list[float]:
        # Those that read the same rows all know these: one of them counts.
        own = values if self.is_first else [0.0] * len(values)
        return self.phases.exchange("sums over data ranks", own, "sum")

    def largest(self, value: float) -> float:
        return self.phases.exchange("comparing", [value], "largest")[0]

    # --- what is written ------------------------------------------------------------------------------------

    @paddle.no_grad()
    def whole(self, parameters: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        with self.phases.within("collecting whole tensors"):
            for name, parameter in parameters:
                self.phases.go_on()
                yield name, self._whole_value(parameter)

    def _whole_value(self, parameter: Any) -> Any:
        if is_elsewhere(parameter):
            whole = paddle.empty(list(whole_shape(parameter)), dtype=parameter.dtype)
        else:
            value = parameter if self._shards is None else self._shards.fetch(parameter)
            whole = self._undivided(value.detach(), part_of(parameter))
        divided = self._pipe is not None or owner_of(parameter) is not None
        return self._for_all(parameter, whole.clone()) if divided else whole

    def pieces(self, stepped: Mapping[str, Any]) -> Mapping[str, Piece]:
        found = {}
        for name in stepped:
            parameter = self._trained[name]
            part = part_of(parameter) or Part(tuple(parameter.shape), 0, 0, 1)
            start, stop = self._buckets.bounds(parameter)
            first = self._at.data.rank == 0 if self._experts is None else self._experts.writes(parameter)
            written = first and self._at.tensor.answers_for(part)
            if self._pipe is not None and self._pipe.stage_of(parameter) != self._at.pipe.rank:
                written = False  # the last stage's copy of a tied matrix
            found[name] = Piece(part, start, stop, written)
        return found

    def own_file(self, stem: str) -> str:
        return f"{stem}-{self._at.world.rank:05d}" if self._at.plan.devices > 1 else stem

    def wait(self) -> None:
        self.phases.exchange("waiting for all", [], "sum")


@contextlib.contextmanager
def _flag(owner: Any | None, name: str) -> Iterator[None]:
    """``owner.name`` is true meanwhile."""
    if owner is None:
        yield
        return
    setattr(owner, name, True)
    try:
        yield
    finally:
        setattr(owner, name, False)


def _number(value: Any) -> Any:
    """A float64 tensor [1] on the device that computes, which nobody reads for that."""
    if isinstance(value, float):
        return paddle.to_tensor([value], dtype="float64")
    rests = value.place.is_cpu_place() and paddle.device.get_device() != "cpu"
    return (value.cuda() if rests else value).reshape([1])

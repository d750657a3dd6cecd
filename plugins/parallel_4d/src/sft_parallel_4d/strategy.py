"""The parallel strategy: sft's seam over data, sharding, tensor and pipeline parallelism."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import paddle

from sft import Batch, ParameterGroup
from sft.models.attention import hidden_states
from sft.models.layers import linear_features, linear_weight
from sft.models.parts import Part, is_elsewhere, part_of
from sft.training.loss import target_loss, target_scores
from sft.training.pieces import Piece
from sft.training.strategy import set_value, squares
from sft_parallel_4d.adapters import Adapters
from sft_parallel_4d.pipeline import Pipeline
from sft_parallel_4d.sharding import Shards, here
from sft_parallel_4d.tensor import TensorParallel
from sft_parallel_4d.topology import Topology

if TYPE_CHECKING:
    from sft import Run
    from sft.models.loading import ModelSource
    from sft_parallel_4d.watch import Watch


Result = TypeVar("Result")


def _phase(name: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Marks a method in which processes wait for each other; where one is missing for long, the watch says so."""

    def mark(method: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(method)
        def watched(self: Parallel, *arguments: Any) -> Result:
            with self._waiting(name):
                return method(self, *arguments)

        return watched

    return mark


class Parallel:
    """See :class:`sft.ParallelStrategy` for what each member means."""

    def __init__(self, run: Run, topology: Topology, watch: Watch | None = None) -> None:
        plan = topology.plan
        self._watch, self._waits = watch, False
        self._run, self._at = run, topology
        self.data_rank, self.data_world = topology.data_rank, plan.data_world
        self.draw_rank = topology.data_rank + plan.data_world * topology.pipe.rank
        self.is_main = topology.world.rank == 0
        self.is_first = topology.tensor.rank == topology.pipe.rank == 0
        self._tensor = TensorParallel(topology.tensor, plan.sequence) if plan.tensor > 1 else None
        self._shards = Shards(topology.sharding, plan.stage, plan.offload, self._complete) if plan.stage else None
        self._pipe: Pipeline | None = None
        self._partial: set[int] = set()
        self._trained: dict[str, Any] = {}
        self._all: list[tuple[str, Any]] | None = None
        self._adapters: Adapters | None = None

    @contextlib.contextmanager
    def _waiting(self, phase: str) -> Iterator[None]:
        """A phase, unless it is part of another one."""
        outermost = self._watch is not None and not self._waits
        if self._watch is not None and outermost:
            self._watch.enter(phase)
            self._waits = True
        yield
        if self._watch is not None and outermost:
            self._waits = False
            self._watch.leave()

    def _go_on(self) -> None:
        if self._watch is not None:
            self._watch.go_on()

    # --- the model ------------------------------------------------------------------------------------------

    def divide(self, model: Any, source: ModelSource) -> None:
        self._scales = source.family.scales_embeddings
        if self._tensor is not None:
            self._tensor.divide(model)
        if self._at.pipe.size > 1:
            self._pipe = Pipeline(self._at.pipe, source.config.num_hidden_layers)
            self._pipe.divide(model)

    def parameters(self, model: Any) -> Iterable[tuple[str, Any]]:
        return list(model.named_parameters()) if self._all is None else self._all

    def store(self, parameter: Any, read: Callable[[tuple[slice, ...]], np.ndarray]) -> None:
        part = part_of(parameter)
        value = read(part.where if part else tuple(slice(0, length) for length in parameter.shape))
        if self._shards is not None and self._shards.takes(parameter):
            self._shards.put(parameter, paddle.to_tensor(np.ascontiguousarray(value)))
            return
        set_value(parameter, value)
        if self._shards is not None and self._shards.has(parameter):
            self._shards.put(parameter, parameter)

    @_phase("reading whole weights")
    def linear_weight(self, layer: Any) -> Any:
        weight = None
        if not is_elsewhere(layer):
            local = layer if hasattr(layer, "dequantize") else _Fetched(self._fetch(layer.weight))
            weight = self._undivided(linear_weight(local), part_of(layer))
        if self._pipe is None:
            return weight
        if weight is None:
            weight = paddle.empty(list(linear_features(layer) or ()), dtype="float32")
        return self._at.pipe.broadcast(weight.contiguous(), self._pipe.stage_of(layer))

    def _fetch(self, parameter: Any) -> Any:
        return parameter if self._shards is None else self._shards.fetch(parameter)

    def _undivided(self, tensor: Any, part: Part | None) -> Any:
        return tensor if part is None else self._at.tensor.gather(tensor.detach(), part.axis)

    def connect(self, model: Any) -> None:
        pipe, backbone = self._pipe, getattr(model, model.base_model_prefix)
        blocks = pipe.blocks(model) if pipe is not None else ((block, 0) for block in backbone.layers)
        self._adapters = Adapters(
            blocks,
            self._at.tensor,
            self._at.pipe if pipe is not None else None,
            lambda parameter: next(self.whole([("", parameter)]))[1],
            self.store,
        )
        if self._at.plan.stage == 3 or self._at.tensor.size * self._at.pipe.size > 1:
            self._adapters.check()
        self._adapters.divide()
        self._all = list(model.named_parameters())
        if pipe is not None:
            pipe.leave_out(model, self._scales)
        first, last = (pipe.first, pipe.last) if pipe is not None else (True, True)
        if self._tensor is not None:
            self._tensor.connect(model, first, last)
            self._partial = self._tensor.partial(model)
        self._trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
        if self._shards is not None:
            if self._shards.stage == 3:
                for parameter in model.parameters():
                    if self._shards.takes(parameter) and parameter._is_initialized():
                        self._shards.put(parameter, parameter)
                        parameter._clear_data()
                for layer in backbone.layers:
                    self._shards.unit(layer)
                for layer in (backbone.embed_tokens, model.lm_head):
                    self._shards.unit(layer, again=False)
            self._shards.watch(self._trained.values())

    @contextlib.contextmanager
    def assembled(self, model: Any) -> Iterator[None]:
        assert self._adapters is not None
        with contextlib.ExitStack() as stack:
            with self._waiting("collecting adapters"):
                stack.enter_context(self._adapters.assembled())
            yield

    # --- training -------------------------------------------------------------------------------------------

    def share(self, groups: list[ParameterGroup]) -> list[ParameterGroup]:
        if self._shards is None:
            return groups
        return [
            ParameterGroup(
                group.name,
                {name: self._shards.piece(parameter) for name, parameter in group.parameters.items()},
                group.learning_rate,
                group.weight_decay,
            )
            for group in groups
        ]

    @_phase("forward and backward")
    def backward(self, model: Any, batches: Sequence[Batch], loss_scale: float) -> float:
        batches, scales = self._even(batches, loss_scale)
        losses: list[float] = []
        if self._tensor is not None:
            self._tensor.seed_dropout()

        def forward(batch: Batch, received: Any) -> Any:
            self._run.hook.sft_micro_batch(run=self._run, batch=batch)
            self._go_on()
            with self._run.precision.autocast():
                return self._forward(model, batch, received, self._loss)

        def start(loss: Any) -> None:
            scale = scales[len(losses)]
            with self._going_back():
                (loss * scale).backward()
            losses.append(float(loss) if scale else 0.0)
            self._go_on()

        with self._working():
            if self._pipe is not None:
                self._pipe.train(batches, self._stream_shape, self._run.precision.weights, forward, start)
            else:
                for batch in batches:
                    start(forward(batch, None))
                    if self._shards is not None:
                        self._shards.release()
        self._reduce_gradients()
        return self._at_last_stage([sum(losses)])[0]

    def _even(self, batches: Sequence[Batch], loss_scale: float) -> tuple[list[Batch], list[float]]:
        """As many micro-batches as any other process has, and the factor of each: where stages 2 and 3 wait for all at
        each of them, some must be gone through in vain."""
        found = [self._fit(batch) for batch in batches]
        scales = [loss_scale] * len(found)
        if self._shards is not None and self._shards.stage >= 2:
            most = int(self._at.world.maximum(paddle.to_tensor([len(found)], dtype="int64")))
            found += [self._fit(_nothing())] * (most - len(found))
            scales += [0.0] * (most - len(scales))
        return found, scales

    def _fit(self, batch: Batch) -> Batch:
        return batch if self._tensor is None else self._tensor.fit(batch)

    def _forward(self, model: Any, batch: Batch, received: Any, finish: Callable[..., Any]) -> Any:
        hidden = hidden_states(model, batch, received)
        if self._pipe is not None and not self._pipe.last:
            return hidden.astype(self._run.precision.weights)
        if self._shards is None or self._shards.stage < 3:
            return finish(model, hidden, batch)
        self._shards.gather([p for p in model.lm_head.parameters() if self._shards.takes(p)])
        result = finish(model, hidden, batch)
        self._shards.release()  # the loss has its gradients already
        return result

    @staticmethod
    def _loss(model: Any, hidden: Any, batch: Batch) -> Any:
        return target_loss(hidden, paddle.to_tensor(batch.labels), model.lm_head)

    def _stream_shape(self, batch: Batch) -> list[int]:
        rows, length = batch.input_ids.shape
        parts = self._at.tensor.size if self._tensor is not None and self._tensor.sequence else 1
        return [rows, length // parts, self._run.source.config.hidden_size]

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Sequence parallelism is for whole rows, not for answers that come token by token."""
        if self._tensor is not None:
            self._tensor.active = True
        try:
            yield
        finally:
            if self._tensor is not None:
                self._tensor.active = False

    @contextlib.contextmanager
    def _going_back(self) -> Iterator[None]:
        if self._shards is not None:
            self._shards.goes_back = True
        try:
            yield
        finally:
            if self._shards is not None:
                self._shards.goes_back = False

    def _complete(self, parameter: Any, gradient: Any) -> None:
        if id(parameter) in self._partial:
            self._at.tensor.sum(gradient)

    @paddle.no_grad()
    def _reduce_gradients(self) -> None:
        """Sums over all micro-batches and processes, of what each process steps."""
        shards, many = self._shards, self._at.plan.devices > 1
        for name, parameter in self._trained.items():
            if parameter.grad is None and many and (shards is None or shards.stage < 2):
                parameter.grad = paddle.zeros(parameter.shape, dtype=parameter.dtype)
            if self._pipe is not None and self._pipe.tied and self._is_embedding(name):
                self._add_other_end(parameter)
            if shards is None:
                self._complete(parameter, parameter.grad)
            elif shards.stage == 1:
                shards.collect(parameter)
            stepped = parameter if shards is None else shards.piece(parameter)
            if self._at.data.size > 1:
                self._sum_over_data(stepped)

    def _sum_over_data(self, stepped: Any) -> None:
        gradient = self._at.data.sum(here(stepped.grad))
        stepped.grad = gradient if self._shards is None else self._shards.resting(gradient)

    def _is_embedding(self, name: str) -> bool:
        return name.endswith("embed_tokens.weight")

    def _add_other_end(self, parameter: Any) -> None:
        """A tied matrix is in the first stage and in the last: each adds the other's gradient."""
        pipe = self._at.pipe
        other = pipe.size - 1 if pipe.rank == 0 else 0
        theirs = paddle.empty_like(parameter.grad)
        pipe.exchange([(parameter.grad.clone(), other)], [(theirs, other)])
        parameter.grad.add_(theirs)

    @_phase("the gradient norm")
    def grad_norm(self, stepped: Mapping[str, Any]) -> float:
        pieces = self.pieces(stepped)
        own = squares(tensor for name, tensor in stepped.items() if pieces[name].written)
        return math.sqrt(float(self._at.world.sum(paddle.to_tensor([own], dtype="float64"))))

    @_phase("spreading new values")
    def updated(self) -> None:
        if self._shards is not None:
            self._shards.spread(self._trained.values())

    @_phase("evaluation")
    def scores(self, model: Any, batches: Sequence[Batch]) -> tuple[float, int]:
        batches, scales = self._even(batches, 1.0)
        found: list[tuple[float, int]] = []

        def scored(model: Any, hidden: Any, batch: Batch) -> Any:
            loss, correct = target_scores(hidden, paddle.to_tensor(batch.labels), model.lm_head)
            counts = scales[len(found)]
            found.append((loss * counts, int(correct * counts)))

        def forward(batch: Batch, received: Any) -> Any:
            self._go_on()
            return self._forward(model, batch, received, scored)

        with self._working():
            if self._pipe is not None:
                self._pipe.measure(batches, self._stream_shape, self._run.precision.weights, forward)
            else:
                for batch in batches:
                    forward(batch, None)
                    if self._shards is not None:
                        self._shards.release()
        loss, correct = self._at_last_stage([sum(loss for loss, _ in found), sum(right for _, right in found)])
        return loss, int(correct)

    def _at_last_stage(self, values: list[float]) -> list[float]:
        """What the last stage knows, for all of a pipeline."""
        if self._pipe is None:
            return values
        known = paddle.to_tensor(values, dtype="float64")
        return list(map(float, self._at.pipe.broadcast(known, self._at.pipe.size - 1)))

    @contextlib.contextmanager
    def answering(self) -> Iterator[Callable[[], None]]:
        with self._waiting("answers"):
            yield self._go_on

    @_phase("sums over data ranks")
    def sum(self, values: Sequence[float]) -> list[float]:
        tensor = paddle.to_tensor(list(values), dtype="float64")
        return list(map(float, self._at.data.sum(self._at.sharding.sum(tensor))))

    # --- what is written ------------------------------------------------------------------------------------

    @paddle.no_grad()
    def whole(self, parameters: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        with self._waiting("collecting whole tensors"):
            yield from self._whole(parameters)

    def _whole(self, parameters: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        for name, parameter in parameters:
            part = part_of(parameter)
            if is_elsewhere(parameter):
                whole = paddle.empty(list(part.shape if part else parameter.shape), dtype=parameter.dtype)
            else:
                whole = self._undivided(self._fetch(parameter).detach(), part)
            if self._pipe is not None:
                whole = self._at.pipe.broadcast(whole.clone(), self._pipe.stage_of(parameter))
            self._go_on()
            yield name, whole

    def pieces(self, stepped: Mapping[str, Any]) -> Mapping[str, Piece]:
        found = {}
        for name in stepped:
            parameter = self._trained[name]
            part = part_of(parameter)
            size = math.prod(parameter.shape)
            start, stop = (0, size) if self._shards is None else self._shards.bounds(parameter)
            written = self._at.data.rank == 0 and (part is not None or self._at.tensor.rank == 0)
            if self._pipe is not None and self._pipe.stage_of(parameter) != self._at.pipe.rank:
                written = False  # the last stage's copy of a tied matrix
            found[name] = Piece(part or Part(tuple(parameter.shape), 0, 0, 1), start, stop, written)
        return found

    def own_file(self, stem: str) -> str:
        return f"{stem}-{self._at.world.rank:05d}" if self._at.plan.devices > 1 else stem

    @_phase("waiting for all")
    def wait(self) -> None:
        self._at.world.sum(paddle.zeros([1]))


class _Fetched:
    """A Linear's weight where :func:`sft.models.layers.linear_weight` looks for it."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight


def _nothing() -> Batch:
    """A batch whose loss counts for nothing, but which reaches every parameter."""
    ids = np.zeros((1, 2), np.int64)
    ends = np.full((1, 1, 2, 1), 2, np.int32)
    return Batch(ids, ids.copy(), np.arange(2)[None], ends, ((2,),))

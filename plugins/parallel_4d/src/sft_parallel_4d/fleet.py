"""Every name of paddle's fleet that is not public and that this plugin uses: what it does is known of paddle 3.3 alone.

tests/test_fleet_contract.py holds paddle to each, and says what breaks here where one has changed.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import paddle
from paddle import distributed
from paddle.distributed import fleet
from paddle.distributed.fleet.layers.mpu.random import get_rng_state_tracker
from paddle.distributed.fleet.meta_parallel import PipelineLayer, PipelineParallel, PipelineParallelWithInterleave
from paddle.distributed.fleet.meta_parallel.pp_utils.p2p_communication import P2pHelper
from paddle.distributed.fleet.meta_parallel.pp_utils.utils import paddle_2_number
from paddle.distributed.fleet.utils import tensor_fusion_helper as fusion

from sft import UsageError
from sft_parallel_4d.offload import Host, Resting

VERSION = "3.3"


def check(version: str) -> None:
    """Refuse another paddle than that."""
    if not version.startswith(f"{VERSION}."):
        raise UsageError(
            f"parallel-4d is built on paddle {VERSION}, of which it uses names that are not public, and this is paddle "
            f"{version}; install paddle {VERSION}, or run one process without parallel settings."
        )


check(paddle.__version__)
fusion.alignment.setdefault("unknown", 256)  # what paddle calls a CPU where it is built for nothing else
fusion.logger.setLevel("WARNING")  # how parameters are grouped, and stages made, is not for users
distributed.ParallelEnv._device_id = 0  # a pipeline asks for it, and on a CPU no object has its own

ALONE = SimpleNamespace(nranks=1, rank=0)
"""Stands for the group of a process that has no others."""


# --- groups ---


def with_those_that_share_rows(axis: str) -> Any:
    """The group of the processes along the ``axis`` "data" or "sharding" together with those along the one of rows,
    once fleet is initialised. All processes ask at once."""
    hcg = fleet.get_hybrid_communicate_group()
    return hcg.get_dp_sep_parallel_group() if axis == "data" else hcg.create_fuse_group([axis, "sep"])[1]


# --- draws ---


def seed_apart(name: str, seed: int) -> None:
    """Begin the draws of that ``name`` anew, from ``seed``."""
    tracker = get_rng_state_tracker()
    if name not in tracker.states_:  # once: paddle keeps each state that was ever added
        tracker.add(name, seed)
    with tracker.rng_state(name):
        paddle.seed(seed)


def drawing_apart(name: str) -> contextlib.AbstractContextManager[None]:
    """In it what is drawn is of that ``name``: the draws outside go on as if there had been none."""
    return get_rng_state_tracker().rng_state(name)


# --- buckets of gradients ---


def together(parameters: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """``parameters`` in their order, as many together as have ``size`` bytes of float32 gradients or just more. They
    are of one dtype."""
    if parameters:
        yield from fusion.assign_group_by_size(parameters, size * parameters[0].element_size() // 4).values()


class Bucket(fusion.FusedCommBuffer):
    """The gradients of ``parameters``, all of one dtype, in one float32 buffer, which a single collective sums over
    ``group``: in all its processes, or (``cut``) each the slice of the buffer that is its own. Then values lie in such
    a buffer, too, and parameters are views of it; after a step one collective spreads the slices.

    ``adds``: whether micro-batches add up in the buffer before it is sent (stages 0 and 1). Else each is sent by
    itself, its buffer is gone then, and sums of slices add up. ``host``: where slices rest, if not beside the rest.
    """

    def __init__(
        self, parameters: list[Any], group: Any, cut: bool, adds: bool = True, host: Host | None = None
    ) -> None:
        super().__init__(
            0,  # a number that only fleet's own messages have
            parameters,
            group or ALONE,
            act=fusion.HOOK_ACTION.REDUCE_SCATTER if cut else fusion.HOOK_ACTION.ALL_REDUCE,
            use_main_grad=True,  # float32, whatever the parameters are
            release_grads=True,  # between steps there is no buffer
            free_grads_in_comm=cut and not adds,
        )
        self.grad_storage: Any
        self.cut, self._adds, self.host = cut, adds, host
        self._sums: Any = None
        self._resting: Resting | None = None
        self._brought: Any = None
        self.kept = self._keep() if cut else None
        """What this process steps, flat: its slice of the values."""

    @property
    def group(self) -> Any:
        """The processes among which it travels; :data:`ALONE` where there is but this one."""
        return self._comm_group

    # --- where values are ---

    def start(self, parameter: Any) -> int:
        """Where in the buffer its values begin."""
        if self.cut:
            return int(self._sharding_param_grad_view[parameter.name]._index)
        return int(self.param2offset[parameter.name])

    @property
    def own(self) -> tuple[int, int]:
        """Which part of the buffer is this process's."""
        if not self.cut:
            return 0, int(self.buffer_size)
        size = int(self.buffer_size) // self.group.nranks
        return self.group.rank * size, (self.group.rank + 1) * size

    def bounds(self, parameter: Any) -> tuple[int, int]:
        """Which of its values, in memory order, are in this process's slice."""
        size, start = math.prod(parameter.shape), self.start(parameter)
        first, last = (min(max(edge - start, 0), size) for edge in self.own)
        return first, last

    def within(self, slice_: Any, parameter: Any) -> Any:
        """Of a tensor like :attr:`kept` what is the parameter's, a view."""
        (first, last), start = self.bounds(parameter), self.start(parameter) - self.own[0]
        return slice_._slice(start + first, start + last)

    def of(self, whole: Any, parameter: Any) -> Any:
        """Of a tensor like the buffer what is the parameter's, a view."""
        start = self.start(parameter)
        return whole._slice(start, start + math.prod(parameter.shape))

    def own_values(self) -> Any:
        """Of all parameters' values, flat, this process's part, a view."""
        return self.param_storage._slice(*self.own)

    def let_go_of_values(self) -> None:
        """Parameters have no values, until they are given others."""
        self.param_storage._clear_dataptr()

    def _keep(self) -> Any:
        own = self.own_values()
        return own if self.host is None else self._rests(own)

    def _rests(self, own: Any) -> Any:
        assert self.host is not None
        self.rest = self.host.take(own)
        self.rest.wait()
        return self.rest.tensor

    # --- gradients ---

    def add(self, parameter: Any, gradient: Any) -> None:
        """Add a float32 ``gradient``, flat, to what is in the buffer for ``parameter``."""
        self.of(self._filled(), parameter).add_(gradient)

    def _filled(self) -> Any:
        if self.grad_storage is None or self._task is not None:
            self.settle()
            self.grad_storage = paddle.zeros([self.buffer_size], "float32")
        return self.grad_storage

    def send(self) -> None:
        """Begin to sum what is there over the group."""
        whole = self._filled()
        if self.group.nranks == 1:
            return
        try:
            self._comm_grads()
        except NotImplementedError:  # gloo, by which processes on CPUs talk: all get the sum, their slice with it
            self._task = distributed.all_reduce(whole, group=self.group, sync_op=False)

    def settle(self) -> None:
        """Wait for what was sent last. On a GPU only what the device does next waits."""
        if self._task is not None:
            self._task.wait()
            self._task = None
        if self._adds or self.grad_storage is None:
            return
        own = self._slice_of_sum()
        self._clear_grad_storage()
        self._sums = own if self._sums is None else self._sums.add_(own)

    def _slice_of_sum(self) -> Any:
        first, last = self.own
        size = last - first
        if math.prod(self.grad_storage.shape) == size:
            return self.grad_storage._slice(0, size)  # a tensor of its own: paddle clears the other one
        return self.grad_storage._slice(first, last).clone()

    @property
    def sums(self) -> Any:
        """Float32, flat: this process's part of the sum of all that was sent, once it is settled."""
        return self.grad_storage._slice(*self.own) if self._adds else self._sums

    def rest_gradients(self) -> None:
        """Begin to take :attr:`sums`, which change no more, to where values rest."""
        if self.host is not None and self._resting is None:
            self._resting = self.host.take(self.sums)
            self._clear()

    def gradient(self, parameter: Any) -> Any:
        """Of :attr:`sums` what is that of :meth:`bounds`, flat."""
        if self._resting is not None:
            self._resting.wait()
        return self.within(self.sums if self._resting is None else self._resting.tensor, parameter)

    def forget(self) -> None:
        """Let go of all gradients."""
        self.settle()
        self._clear()
        if self._resting is not None:
            self._resting.wait()
            self._resting = None

    def _clear(self) -> None:
        if self.grad_storage is not None:
            self._clear_grad_storage()
        self._sums = None

    # --- new values ---

    def put(self, parameter: Any, value: Any) -> None:
        """Keep what is this process's of the parameter's new ``value``, of any shape."""
        first, last = self.bounds(parameter)
        if first < last:
            flat = value.reshape([-1]).astype(parameter.dtype).slice([0], [first], [last])
            paddle.assign(flat, self.within(self.kept, parameter))

    def renew(self) -> None:
        """What this process keeps is new: begin to fetch it from where it rests."""
        self._brought = None if self.host is None else self.host.give(self.rest)

    def spread(self) -> Any:
        """Begin to give all processes the slices of all; what to wait for, or None."""
        own = self.own_values()
        if self._brought is not None:
            values, wait = self._brought
            wait()
            paddle.assign(values, own)
            self._brought = None
        if self.group.nranks == 1:
            return None
        return distributed.stream.all_gather(self.param_storage, own, group=self.group, sync_op=False)


# --- the schedules of a pipeline ---


class KnownSizes(P2pHelper):
    """Sends and receives tensors whose sizes both ends know: fleet's own says each in a message, for which the host
    waits twice."""

    def __init__(self) -> None:
        super().__init__(dynamic_shape=True)

    def expect(self, there: Iterator[list[int]], back: Iterator[list[int]], dtype: str) -> None:
        """The shapes of what comes next, in the order in which it comes: from the stage before, and gradients from the
        one behind."""
        self._shapes = there, back
        meta = self._send_recv_meta
        meta.recv_dtype_message, meta.recv_stop_gradient = paddle_2_number(getattr(paddle, dtype)), False

    def _send_meta(self, output_tensor: Any, skip_check_meta: bool = False, reverse: bool = False) -> None:
        pass

    def _recv_meta(self, reverse: bool = False) -> None:
        self._send_recv_meta.recv_shape_message = next(self._shapes[reverse])


class _Steps:
    """What is ours in both of fleet's schedules."""

    go_back: Callable[[int, Any, Any], None]

    def _backward_step(
        self, input_tensor: Any, output_tensor: Any, output_tensor_grad: Any, chunk_id: int | None = None, **_: Any
    ) -> Any:
        self.backward_hooks.run_hook()  # type: ignore[attr-defined]
        self.go_back(chunk_id or 0, output_tensor, output_tensor_grad)
        return None if input_tensor is None else input_tensor.grad

    def _broadcast_final_loss(self, *_: Any) -> None:
        """Losses are added up over more than a pipeline; fleet's way waits for the device."""


class OneForwardOneBackward(_Steps, PipelineParallel):
    """arXiv 1811.06965, 2104.04473."""

    def _get_virtual_pp_rank(self, micro_step: int, forward: bool) -> int:
        return 0


class Interleaved(_Steps, PipelineParallelWithInterleave):
    """Of several parts a stage; arXiv 2104.04473, section 2.2."""

    def _check_sanity(self) -> None:
        """It knows the number of micro-batches of one step alone, and wants three stages: sent by themselves
        (``overlap_p2p_comm``), tensors keep their order between two."""


class Schedule:
    """Takes micro-batches through the ``stages`` of a pipeline, of which each has ``chunks`` parts of the model.

    ``forward(chunk, received)`` computes a part of this stage for the next micro-batch (``received`` is None in the
    first part of all) and gives what goes to the next part, or the loss. ``backward(chunk, output, gradient)`` goes
    back through it (``gradient`` is None of a loss).
    """

    def __init__(
        self, stages: int, chunks: int, forward: Callable[[int, Any], Any], backward: Callable[[int, Any, Any], None]
    ) -> None:
        self._stages, self._chunks = stages, chunks
        self._sizes = KnownSizes()
        settings = fleet.DistributedStrategy()
        settings.pipeline_configs = {"micro_batch_size": 1, "accumulate_steps": 1, "enable_partial_send_recv": False}
        # Each transfer by itself: in batches they wait, and are out of order between two stages of several parts.
        settings.hybrid_configs = {
            "pp_configs": {"delay_scale_loss": True, "use_batch_p2p_comm": False, "overlap_p2p_comm": chunks > 1}
        }
        hcg = fleet.get_hybrid_communicate_group()
        # What paddle says of its flags and layers is not for users.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layers = PipelineLayer(
                [_part(forward, number // stages) for number in range(stages * chunks)],
                topology=hcg.topology(),
                loss_fn=lambda output, _: output,
                seg_method="layer:part",
                num_virtual_pipeline_stages=chunks,
            )
            self._engine = (Interleaved if chunks > 1 else OneForwardOneBackward)(layers, hcg, settings)
        self._engine.go_back = backward
        self._engine._p2p_helper = self._sizes

    @property
    def least(self) -> int:
        """The fewest micro-batches that the schedule takes."""
        return 2 * self._stages if self._chunks > 1 else 1

    def train(self, shapes: Sequence[list[int]], dtype: str) -> None:
        """Forward and backward of as many micro-batches as there are ``shapes``, of what goes from part to part."""
        self._expect(shapes, dtype)
        self._engine.forward_backward_pipeline(itertools.repeat((None, None)), None)

    def measure(self, shapes: Sequence[list[int]], dtype: str) -> None:
        """Forward alone. What a last part gives is not looked at, but must be a tensor."""
        self._expect(shapes, dtype)
        self._engine.eval_batch(itertools.repeat((None, None)), compute_loss=True)

    def _expect(self, shapes: Sequence[list[int]], dtype: str) -> None:
        engine = self._engine
        engine.accumulate_steps = len(shapes)
        engine._init_user_hooks()  # there are as many as micro-batches when it is made
        there = self._arriving(shapes, 0 if engine.is_pipeline_first_stage(True) else None, True)
        back = self._arriving(shapes, self._chunks - 1 if engine.is_pipeline_last_stage(True) else None, False)
        self._sizes.expect(there, back, dtype)

    def _arriving(self, shapes: Sequence[list[int]], end: int | None, forward: bool) -> Iterator[list[int]]:
        """The shapes that this stage receives in one direction, but for its chunk ``end``, which is the first in that
        direction."""
        seen: Counter[int] = Counter()
        for step in range(len(shapes) * self._chunks):
            chunk = self._engine._get_virtual_pp_rank(step, forward)
            seen[chunk] += 1
            if chunk != end:
                yield shapes[seen[chunk] - 1]


def _part(forward: Callable[[int, Any], Any], chunk: int) -> Callable[[Any], Any]:
    def part(received: Any) -> Any:
        return forward(chunk, received)

    return part

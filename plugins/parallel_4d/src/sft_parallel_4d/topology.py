"""Where this process stands: a plan's axes, each with the group of processes along it, from paddle's fleet."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import paddle
from paddle import distributed
from paddle.distributed import fleet

from sft.parallel import Part
from sft_parallel_4d.fleet import with_those_that_share_rows
from sft_parallel_4d.plans import Plan


class Axis:
    """The processes that differ from this one along one axis of the plan, and what they do together. ``group`` is None
    where there are no others.

    Every operation is the identity where the axis has one process. :meth:`sum`, :meth:`maximum` and :meth:`broadcast`
    change their tensor; the others give a new one.
    """

    def __init__(self, rank: int, group: Any) -> None:
        self.rank, self.group = rank, group
        self.size = int(group.nranks) if group is not None else 1

    def sum(self, tensor: Any) -> Any:
        """``tensor``, which becomes the sum over the axis."""
        if self.size > 1:
            distributed.all_reduce(tensor, group=self.group)
        return tensor

    def begin_sum(self, tensor: Any) -> Any:
        """The same, of an axis of several processes, while this one goes on; what to wait for."""
        return distributed.all_reduce(tensor, group=self.group, sync_op=False)

    def maximum(self, tensor: Any) -> Any:
        """``tensor``, which becomes the element-wise maximum over the axis."""
        if self.size > 1:
            distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX, group=self.group)
        return tensor

    def gather(self, tensor: Any, dimension: int) -> Any:
        """The tensors of all processes, in rank order along ``dimension``."""
        if self.size == 1:
            return tensor
        if dimension == 0:
            whole = paddle.empty([tensor.shape[0] * self.size, *tensor.shape[1:]], dtype=tensor.dtype)
            distributed.stream.all_gather(whole, tensor.contiguous(), group=self.group)
            return whole
        parts: list[Any] = []
        distributed.all_gather(parts, tensor.contiguous(), group=self.group)
        return paddle.concat(parts, axis=dimension)

    def own(self, tensor: Any, dimension: int) -> Any:
        """This process's part of ``tensor`` along ``dimension``."""
        if self.size == 1:
            return tensor
        size = tensor.shape[dimension] // self.size
        return tensor.slice([dimension], [self.rank * size], [(self.rank + 1) * size]).clone()

    def part(self, whole: Any, part: Part) -> Any:
        """The ``part`` of a whole tensor, a copy of its own."""
        values = [whole[place] for place in part.places]
        return values[0].clone() if len(values) == 1 else paddle.concat(values, axis=part.axis)

    def whole(self, values: Any, part: Part) -> Any:
        """The whole tensor of which each process has its ``part``; of fewer parts, neighbours have the same one."""
        axis, copies = part.axis, self.copies(part)
        lengths = [replace(part, index=index).local_shape[axis] for index in range(part.count)]
        widest = max(lengths)
        if values.shape[axis] < widest:  # processes gather tensors of one shape
            missing = [widest - n if place == axis else n for place, n in enumerate(values.shape)]
            values = paddle.concat([values, paddle.zeros(missing, values.dtype)], axis=axis)
        found = self.gather(values, axis)
        if copies == 1 and len(set(lengths)) == 1 and part.order is None:
            return found
        places = np.concatenate([index * copies * widest + np.arange(n) for index, n in enumerate(lengths)])
        places = places if part.order is None else places[part.order]
        return paddle.index_select(found, paddle.to_tensor(places), axis=axis)

    def copies(self, part: Part) -> int:
        """How many neighbours along the axis hold the same ``part``."""
        return self.size // part.count

    def answers_for(self, part: Part) -> bool:
        """Whether this process is the first of those that hold the ``part``: what is counted once, it counts."""
        return self.rank % self.copies(part) == 0

    def sum_own(self, tensor: Any, dimension: int, spoil: bool = False) -> Any:
        """This process's part, along ``dimension``, of the sum over the axis; ``spoil`` if ``tensor`` may change."""
        if self.size == 1:
            return tensor
        if dimension:
            tensor = paddle.moveaxis(tensor, dimension, 0)
        shape = [tensor.shape[0] // self.size, *tensor.shape[1:]]
        own = paddle.empty(shape, dtype=tensor.dtype)
        try:
            distributed.reduce_scatter(own, tensor.contiguous(), group=self.group)
        except NotImplementedError:  # gloo, by which processes on CPUs talk, has no such operation
            own = self.own(self.sum(tensor if spoil else tensor.clone()), 0)
        return paddle.moveaxis(own, 0, dimension) if dimension else own

    def swap(self, tensor: Any) -> Any:
        """Of [processes, ...], which has a part for each process: the parts that are for this one, in rank order."""
        if self.size == 1:
            return tensor
        tensor, parts = tensor.contiguous(), paddle.empty(tensor.shape, dtype=tensor.dtype)
        try:
            distributed.stream.alltoall_single(parts, tensor, group=self.group)
        except NotImplementedError:  # gloo has no such operation either
            parts = self.gather(tensor, 0).reshape([self.size, *tensor.shape])[:, self.rank]
        return parts

    def trade(self, tensor: Any, leaving: Sequence[int], coming: Sequence[int]) -> Any:
        """Rows of ``tensor``, the first ``leaving[0]`` of them for the first process, and so on → the rows that come,
        ``coming[0]`` of them from the first process, and so on."""
        received = paddle.empty([sum(coming), *tensor.shape[1:]], dtype=tensor.dtype)
        tensor = tensor.contiguous()
        try:
            distributed.alltoall_single(
                received, tensor, in_split_sizes=list(leaving), out_split_sizes=list(coming), group=self.group
            )
        except NotImplementedError:  # gloo
            self._trade_by_pairs(tensor.split(list(leaving)), received, coming)
        return received

    def _trade_by_pairs(self, parts: Sequence[Any], received: Any, coming: Sequence[int]) -> None:
        """One process after the other: gloo's sends wait for their receivers."""
        arrived = [paddle.empty([count, *received.shape[1:]], dtype=received.dtype) for count in coming]
        for place, (part, came) in enumerate(zip(parts, arrived, strict=True)):
            if place == self.rank:
                paddle.assign(part, came)
                continue
            self.exchange([(part, place)] if part.shape[0] else [], [(came, place)] if came.shape[0] else [])
        paddle.assign(paddle.concat(arrived), received)

    def broadcast(self, tensor: Any, source: int) -> Any:
        """``tensor``, which becomes that of the process ``source`` along the axis."""
        if self.size > 1:
            distributed.broadcast(tensor, src=self.group.ranks[source], group=self.group)
        return tensor

    def exchange(self, sends: Sequence[tuple[Any, int]], receives: Sequence[tuple[Any, int]]) -> None:
        """Send and receive tensors to and from one place along the axis, all at once."""
        kinds = [(distributed.isend, sends), (distributed.irecv, receives)]
        if any(place < self.rank for _, place in sends):
            kinds.reverse()  # gloo does one after the other, and a send waits for its receiver: the lower rank is first
        operations = [
            distributed.P2POp(operation, tensor, self.group.ranks[place], self.group)
            for operation, pairs in kinds
            for tensor, place in pairs
        ]
        for task in distributed.batch_isend_irecv(operations) if operations else ():
            task.wait()


def among(world: Axis, axis: Axis, places: Sequence[int], apart: bool = False) -> Axis:
    """The processes at ``places`` along ``axis``, of which this is one, as an axis of their own, also (``apart``) where
    they are all. All processes of the ``world`` ask at once, each for as many places."""
    if len(places) == 1:
        return Axis(0, None)
    if len(places) == axis.size and not apart:
        return axis
    own = [axis.group.ranks[place] for place in places]
    asked = world.gather(paddle.to_tensor([own]), 0).tolist()
    # Paddle makes groups in all processes in the same order, whoever is in them.
    groups = {members: distributed.new_group(list(members)) for members in sorted({*map(tuple, asked)})}
    return Axis(places.index(axis.rank), groups[tuple(own)])


@dataclass(frozen=True)
class Topology:
    """The axes of a plan, the whole world as one, and the place along each.

    Processes along ``context`` share rows, and have the same parameters, or pieces of them as data ranks have:
    ``sharding`` has them beside its own, or ``data`` where there are no pieces."""

    plan: Plan
    data: Axis
    sharding: Axis
    tensor: Axis
    pipe: Axis
    world: Axis
    context: Axis

    @property
    def replica(self) -> int:
        """Which of the processes this is that differ by what they read alone, be it records or tokens of them."""
        return self.data.rank * self.sharding.size + self.sharding.rank

    @property
    def data_rank(self) -> int:
        """Which records of a step are this process's, of ``plan.data_world``."""
        return self.replica // self.context.size


def connect(plan: Plan) -> Topology:
    """Let this process meet the others of ``plan.devices`` (those of the launcher's environment)."""
    if plan.devices == 1:
        alone = Axis(0, None)
        return Topology(plan, alone, alone, alone, alone, alone, alone)
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {
        "dp_degree": plan.data,
        "sharding_degree": plan.sharding,
        "mp_degree": plan.tensor,
        "pp_degree": plan.pipeline,
        "sep_degree": plan.context,
    }
    device = paddle.device.get_device()
    if device == "cpu":  # fleet takes NCCL, and this process to its GPU, wherever paddle is built with CUDA
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    # What paddle says of its flags and groups is not for users.
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fleet.init(is_collective=True, strategy=strategy)
    if device == "cpu":
        paddle.device.set_device(device)
    hcg = fleet.get_hybrid_communicate_group()
    data, sharding = hcg.get_data_parallel_group(), hcg.get_sharding_parallel_group()
    context = Axis(0, None)
    if plan.context > 1:
        context = _along(hcg.get_sep_parallel_group())
        if plan.stage:
            sharding = with_those_that_share_rows("sharding")
        else:
            data = with_those_that_share_rows("data")
    return Topology(
        plan,
        _along(data),
        _along(sharding),
        _along(hcg.get_model_parallel_group()),
        _along(hcg.get_pipe_parallel_group()),
        Axis(distributed.get_rank(), distributed.get_group(0)),
        context,
    )


def _along(group: Any) -> Axis:
    if group.nranks == 1:  # paddle says that its ``rank`` is -1
        return Axis(0, None)
    return Axis(group.ranks.index(distributed.get_rank()), group)

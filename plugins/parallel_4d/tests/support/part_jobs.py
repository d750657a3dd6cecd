"""What ranks do where a part of the engine is tried by itself, without a training."""

from __future__ import annotations

from typing import Any

import numpy as np


def attend_in_shares(heads: int, kept: int) -> list[float]:
    """One rank of attention over rows whose tokens all share: how far its output and gradients are from those of whole
    rows in float64, relative to the largest value of each."""
    import math

    import paddle
    from paddle import distributed
    from paddle.distributed import fleet

    from sft.models.attention import DefaultAttention
    from sft_parallel_4d.context import RowsAttention
    from sft_parallel_4d.topology import Axis

    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": distributed.ParallelEnv().world_size}
    fleet.init(is_collective=True, strategy=strategy)
    group = fleet.get_hybrid_communicate_group().get_data_parallel_group()
    axis = Axis(group.rank, group)
    rng, (rows, length, size) = np.random.default_rng(0), (2, 24, 8)
    given = [rng.standard_normal((rows, length, count, size)) for count in (heads, kept, kept, heads)]
    ends = np.minimum(np.repeat([5, 17, 24], [5, 12, 7]), np.arange(length) + 6).astype(np.int32)
    ends = np.broadcast_to(ends[None, None, :, None], (rows, 1, length, 1)).copy()
    places = np.arange(length)
    seen = (places[:, None] >= places) & (places[:, None] < ends[0, 0, :, 0])

    def formula(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose([0, 2, 1, 3]) for x in (q, k, v))
        k, v = (x.unsqueeze(2).expand([rows, kept, heads // kept, length, size]).reshape(q.shape) for x in (k, v))
        scores = paddle.matmul(q, k, transpose_y=True) / math.sqrt(size) + paddle.to_tensor(np.where(seen, 0.0, -1e30))
        return paddle.matmul(paddle.nn.functional.softmax(scores, axis=-1), v).transpose([0, 2, 1, 3])

    def found(attend: Any, arrays: list[Any]) -> list[np.ndarray]:
        tensors = [paddle.to_tensor(array, stop_gradient=False) for array in arrays[:3]]
        out = attend(*tensors)
        (out * paddle.to_tensor(arrays[3])).sum().backward()
        return [one.numpy() for one in (out, *(tensor.grad for tensor in tensors))]

    attention = RowsAttention(DefaultAttention(), axis)
    attention.active = True
    mask = attention.mask(ends)
    own = [array[:, axis.rank :: axis.size].astype(np.float32) for array in given]
    shares = found(lambda *three: attention.attend(*three, mask), own)
    wholes = [whole[:, axis.rank :: axis.size] for whole in found(formula, given)]
    return [float(np.abs(one - all_).max() / np.abs(all_).max()) for one, all_ in zip(shares, wholes, strict=True)]


def schedules(chunks: int, counts: list[int]) -> list[dict[str, Any]]:
    """One stage of a pipeline whose parts each multiply by a trained 2, of steps of so many micro-batches, of 1, 2, 3 …
    values: of each step the losses, the gradients, what evaluation gives, and this rank's transfers."""
    import groups
    import paddle
    from group_jobs import start
    from paddle import distributed

    from sft_parallel_4d.fleet import Schedule

    transfers: list[tuple[str, int]] = []

    def recorded(kind: str) -> Any:
        own = getattr(groups.ProcessGroup, kind)

        def method(self: Any, tensor: Any, other: int, sync_op: bool = True) -> Any:
            transfers.append((kind, other))
            return own(self, tensor, other, sync_op)

        return method

    for kind in ("send", "recv"):
        setattr(groups.ProcessGroup, kind, recorded(kind))
    start(pp_degree=distributed.get_world_size())
    stages, rank = distributed.get_world_size(), distributed.get_rank()
    factors = [paddle.create_parameter([1], "float32") for _ in range(chunks)]
    for factor in factors:
        factor.set_value(paddle.full([1], 2.0))
    coming: list[Any] = []
    losses: list[float] = []

    def forward(chunk: int, received: Any) -> Any:
        size = next(coming[chunk])
        assert (received is None) == (rank == chunk == 0)
        values = paddle.ones([size]) if received is None else received
        assert values.shape == [size]
        out = values * factors[chunk]
        if rank == stages - 1 and chunk == chunks - 1:
            losses.append(float(out.sum()))
            return out.sum()
        return out

    def backward(chunk: int, output: Any, gradient: Any) -> None:
        assert (gradient is None) == (rank == stages - 1 and chunk == chunks - 1)
        paddle.autograd.backward([output], [gradient])

    schedule = Schedule(stages, chunks, forward, backward)
    found: list[dict[str, Any]] = []
    for count in counts:
        shapes = [[micro + 1] for micro in range(count)]
        coming[:] = [iter([size for (size,) in shapes]) for _ in range(chunks)]
        transfers.clear()
        losses.clear()
        schedule.train(shapes, "float32")
        step = {"transfers": list(transfers), "losses": list(losses), "gradients": [float(f.grad) for f in factors]}
        for factor in factors:
            factor.clear_gradient()
        coming[:] = [iter([size for (size,) in shapes]) for _ in range(chunks)]
        losses.clear()
        with paddle.no_grad():
            schedule.measure(shapes, "float32")
        found.append({**step, "measured": list(losses)})
    return found

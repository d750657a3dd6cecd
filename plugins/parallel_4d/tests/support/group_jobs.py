"""What the ranks of test_support_groups.py and test_support_processes.py do. Run by ``run_ranks``; returns JSON."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import processes


def numbers(rank: int, size: int = 12) -> np.ndarray:
    """float32 [size]: what rank ``rank`` contributes."""
    return np.random.default_rng(rank).standard_normal(size, dtype=np.float32)


def start(**degrees: int) -> tuple[Any, Any]:
    """paddle.distributed and fleet's groups, for degrees such as ``mp_degree=2``; the others are 1."""
    import paddle.distributed as dist
    from paddle.distributed import fleet

    strategy = fleet.DistributedStrategy()
    ones = {f"{name}_degree": 1 for name in ("dp", "mp", "pp", "sharding")}
    strategy.hybrid_configs = {**ones, **degrees}
    fleet.init(is_collective=True, strategy=strategy)
    return dist, fleet.get_hybrid_communicate_group()


def collectives(degrees: dict[str, int], kinds: list[str]) -> dict[str, Any]:
    """Every primitive on fleet's groups of these kinds and the world: kind -> what came out, and the group's ranks."""
    import paddle

    dist, fleet_groups = start(**degrees)
    every = {kind: getattr(fleet_groups, f"get_{kind}_parallel_group")() for kind in kinds}
    every["world"] = None
    return {kind: _collectives(paddle, dist, group) for kind, group in every.items()}


def _collectives(paddle: Any, dist: Any, group: Any) -> dict[str, Any]:
    ranks = group.ranks if group else list(range(dist.get_world_size()))
    mine = paddle.to_tensor(numbers(dist.get_rank()))
    found: dict[str, Any] = {"ranks": ranks}
    for name in ("SUM", "MAX", "MIN", "PROD"):
        tensor = mine.clone()
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, name), group=group)
        found[name] = tensor.tolist()
    tensor = mine.clone()
    dist.stream.all_reduce(tensor, group=group, use_calc_stream=True)
    found["calc_stream"] = tensor.tolist()
    tensor = mine.clone()
    dist.all_reduce(tensor, group=group, sync_op=False).wait()
    found["waited"] = tensor.tolist()

    parts: list[Any] = []
    dist.all_gather(parts, mine, group=group)
    found["list"] = [part.tolist() for part in parts]
    whole = paddle.empty([len(ranks) * 12])
    dist.stream.all_gather(whole, mine, group=group)
    found["tensor"] = whole.tolist()
    piece = paddle.empty([12 // len(ranks)])
    dist.reduce_scatter(piece, mine, group=group)
    found["scattered"] = piece.tolist()
    dist.reduce_scatter(piece, list(mine.split(len(ranks))), group=group)
    found["scattered list"] = piece.tolist()
    swapped = paddle.empty_like(mine)
    dist.stream.alltoall_single(swapped, mine, group=group)
    found["swapped"] = swapped.tolist()
    tensor = mine.clone()
    dist.broadcast(tensor, src=ranks[-1], group=group)
    found["broadcast"] = tensor.tolist()

    objects: list[Any] = []
    dist.all_gather_object(objects, {"rank": dist.get_rank(), "more": "x" * dist.get_rank()}, group=group)
    found["objects"] = objects
    sent = [f"from {dist.get_rank()}", dist.get_rank()]
    dist.broadcast_object_list(sent, src=ranks[-1], group=group)
    found["sent"] = sent

    place = ranks.index(dist.get_rank())
    after, before = ranks[(place + 1) % len(ranks)], ranks[place - 1]
    ring = paddle.empty([12])
    operations = [dist.P2POp(dist.isend, mine, after, group), dist.P2POp(dist.irecv, ring, before, group)]
    for task in dist.batch_isend_irecv(operations):
        task.wait()
    found["ring"] = ring.tolist()
    dist.barrier(group=group)
    return found


def sharing_rows() -> list[list[int]]:
    """Who differs from a rank by what it reads of the same rows, or by its pieces; and, by what it reads at all."""
    from sft_parallel_4d.fleet import with_those_that_share_rows

    dist, _ = start(sharding_degree=2, sep_degree=2, mp_degree=2)
    found = [with_those_that_share_rows(axis).ranks for axis in ("sharding", "data")]
    dist.barrier()  # paddle's store is in the first rank
    return found


def sums(dtype: str, values: list[list[float]]) -> list[float]:
    """The sum over the ranks of rank i's ``values[i]`` in ``dtype``."""
    import paddle

    dist, _ = start(dp_degree=len(values))
    tensor = paddle.to_tensor(values[dist.get_rank()]).astype(dtype)
    dist.all_reduce(tensor)
    assert str(tensor.dtype) == f"paddle.{dtype}"
    total: list[float] = tensor.astype("float64").tolist()
    return total


def places() -> dict[str, Any]:
    """Tensors that are parts of others, parameters, and tensors with gaps."""
    import paddle

    dist, _ = start(dp_degree=2)
    buffer = paddle.zeros([8]) + dist.get_rank() + 1
    dist.all_reduce(buffer._slice(2, 4))
    parameter = paddle.nn.Linear(2, 2).weight
    dist.broadcast(parameter, src=1)
    gathered: list[Any] = []
    dist.all_gather(gathered, parameter)
    refused = ""
    paddle.set_flags({"FLAGS_use_stride_kernel": True})  # lets a transposed tensor be a view
    try:
        dist.all_reduce(paddle.ones([4, 3]).t())
    except ValueError as error:
        refused = str(error)
    return {
        "buffer": buffer.tolist(),
        "parameter": [part.tolist() for part in gathered],
        "trained": not parameter.stop_gradient,
        "refused": refused,
    }


def late_waits() -> list[list[float]]:
    """Rank 1 receives three messages, waits for the last one first, with a sum over both ranks in between."""
    import paddle

    dist, _ = start(dp_degree=2)
    tensors = [paddle.full([2], float(number)) for number in (1, 2, 3)]
    if dist.get_rank() == 0:
        for tensor in tensors:
            dist.isend(tensor, 1)
        dist.all_reduce(tensors[0])
    else:
        tensors = [paddle.zeros([2]) for _ in tensors]
        tasks = [dist.irecv(tensor, 0) for tensor in tensors]
        dist.all_reduce(paddle.ones([2]))
        for task in reversed(tasks):
            task.wait()
    return [tensor.tolist() for tensor in tensors]


def disagree() -> None:
    """Rank 0 sums, rank 1 broadcasts."""
    import paddle

    dist, _ = start(dp_degree=2)
    if dist.get_rank() == 0:
        dist.all_reduce(paddle.ones([3]))
    else:
        dist.broadcast(paddle.ones([3]), src=0)


def miss() -> None:
    """Rank 3 stays away from its tensor-parallel group."""
    import paddle

    dist, fleet_groups = start(dp_degree=2, mp_degree=2)
    if dist.get_rank() == 3:
        time.sleep(1000)
    dist.all_reduce(paddle.ones([3]), group=fleet_groups.get_model_parallel_group())
    time.sleep(1000)


def never_join(absent: int) -> None:
    """The rank ``absent`` makes no group. Paddle's store itself waits for all, so rank 1 connects to it at least."""
    if int(os.environ["PADDLE_TRAINER_ID"]) == absent:
        if absent:
            from paddle.base import core

            core.create_or_get_global_tcp_store()
        time.sleep(1000)
    start(dp_degree=2)


def surroundings() -> dict[str, Any]:
    """What a rank finds when it begins."""
    import paddle
    import paddle.distributed as dist

    return {
        "initialized": dist.is_initialized(),
        "rank": dist.get_rank(),
        "world": dist.get_world_size(),
        "session": os.getsid(0) == os.getpid(),
        "threads": os.environ["OMP_NUM_THREADS"],
        "extra": os.environ.get("EXTRA"),
        "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "draw": [float(np.random.rand()), float(paddle.rand([1]))],
    }


def train_alone() -> str:
    """Trains a small net, without other ranks; the bytes of its weights, hexadecimal."""
    import paddle

    paddle.seed(1)
    net = paddle.nn.Sequential(paddle.nn.Linear(32, 64), paddle.nn.GELU(), paddle.nn.Linear(64, 32))
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=net.parameters())
    for _ in range(3):
        inputs = paddle.randn([16, 32])
        (net(inputs) - inputs).square().mean().backward()
        optimizer.step()
        optimizer.clear_grad()
    return b"".join(parameter.numpy().tobytes() for parameter in net.parameters()).hex()


def fail(how: str, folder: str) -> None:
    """Each rank writes down its process and that of a child; then rank 1 fails in a manner, and the others hang, or
    fail as soon as it ``die``s."""
    rank = int(os.environ["PADDLE_TRAINER_ID"])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    written = Path(folder) / f"{rank}.part"
    written.write_text(f"{os.getpid()} {child.pid}")
    written.rename(Path(folder) / f"{rank}.pids")
    while len(list(Path(folder).glob("*.pids"))) < int(os.environ["PADDLE_TRAINERS_NUM"]):
        time.sleep(0.01)
    print(f"rank {rank} is here", flush=True)
    if rank == 1 and how == "raise":
        raise ArithmeticError("one and one is three")
    if rank == 1 and how == "kill":
        os.kill(os.getpid(), 9)
    if rank == 1 and how == "leave":
        os._exit(0)
    if rank == 1 and how == "die":
        processes.die()
    if how == "die":
        while not Path(os.environ[processes.RESULT]).with_name("result-1.json").exists():
            pass
        raise ConnectionError("rank 1 is gone")
    time.sleep(1000)


def peaked_loss(columns: int) -> list[float]:
    """Losses of three positions, in evaluation and their sum in training, where each rank has a part of ``columns``
    logits: 0 but for one, which is 17.375 (8.6875 at the last position)."""
    from types import SimpleNamespace

    import paddle

    from sft.training.loss import target_loss, target_scores
    from sft_parallel_4d.meeting import Columns
    from sft_parallel_4d.topology import Axis

    dist, fleet_groups = start(mp_degree=2)
    rank, part = dist.get_rank(), columns // 2
    weight = np.zeros((1, columns), np.float32)
    weight[0, columns // 3] = 17.375
    vocabulary = Columns(Axis(rank, fleet_groups.get_model_parallel_group()), columns)
    own = paddle.to_tensor(weight[:, rank * part :][:, :part].copy())
    lm_head = SimpleNamespace(weight=own, transpose_y=False, vocabulary=vocabulary)
    hidden, labels = paddle.to_tensor([[[1.0], [1.0], [0.5]]]), np.array([[columns // 3, 5, columns - 1]])
    found = []
    for position in range(3):
        one = np.full_like(labels, -100)
        one[0, position] = labels[0, position]
        found.append(target_scores(hidden, paddle.to_tensor(one), lm_head)[0])
    return [*found, float(target_loss(hidden, paddle.to_tensor(labels), lm_head))]

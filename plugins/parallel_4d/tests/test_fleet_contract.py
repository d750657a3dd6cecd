"""What fleet.py takes for granted of paddle's fleet, each name by itself: what fails here is what paddle has changed.

A group of one process stands for more where only the layout counts: fleet cuts a buffer by ``nranks`` and ``rank``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from processes import run_ranks


@pytest.fixture
def fleet(paddle: Any) -> Any:
    from sft_parallel_4d import fleet

    return fleet


def parameters(paddle: Any, *shapes: list[int], dtype: str = "float32") -> list[Any]:
    found = []
    for number, shape in enumerate(shapes):
        values = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
        parameter = paddle.base.framework.EagerParamBase.from_tensor(paddle.to_tensor(values).astype(dtype))
        parameter.stop_gradient = False
        found.append(parameter)
    return found


def changed(name: str, what: str) -> str:
    return f"paddle's {name} {what}: sft_parallel_4d/fleet.py is built on that (paddle 3.3)."


def test_get_rng_state_tracker(paddle: Any, fleet: Any) -> None:
    """Seeded draws apart are the same each time, and leave those outside as they were."""
    paddle.seed(3)
    expected = [paddle.rand([4]).tolist() for _ in range(2)]
    paddle.seed(3)
    outside, apart = [], []
    for _ in range(2):
        fleet.seed_apart("contract", 5)
        with fleet.drawing_apart("contract"):
            apart.append(paddle.rand([4]).tolist())
        outside.append(paddle.rand([4]).tolist())
    why = changed("get_rng_state_tracker", "draws otherwise: dropout of divided values would not be each rank's own")
    assert outside == expected, why
    assert apart[0] == apart[1] != expected[0], why


def test_another_paddle_is_refused(fleet: Any) -> None:
    from sft import UsageError

    fleet.check("3.3.9")
    with pytest.raises(UsageError, match=r"built on paddle 3\.3, .* this is paddle 3\.4\.0; install paddle 3\.3"):
        fleet.check("3.4.0")


def test_alignment(fleet: Any) -> None:
    """The bytes at which a buffer's parameters begin; of a CPU, which paddle calls unknown, we say so."""
    known = fleet.fusion.alignment
    assert known.get("gpu") == known.get("unknown") == 256, changed("alignment", "is no longer 256 bytes by device")
    device = fleet.fusion.get_current_device_type()
    assert device in known, changed("get_current_device_type", f"calls this device {device}")


def test_assign_group_by_size(paddle: Any, fleet: Any) -> None:
    """Parameters in their order; a group ends where it has the size."""
    some = parameters(paddle, [64], [64], [64], [200], [8])
    number = {id(one): place for place, one in enumerate(some)}
    found = [[number[id(one)] for one in group] for group in fleet.together(some, 4 * 128)]
    assert found == [[0, 1], [2, 3], [4]], changed("assign_group_by_size", f"groups otherwise: {found}")
    narrow = parameters(paddle, [64], [64], [64], dtype="bfloat16")
    sizes = [len(group) for group in fleet.together(narrow, 4 * 128)]
    assert sizes == [2, 1], changed("assign_group_by_size", "does not count bytes of the parameters' dtype")


def test_parameters_have_names_of_their_own(paddle: Any) -> None:
    """By which fleet knows them."""
    names = [one.name for one in parameters(paddle, [2], [2], [2])]
    assert len(set(names)) == 3, changed("EagerParamBase.from_tensor", "gives a name twice")


def test_hook_action(fleet: Any) -> None:
    actions = fleet.fusion.HOOK_ACTION
    for name in ("ALL_REDUCE", "REDUCE_SCATTER"):
        assert hasattr(actions, name), changed("HOOK_ACTION", f"has no {name}")


def test_param2offset_and_buffer_size(paddle: Any, fleet: Any) -> None:
    """Of a buffer that is summed whole: parameters one after the other, each at 256 bytes; they stay where they are."""
    some = parameters(paddle, [3, 4], [70])
    before = [one.data_ptr() for one in some]
    bucket = fleet.Bucket(some, None, cut=False, adds=True)
    assert [bucket.start(one) for one in some] == [0, 64], changed("FusedCommBuffer.param2offset", "has other places")
    assert int(bucket.buffer_size) == 64 + 128, changed("FusedCommBuffer.buffer_size", "is another")
    assert [one.data_ptr() for one in some] == before, changed("FusedCommBuffer", "moves parameters it does not cut")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharding_param_grad_view(paddle: Any, fleet: Any, rank: int, dtype: str) -> None:
    """Of a buffer that is cut: parameters keep their values and become views of ``param_storage``, in which each has a
    multiple of ranks x 256 bytes."""
    some = parameters(paddle, [3, 4], [200], dtype=dtype)
    values = [one.astype("float32").numpy() for one in some]
    bucket = fleet.Bucket(some, SimpleNamespace(nranks=2, rank=rank), cut=True, adds=True)
    step = 2 * 256 // some[0].element_size()
    name = "FusedCommBuffer._sharding_param_grad_view"
    assert [bucket.start(one) for one in some] == [0, step], changed(name, "has other places (_index)")
    for one, value in zip(some, values, strict=True):
        np.testing.assert_array_equal(one.astype("float32").numpy(), value, changed(name, "loses values"))
        at = bucket.param_storage.data_ptr() + bucket.start(one) * one.element_size()
        assert one.data_ptr() == at, changed(name, "no longer makes parameters views of param_storage")
        one.set_value(paddle.full_like(one, 2.0))
        assert one.data_ptr() == at
        first, last = bucket.bounds(one)
        if first == last:  # the other process has it
            continue
        assert (bucket.within(bucket.kept, one).astype("float32").numpy() == 2.0).all()
        assert bucket.within(bucket.kept, one).shape == [last - first]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_add_up_in_float32(paddle: Any, fleet: Any, dtype: str) -> None:
    """``use_main_grad`` and ``release_grads``: a float32 buffer that is made when the first gradient comes."""
    (one,) = parameters(paddle, [6], dtype=dtype)
    bucket = fleet.Bucket([one], None, cut=True, adds=True)
    assert bucket.grad_storage is None, changed("FusedCommBuffer", "with release_grads has a buffer from the start")
    assert bucket.use_main_grad, changed("FusedCommBuffer", "does not know use_main_grad")
    for _ in range(300):
        bucket.add(one, paddle.full([6], 1.001))
    assert bucket.grad_storage.dtype == paddle.float32
    np.testing.assert_allclose(bucket.gradient(one).numpy(), 300.3, rtol=1e-5)
    bucket.forget()
    assert bucket.grad_storage is None, changed("FusedCommBuffer._clear_grad_storage", "keeps the buffer")


class _Sent:
    """Stands for the collectives of two processes, of which the other has the same gradients."""

    def __init__(self, paddle: Any, monkeypatch: pytest.MonkeyPatch, lacks: bool = False) -> None:
        self.calls: list[tuple[str, bool, int]] = []

        def all_reduce(tensor: Any, op: Any = None, group: Any = None, sync_op: bool = True) -> Any:
            self._note("all_reduce", op, sync_op, tensor)
            tensor.scale_(2.0)
            return SimpleNamespace(wait=lambda: self.calls.append(("wait", False, 0)))

        def reduce_scatter(out: Any, tensor: Any, op: Any = None, group: Any = None, sync_op: bool = True) -> Any:
            if lacks:
                raise NotImplementedError("gloo has none")
            self._note("reduce_scatter", op, sync_op, tensor)
            size = tensor.shape[0] // 2
            paddle.assign(tensor._slice(group.rank * size, (group.rank + 1) * size) * 2.0, out)
            return SimpleNamespace(wait=lambda: self.calls.append(("wait", False, 0)))

        self._sum = paddle.distributed.ReduceOp.SUM
        monkeypatch.setattr(paddle.distributed, "all_reduce", all_reduce)
        monkeypatch.setattr(paddle.distributed, "reduce_scatter", reduce_scatter)

    def _note(self, name: str, op: Any, sync_op: bool, tensor: Any) -> None:
        assert op in (None, self._sum), changed("FusedCommBuffer._comm_grads", "no longer sums")
        self.calls.append((name, sync_op, tensor.shape[0]))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("lacks", [False, True])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("cut", [True, False])
def test_comm_grads(
    paddle: Any, fleet: Any, monkeypatch: pytest.MonkeyPatch, cut: bool, adds: bool, lacks: bool, rank: int
) -> None:
    """One asynchronous collective (``_task``) whose result is the sum, not the mean; without ``adds`` the whole buffer
    is gone then (``free_grads_in_comm``), and what was sent before is added to."""
    some, sent = parameters(paddle, [3, 4], [200]), _Sent(paddle, monkeypatch, lacks)
    bucket = fleet.Bucket(some, SimpleNamespace(nranks=2, rank=rank), cut=cut, adds=adds)
    gradients = [np.random.default_rng(n).standard_normal(one.shape).astype(np.float32) for n, one in enumerate(some)]
    for micro in range(2):
        for one, gradient in zip(some, gradients, strict=True):
            bucket.add(one, paddle.to_tensor((1 + micro) * gradient.reshape([-1])))
        if not adds or micro:
            bucket.send()
    name = "reduce_scatter" if cut and not lacks else "all_reduce"
    whole = int(bucket.buffer_size)
    once = [(name, False, whole), ("wait", False, 0)]
    bucket.settle()
    assert sent.calls == (once if adds else 2 * once), changed("FusedCommBuffer._comm_grads", "sends otherwise")
    assert bucket.grad_storage is None or adds, changed("FusedCommBuffer", "keeps what free_grads_in_comm frees")
    for one, gradient in zip(some, gradients, strict=True):
        first, last = bucket.bounds(one)
        if first == last:  # the other process has it
            continue
        np.testing.assert_allclose(bucket.gradient(one).numpy(), 6 * gradient.reshape(-1)[first:last], rtol=1e-6)


# --- schedules of a pipeline ---

SCHEDULES = "paddle.distributed.fleet.meta_parallel:"
P2P = "paddle.distributed.fleet.meta_parallel.pp_utils.p2p_communication:"
GROUPS = "paddle.distributed.fleet:HybridCommunicateGroup."


def find(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = __import__(module, fromlist=["_"])
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def test_a_cpu_has_a_number(paddle: Any, fleet: Any) -> None:
    assert paddle.distributed.ParallelEnv().device_id == 0, changed("ParallelEnv._device_id", "is not asked any more")


@pytest.mark.parametrize(
    ("name", "parameters", "why"),
    [
        (
            SCHEDULES + "PipelineParallel._backward_step",
            "input_tensor output_tensor output_tensor_grad chunk_id step_id",
            "gradients of 16-bit parameters would no longer add up in float32",
        ),
        (
            SCHEDULES + "PipelineParallel._broadcast_final_loss",
            "return_micro_batch_loss",
            "each step would wait for the device once more, and send a loss that nobody reads",
        ),
        (
            SCHEDULES + "PipelineParallel._init_user_hooks",
            "",
            "a step of another number of micro-batches than the first would fail",
        ),
        (
            SCHEDULES + "PipelineParallel.forward_backward_pipeline",
            "data scaler",
            "no step would begin",
        ),
        (SCHEDULES + "PipelineParallel.eval_batch", "data compute_loss", "no evaluation would begin"),
        (
            SCHEDULES + "PipelineParallelWithInterleave._check_sanity",
            "",
            "two stages of several parts, and steps of few micro-batches, would be refused",
        ),
        (
            SCHEDULES + "PipelineParallelWithInterleave._get_virtual_pp_rank",
            "micro_step forward",
            "sizes of what arrives would be those of another micro-batch",
        ),
        (
            P2P + "P2pHelper._send_meta",
            "output_tensor skip_check_meta reverse",
            "sizes would be sent, and each transfer would wait for the device twice",
        ),
        (P2P + "P2pHelper._recv_meta", "reverse", "sizes would be asked for that nobody sends: a run would hang"),
        (
            SCHEDULES + "PipelineParallel.is_pipeline_first_stage",
            "ignore_virtual",
            "sizes would be expected of what the first stage never receives",
        ),
        (
            SCHEDULES + "PipelineParallel.is_pipeline_last_stage",
            "ignore_virtual",
            "sizes would be expected of gradients that the last stage never receives",
        ),
        (
            SCHEDULES + "PipelineLayer.__init__",
            "layers num_stages topology loss_fn seg_method "
            "recompute_interval recompute_ctx num_virtual_pipeline_stages",
            "stages would have other parts of the model, or none would be made",
        ),
        (
            "paddle.distributed.fleet.utils.tensor_fusion_helper:logger.setLevel",
            "",
            "how parameters are grouped would be said to users",
        ),
        (GROUPS + "create_fuse_group", "fused_strategy_list", "pieces could not lie on the ranks that share rows, too"),
        (GROUPS + "get_dp_sep_parallel_group", "", "gradients of ranks that share rows would not be summed"),
    ],
)
def test_what_is_overridden_or_called_is_there(name: str, parameters: str, why: str) -> None:
    found = find(name)
    assert callable(found), changed(name, f"is gone, and {why}")
    has = list(inspect.signature(found).parameters)[1:]
    assert has[: len(parameters.split())] == parameters.split(), changed(name, f"takes {has}, and {why}")


def test_groups_of_those_that_share_rows(fleet: Any) -> None:
    """Of 2 x 2 x 2 ranks: pieces, tokens of a row, tensors, of which the last are side by side."""
    ranks = [result.value for result in run_ranks(8, "group_jobs:sharing_rows", timeout=60)]
    pieces = {tuple(own) for own, _ in ranks}
    why = changed("create_fuse_group", "fuses other ranks: pieces would be summed over ranks of other tensors")
    assert pieces == {(0, 2, 4, 6), (1, 3, 5, 7)}, why
    rows = {tuple(own) for _, own in ranks}
    why = changed("get_dp_sep_parallel_group", "has other ranks: gradients would be those of a part of a row")
    assert len(rows) == 4, why
    assert all(own[1] - own[0] in (2, 4) for own in rows), why


def test_segments(paddle: Any) -> None:
    """A pipeline's layer is a function named ``part``, and each is one part of a stage."""
    from paddle.distributed.fleet.meta_parallel.parallel_layers.pp_layers import SegmentLayers

    from sft_parallel_4d.fleet import _part

    layers = [_part(lambda chunk, received: received, number // 2) for number in range(6)]
    found = SegmentLayers(layers, num_parts=2, method="layer:part", num_virtual_pipeline_stage=3).do_segment()
    assert found == list(range(7)), changed("PipelineLayer(seg_method='layer:part')", f"cuts parts at {found}")


@pytest.mark.parametrize("schedule", ["PipelineParallel", "PipelineParallelWithInterleave"])
def test_p2p_helper(paddle: Any, schedule: str) -> None:
    """Whom a schedule lets send and receive: ours is put there once it is made."""
    name = f"{SCHEDULES}{schedule}.forward_backward_pipeline"
    why = "does not send by _p2p_helper: stages would send sizes, and wait for the device at each transfer"
    assert "_p2p_helper" in find(name).__code__.co_names, changed(name, why)


def test_backward_hooks(fleet: Any) -> None:
    """There are as many as micro-batches; fleet counts how often they were run, and refuses to end a step before."""
    engine = object.__new__(fleet.OneForwardOneBackward)
    engine.__dict__.update(_virtual_pp_world_size=None, accumulate_steps=3)
    engine._init_user_hooks()
    hooks = getattr(engine, "backward_hooks", None)
    assert callable(getattr(hooks, "run_hook", None)), changed("PipelineParallel.backward_hooks", "are not made there")
    for _ in range(3):
        hooks.run_hook()
    assert hooks.current_id == 3, changed("PipelineParallel.backward_hooks", "are not counted: no step would end")


def test_pp_configs(paddle: Any) -> None:
    """The loss is not divided by the number of micro-batches, and each transfer goes by itself."""
    settings = paddle.distributed.fleet.DistributedStrategy()
    asked = {"delay_scale_loss": True, "use_batch_p2p_comm": False, "overlap_p2p_comm": True}
    settings.hybrid_configs = {"pp_configs": dict(asked)}
    has = settings.hybrid_configs["pp_configs"]
    assert {name: getattr(has, name, None) for name in asked} == asked, changed("pp_configs", f"holds {has}")


def test_sizes_are_those_that_are_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the four calls that fleet's schedules make; nothing asks another process."""
    from paddle.distributed.fleet.meta_parallel.pp_utils import p2p_communication

    from sft_parallel_4d.fleet import KnownSizes

    asked: list[tuple[bool, bool]] = []
    hcg = SimpleNamespace(
        **{f"get_model_parallel_{what}": lambda: 1 for what in ("group", "world_size", "rank")},
        get_stage_id=lambda: 1,
    )

    def transfer(to_before: Any, from_before: Any, to_next: Any, from_next: Any, hcg: Any) -> list[Any]:
        asked.append((from_before is not None, from_next is not None))
        return []

    monkeypatch.setattr(p2p_communication, "_hcg", hcg)
    monkeypatch.setattr(p2p_communication, "_p2p_ops", transfer)
    sizes = KnownSizes()
    sizes.expect(iter([[1, 2], [3, 4]]), iter([[5, 6], [7, 8]]), "bfloat16")
    options = {"batch_p2p_comm": False}
    found = [
        sizes.recv_forward(False, **options),
        sizes.recv_backward(False, **options),
        sizes.send_forward_recv_forward(None, recv_prev=True, overlap_p2p_comm=True, **options)[0],
        sizes.send_backward_recv_backward(None, recv_next=True, overlap_p2p_comm=True, **options)[0],
    ]
    assert [tensor.shape for tensor in found] == [[1, 2], [5, 6], [3, 4], [7, 8]]
    assert {str(tensor.dtype) for tensor in found} == {"paddle.bfloat16"}
    assert [tensor.stop_gradient for tensor in found[::2]] == [False, False], "no gradient would be sent back"
    assert asked == [(True, False), (False, True)] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "chunks", "counts"),
    [(2, 1, [1, 3, 2]), (4, 1, [1, 6]), (2, 2, [4, 5, 7]), (3, 2, [6, 8]), (4, 2, [8, 11]), (2, 3, [4, 6])],
)
def test_a_schedule_takes_each_micro_batch_through_all_parts(stages: int, chunks: int, counts: list[int]) -> None:
    """Sizes differ from micro-batch to micro-batch, their number from step to step. Each part multiplies, so that the
    loss and every gradient are known. An order of transfers that hangs where a send waits for its receiver is none."""
    results = [result.value for result in run_ranks(stages, "part_jobs:schedules", chunks, counts, timeout=60)]
    parts = stages * chunks
    for step, count in enumerate(counts):
        for rank, result in enumerate(results):
            sizes = [micro + 1 for micro in range(count)]
            for chunk in range(chunks):
                part = chunk * stages + rank
                # What went into the part, and its gradient: the product of the factors before, and of those behind.
                before, behind = (2.0**part, 2.0 ** (parts - 1 - part))
                wanted = sum(size * before * behind for size in sizes)
                assert result[step]["gradients"][chunk] == pytest.approx(wanted), (step, rank, chunk)
        losses = [size * 2.0**parts for size in range(1, count + 1)]
        assert results[-1][step]["losses"] == losses
        assert results[-1][step]["measured"] == losses
        transfers = [result[step]["transfers"] for result in results]
        assert blocks_nobody(transfers)
        # There and back between parts, and nothing else: no message says a size.
        assert sum(kind == "send" for own in transfers for kind, _ in own) == 2 * (parts - 1) * count


def blocks_nobody(transfers: Sequence[Sequence[tuple[str, int]]]) -> bool:
    """Whether all get to their ends where each send and each receive waits for its counterpart: ("send" or "recv", the
    other rank) of each rank, in its order."""
    left = [list(each) for each in transfers]
    moved = True
    while moved:
        moved = False
        for rank, own in enumerate(left):
            if not own:
                continue
            kind, other = own[0]
            counterpart = ["recv" if kind == "send" else "send", rank]
            if left[other] and list(left[other][0]) == counterpart:
                own.pop(0)
                left[other].pop(0)
                moved = True
    return not any(left)


def test_that_an_order_which_blocks_is_told_apart() -> None:
    assert blocks_nobody([[("send", 1), ("recv", 1)], [("recv", 0), ("send", 0)]])
    assert not blocks_nobody([[("send", 1), ("recv", 1)], [("send", 0), ("recv", 0)]])

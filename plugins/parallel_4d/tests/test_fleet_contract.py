"""What fleet.py takes for granted of paddle's fleet, each name by itself: what fails here is what paddle has changed.

A group of one process stands for more where only the layout counts: fleet cuts a buffer by ``nranks`` and ``rank``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


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

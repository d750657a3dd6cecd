"""Buckets of one process, beside the processes of other tests: which type sums have, when what leaves, what is refused.

A group that stands for two processes, of which the other has the same gradients, notes what is sent.
"""

from __future__ import annotations

import gc
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sft import SftError
from sft.training.wide_sums import WideSums


class Twins:
    """Collectives among two processes, of which the other one has the same tensors; ``sent`` has the operation and the
    number of values of each."""

    def __init__(self, paddle: Any, monkeypatch: pytest.MonkeyPatch, rank: int = 0) -> None:
        from sft_parallel_4d.topology import Axis

        self.sent: list[tuple[str, int]] = []
        self.axis, self.alone = Axis(rank, SimpleNamespace(nranks=2, rank=rank)), Axis(0, None)
        done = SimpleNamespace(wait=lambda: None)

        def all_reduce(tensor: Any, op: Any = None, group: Any = None, sync_op: bool = True) -> Any:
            self.sent.append(("all_reduce", tensor.size))
            tensor.scale_(2.0)
            return done

        def reduce_scatter(out: Any, tensor: Any, op: Any = None, group: Any = None, sync_op: bool = True) -> Any:
            self.sent.append(("reduce_scatter", tensor.size))
            paddle.assign(paddle.split(tensor * 2.0, 2)[rank], out)
            return done

        def all_gather(whole: Any, tensor: Any, group: Any = None, sync_op: bool = True) -> Any:
            self.sent.append(("all_gather", whole.size))
            paddle.assign(paddle.concat([tensor, tensor]), whole)
            return done

        monkeypatch.setattr(paddle.distributed, "all_reduce", all_reduce)
        monkeypatch.setattr(paddle.distributed, "reduce_scatter", reduce_scatter)
        monkeypatch.setattr(paddle.distributed.stream, "all_gather", all_gather)

    def topology(self, stage: int) -> Any:
        """Two processes that read different records, as the stage has them."""
        data, sharding = (self.alone, self.axis) if stage else (self.axis, self.alone)
        return SimpleNamespace(data=data, sharding=sharding, tensor=self.alone)

    def kinds(self, stage: int, **more: Any) -> Any:
        """What :meth:`Buckets.build` needs to know of parameters."""
        from sft_parallel_4d.buckets import Kinds

        axes = () if stage else (self.axis,)
        return Kinds(lambda parameter: axes, **more)


def buckets_of(twins: Twins, stage: int, size: int = 1 << 27) -> Any:
    from sft_parallel_4d.buckets import Buckets

    return Buckets(twins.topology(stage), stage, size, None)


def parameter(paddle: Any, *shape: int, dtype: str = "float32") -> Any:
    found = paddle.base.framework.EagerParamBase.from_tensor(paddle.ones(list(shape)).astype(dtype))
    found.stop_gradient = False
    return found


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_16_bit_gradients_add_up_in_float32_over_micro_batches_and_ranks(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """40 gradients near 1, against float64. In bfloat16 they would be off by 1e-2."""
    twins, one = Twins(paddle, monkeypatch), parameter(paddle, 6, dtype="bfloat16")
    buckets = buckets_of(twins, stage)
    buckets.build([one], twins.kinds(stage))
    sums = WideSums([one])
    draws = 1 + 0.1 * np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    gradients = [paddle.to_tensor(draw).astype("bfloat16") for draw in draws]
    buckets.begin(40)
    for gradient in gradients:
        with sums.backward():
            (one * gradient).sum().backward()
        buckets.passed()
    buckets.finish()
    stepped = buckets.piece(one)
    assert (stepped.dtype, stepped.grad.dtype) == (paddle.bfloat16, paddle.float32)
    expected = 2 * sum(gradient.astype("float64").numpy() for gradient in gradients)
    np.testing.assert_allclose(stepped.grad.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_collectives_of_a_step_do_not_grow_with_its_tensors(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """Of two micro-batches: gradients once, in stage 2 twice; stepped values once."""

    def sent(tensors: int) -> list[str]:
        twins, some = Twins(paddle, monkeypatch), [parameter(paddle, 5) for _ in range(tensors)]
        buckets = buckets_of(twins, stage)
        buckets.build(some, twins.kinds(stage))
        buckets.begin(2)
        for _ in range(2):
            paddle.add_n([one.sum() for one in some]).backward()
            buckets.passed()
        buckets.finish()
        for one in filter(buckets.holds, some):
            # Each value's gradient is 1; there are two micro-batches, and two processes.
            np.testing.assert_array_equal(buckets.piece(one).grad.numpy(), [4.0] * buckets.piece(one).size)
        buckets.spread()
        return [operation for operation, _ in twins.sent]

    expected = {
        0: ["all_reduce"],
        1: ["reduce_scatter", "all_gather"],
        2: ["reduce_scatter", "reduce_scatter", "all_gather"],
    }[stage]
    assert sent(1) == sent(9) == expected


def test_buckets_leave_in_one_order_whatever_order_gradients_come_in(
    paddle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last parameters first, as backward usually goes; what no micro-batch has reached leaves at the end, and what
    may be reached often, after all others."""
    sizes = {"first": 100, "second": 200, "third": 300, "shared": 400}
    some = {name: parameter(paddle, size) for name, size in sizes.items()}
    padded = {name: -(-size // 64) * 64 for name, size in sizes.items()}
    twins = Twins(paddle, monkeypatch)
    buckets = buckets_of(twins, 0, size=1)
    buckets.build(list(some.values()), twins.kinds(0, late={id(some["shared"])}))

    def step(*order: tuple[str, ...]) -> list[list[str]]:
        """What has left after each backward pass through some, and at the end."""
        twins.sent.clear()
        names = {size: name for name, size in padded.items()}
        found = []
        buckets.begin(1)
        for reached in order:
            paddle.add_n([some[name].sum() for name in reached]).backward()
            found.append([names[size] for _, size in twins.sent])
        buckets.finish()
        return [*found, [names[size] for _, size in twins.sent]]

    all_of_them = ["third", "second", "first", "shared"]
    assert step(("third",), ("second",), ("first",)) == [all_of_them[:1], all_of_them[:2], all_of_them[:3], all_of_them]
    assert step(("first",), ("second",), ("third",)) == [[], [], all_of_them[:3], all_of_them]
    assert step(("second",), ("shared",), ("shared",)) == [[], [], [], all_of_them]
    np.testing.assert_array_equal(some["shared"].grad.numpy(), [4.0] * 400)
    np.testing.assert_array_equal(some["first"].grad.numpy(), [0.0] * 100)


def test_a_bucket_has_the_size_that_is_stated(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    twins, some = Twins(paddle, monkeypatch), [parameter(paddle, 64) for _ in range(12)]
    buckets = buckets_of(twins, 1, size=4 * 64 * 4)
    buckets.build(some, twins.kinds(1))
    buckets.begin(1)
    paddle.add_n([one.sum() for one in some]).backward()
    buckets.finish()
    assert twins.sent == [("reduce_scatter", 4 * 128)] * 3


def test_a_gradient_that_comes_when_its_bucket_has_left_ends_the_run(
    paddle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be left out of the sum."""
    twins, one = Twins(paddle, monkeypatch), parameter(paddle, 5)
    buckets = buckets_of(twins, 1)
    buckets.build([one], twins.kinds(1))
    buckets.begin(1)
    one.sum().backward()
    one.sum().backward()
    with pytest.raises(SftError, match=r"has reached the parameter .* \[5\] more than once in a micro-batch"):
        buckets.passed()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_whoever_catches_the_error_of_a_step_goes_on_with_the_next(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    twins, some = Twins(paddle, monkeypatch), [parameter(paddle, 64) for _ in range(3)]
    buckets = buckets_of(twins, stage, size=1)
    buckets.build(some, twins.kinds(stage))
    buckets.begin(1)
    some[2].sum().backward()
    some[2].sum().backward()
    some[1].sum().backward()
    with pytest.raises(SftError, match="more than once in a micro-batch"):
        buckets.passed()
    buckets.begin(1)
    paddle.add_n([one.sum() for one in some]).backward()
    buckets.passed()
    buckets.finish()
    for one in filter(buckets.holds, some):
        np.testing.assert_array_equal(buckets.piece(one).grad.numpy(), [2.0] * buckets.piece(one).size)


def test_gradients_of_others_are_left_alone(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes backward outside of a step has their gradient where paddle puts it."""
    twins, one = Twins(paddle, monkeypatch), parameter(paddle, 5)
    buckets = buckets_of(twins, 0)
    buckets.build([one], twins.kinds(0))
    one.sum().backward()
    np.testing.assert_array_equal(one.grad.numpy(), [1.0] * 5)
    assert twins.sent == []


@pytest.mark.parametrize("rank", [0, 1])
def test_an_optimizer_may_give_a_slice_another_memory(paddle: Any, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """The new values are spread all the same: a slice that is no view of the buffer any more is written back to it."""
    twins, one = Twins(paddle, monkeypatch, rank), parameter(paddle, 256)
    buckets = buckets_of(twins, 1)
    buckets.build([one], twins.kinds(1))
    paddle.full([128], 3.0)._share_buffer_to(buckets.piece(one))
    buckets.spread()
    np.testing.assert_array_equal(one.numpy(), [3.0] * 256)
    assert buckets.bounds(one) == (128 * rank, 128 * (rank + 1))


def test_late_is_what_blocks_share(paddle: Any) -> None:
    from sft_parallel_4d.buckets import shared_by

    def block(*layers: Any) -> Any:
        found = paddle.nn.Layer()
        found.mlp = paddle.nn.LayerList(layers)
        return found

    shared = paddle.nn.Linear(2, 2)
    blocks = [block(shared, paddle.nn.Linear(2, 2)), block(paddle.nn.Linear(2, 2), shared)]
    assert shared_by(blocks) == {id(parameter) for parameter in shared.parameters()}


def test_gradients_are_put_together_as_forward_meets_parameters(paddle: Any) -> None:
    """A block's norms are registered behind its matrices; experts lead, since backward is through with them last."""
    from sft.models.architecture import Norms
    from sft_parallel_4d.buckets import as_met

    block = ["self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.gate.weight", "mlp.experts.0.up_proj.weight"]
    block += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names = [f"model.layers.{number}.{name}" for number in (9, 10) for name in block]
    names = ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]
    found = as_met({name: name for name in names}, Norms())
    met = [block[3], block[4], *block[:2], block[5], block[2]]
    met = [f"model.layers.{number}.{name}" for number in (9, 10) for name in met]
    assert found == [names[0], *met, *names[-2:]]


class Mixture:
    """A model of three blocks, each of a vector, two matrices and four experts of which the first ones are chosen."""

    def __init__(self, paddle: Any, chosen: int = 2) -> None:
        class Block(paddle.nn.Layer):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.before, self.behind = (parameter(paddle, *shape) for shape in ([8], [8, 8], [8, 8]))
                self.mlp = paddle.nn.Layer()
                self.mlp.experts = paddle.nn.LayerList([paddle.nn.Linear(8, 8, bias_attr=False) for _ in range(4)])

            def forward(self, x: Any) -> Any:
                x = x + ((x * self.norm) @ self.before) @ self.behind
                return paddle.add_n([x, *(expert(x) for expert in self.mlp.experts[:chosen])])

        self.blocks = [Block() for _ in range(3)]
        self.embedding = parameter(paddle, 40, 8)

    def backward(self) -> None:
        x = self.embedding[3:5]
        for block in self.blocks:
            x = block(x)
        x.sum().backward()

    @property
    def met(self) -> list[Any]:
        layers = [[*block.mlp.experts.parameters(), block.norm, block.before, block.behind] for block in self.blocks]
        return [self.embedding, *(one for layer in layers for one in layer)]


@pytest.mark.parametrize("recompute", [False, True])
def test_experts_leave_when_backward_is_through_with_their_block(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    """Whether or not any token has reached them."""
    from sft.models.recompute import recomputed
    from sft_parallel_4d.buckets import of_experts

    model, twins, seen = Mixture(paddle), Twins(paddle, monkeypatch), []
    if recompute:
        for block in model.blocks:
            monkeypatch.setattr(block, "forward", partial(recomputed, block.forward))
    buckets = buckets_of(twins, 1)
    alone = {id(one) for one in model.met}
    buckets.build(model.met, twins.kinds(1, experts=of_experts(model.blocks), alone=alone))
    buckets.begin(2)
    for _ in range(2):
        model.backward()
        seen.append(len(twins.sent))
        buckets.passed()
    assert seen == [0, len(model.met)]
    buckets.finish()
    reached, _, idle = (model.blocks[0].mlp.experts[number].weight for number in (0, 1, 2))
    pieces = [one for one in (reached, idle) if buckets.holds(one)]
    assert [bool(buckets.piece(one).grad.any()) for one in pieces] == [True, False]


@pytest.mark.parametrize("size", [1, 3 * 64 * 4, 1 << 20])
@pytest.mark.parametrize("case", ["all", "frozen embedding", "norms of their own"])
def test_what_is_whole_at_a_time_is_what_a_plan_says(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, size: int, case: str
) -> None:
    """Stage 2, of three micro-batches, where there is no reduce-scatter: a buffer is whole until it is settled."""
    from sft_parallel_4d.buckets import Kinds, of_experts
    from sft_parallel_4d.filling import Gradient, Layer, course, whole
    from sft_parallel_4d.fleet import Bucket

    def lacking(*_: Any, **__: Any) -> Any:
        raise NotImplementedError

    model, twins = Mixture(paddle, chosen=4), Twins(paddle, monkeypatch)
    monkeypatch.setattr(paddle.distributed, "reduce_scatter", lacking)
    if case == "frozen embedding":
        model.embedding.stop_gradient = True
    buckets, summed = buckets_of(twins, 2, size), case == "norms of their own"
    # As tensor ranks have them: their sums are summed once more.
    kinds = Kinds(lambda one: (twins.axis,) if summed and one.ndim == 1 else (), of_experts(model.blocks))
    buckets.build([one for one in model.met if not one.stop_gradient], kinds)
    found, add, settle = [], Bucket.add, Bucket.settle

    def live() -> int:
        return sum(4 * way.bucket.grad_storage.size for way in buckets._ways if way.bucket.grad_storage is not None)

    def added(bucket: Any, one: Any, gradient: Any) -> None:
        add(bucket, one, gradient)
        found.append(live() + 4 * gradient.size)

    def settled(bucket: Any) -> None:
        found.append(live() + (4 * bucket.buffer_size // 2 if bucket.grad_storage is not None else 0))
        settle(bucket)

    monkeypatch.setattr(Bucket, "add", added)
    monkeypatch.setattr(Bucket, "settle", settled)
    buckets.begin(3)
    left = []
    for _ in range(3):
        model.backward()
        buckets.passed()
        left.append(live())

    def gradient(one: Any) -> Any:
        return Gradient(4 * one.size, 256, 4 * one.size, one.ndim > 1, summed and one.ndim == 1)

    def layer(block: Any) -> Any:
        dense = tuple(map(gradient, (block.norm, block.before, block.behind)))
        return Layer(dense, tuple(map(gradient, block.mlp.experts.parameters())))

    first = Layer(() if model.embedding.stop_gradient else (gradient(model.embedding),))
    said = whole(course([first, *map(layer, model.blocks), Layer()], size, False), 2)
    assert (max(found), left) == (said.most, [said.left] * 3)


def test_a_gradient_that_enters_where_processes_meet_may_be_that_of_another_tensor_too(
    paddle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paddle gives both sides of a sum the same gradient; the one that is added up over processes is a copy."""
    from sft_parallel_4d.meeting import BlockMeeting

    twins, one, beside = Twins(paddle, monkeypatch), parameter(paddle, 3), parameter(paddle, 3)
    ((BlockMeeting(twins.axis, False).enter(one * 1.0) + beside) * 5.0).sum().backward()
    np.testing.assert_array_equal(one.grad.numpy(), [10.0] * 3)
    np.testing.assert_array_equal(beside.grad.numpy(), [5.0] * 3)


def test_copies_of_all_buckets_to_and_from_the_host_are_begun_before_any_is_waited_for(
    paddle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With offload: slices of values and gradients are the host's own memory, and what is stepped there is spread."""
    from sft_parallel_4d.buckets import Buckets
    from sft_parallel_4d.offload import Host, Resting

    calls: list[str] = []

    class Noting(Host):
        def take(self, tensor: Any) -> Resting:
            calls.append("take")
            return Resting(tensor.clone(), wait=lambda: calls.append("wait"))

        def give(self, resting: Resting) -> Any:
            calls.append("give")
            return resting.tensor.clone(), lambda: calls.append("wait")

    twins, some = Twins(paddle, monkeypatch), [parameter(paddle, 64) for _ in range(6)]
    buckets = Buckets(twins.topology(1), 1, 2 * 64 * 4, Noting())
    buckets.build(some, twins.kinds(1))
    calls.clear()
    buckets.begin(1)
    paddle.add_n([one.sum() for one in some]).backward()
    buckets.finish()
    assert calls == ["take"] * 3 + ["wait"] * 3
    held = [buckets.piece(one) for one in some if buckets.holds(one)]
    for piece in held:
        np.testing.assert_array_equal(piece.grad.numpy(), [2.0] * 64)
        paddle.assign(paddle.full([64], 7.0), piece)
    assert all((one.numpy() == 1.0).all() for one in some)  # the device's are other memory
    calls.clear()
    buckets.spread()
    assert calls == ["give"] * 3 + ["wait"] * 3
    assert [operation for operation, _ in twins.sent] == ["reduce_scatter"] * 3 + ["all_gather"] * 3
    assert all((one.numpy() == 7.0).all() for one in some)


def test_what_is_copied_to_the_host_lives_until_the_copy_is_there(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where another stream copies: paddle's two calls are played here, the copy is made at the end."""
    from sft_parallel_4d import offload

    sources: list[Any] = []

    def begin(tensor: Any, copies: Any) -> Any:
        sources.append(weakref.ref(tensor))
        there = paddle.zeros_like(tensor)
        return there, SimpleNamespace(cpu_wait=lambda: paddle.assign(sources[0](), there))

    monkeypatch.setattr(offload, "async_offload", begin)
    host = offload.Host()
    host._copies = object()
    resting = host.take(paddle.full([5], 3.0))
    gc.collect()
    assert sources[0]() is not None
    resting.wait()
    np.testing.assert_array_equal(resting.tensor.numpy(), [3.0] * 5)
    assert sources[0]() is None

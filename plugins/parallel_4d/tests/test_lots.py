"""Small tensors travel together: few collectives a step, whose results are those of one a tensor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

SHAPES = [(2, 3), (12,), (2, 2, 2), (5, 1)]


class Twins:
    """Makes axes of two processes, of which the other one has the same tensors; ``sent`` has the values of each
    collective's tensor."""

    def __init__(self, rank: int) -> None:
        from sft_parallel_4d.topology import Axis

        sent: list[int] = []

        class Twin(Axis):
            def sum(self, tensor: Any) -> Any:
                sent.append(int(np.prod(tensor.shape)))
                return tensor.scale_(2.0)

            def sum_own(self, tensor: Any, dimension: int, spoil: bool = False) -> Any:
                return self.own(self.sum(tensor if spoil else tensor.clone()), dimension)

            def gather(self, tensor: Any, dimension: int) -> Any:
                import paddle

                sent.append(int(np.prod(tensor.shape)))
                return paddle.concat([tensor, tensor], axis=dimension)

        self.axis, self.sent = Twin(rank, SimpleNamespace(nranks=2)), sent


def arrays(shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    return [np.random.default_rng(n).standard_normal(shape).astype(np.float32) for n, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("bucket", "small", "sent"),
    [
        (1 << 20, 1 << 20, [31]),
        (4 * 20, 1 << 20, [18, 13]),
        (4 * 6, 1 << 20, [6, 12, 8, 5]),
        (1 << 20, 4 * 8, [12, 19]),
        (1 << 20, 4 * 4, [6, 12, 8, 5]),
    ],
)
def test_sums_of_many_in_buffers(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, bucket: int, small: int, sent: list[int]
) -> None:
    from sft_parallel_4d import lots

    monkeypatch.setattr(lots, "BUCKET", bucket)
    monkeypatch.setattr(lots, "SMALL", small)
    twins, values = Twins(0), arrays(SHAPES)
    found = dict(twins.axis.sums((number, paddle.to_tensor(array)) for number, array in enumerate(values)))
    assert twins.sent == sent
    assert sorted(found) == [0, 1, 2, 3]
    for number, array in enumerate(values):
        np.testing.assert_array_equal(found[number].numpy(), 2 * array)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("bucket", "small", "sent"),
    [
        (1 << 20, 1 << 20, [28, 28]),
        (1 << 20, 4 * 12, [12, 8, 8, 28]),  # what is gathered has twice the size, and is alone or not by that
        (4 * 36, 1 << 20, [18, 10, 28]),
        (1 << 20, 1, [6, 12, 2, 8, 6, 12, 2, 8]),
    ],
)
def test_parts_of_sums_and_whole_tensors(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, bucket: int, small: int, sent: list[int], rank: int
) -> None:
    from sft_parallel_4d import lots

    monkeypatch.setattr(lots, "BUCKET", bucket)
    monkeypatch.setattr(lots, "SMALL", small)
    twins, values = Twins(rank), arrays([(6,), (12,), (2,), (8,)])
    pairs = [(number, paddle.to_tensor(array)) for number, array in enumerate(values)]
    whole = dict(twins.axis.gathers(pairs))
    own = dict(twins.axis.sums_own(pairs))
    assert twins.sent == sent
    for number, array in enumerate(values):
        np.testing.assert_array_equal(whole[number].numpy(), np.concatenate([array, array]))
        np.testing.assert_array_equal(own[number].numpy(), 2 * np.split(array, 2)[rank])


def test_types_travel_apart_and_tensors_are_asked_for_when_they_are_due(
    paddle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that not all that rests on the host comes to the device at once."""
    from sft_parallel_4d import lots

    monkeypatch.setattr(lots, "BUCKET", 30)
    asked: list[str] = []

    def tensors() -> Any:
        for dtype in ("float32", "float64", "float32", "float32"):
            asked.append(dtype)
            yield len(asked), paddle.ones([3], dtype)

    twins = Twins(0)
    sums = twins.axis.sums(tensors())
    next(sums)
    assert asked == ["float32", "float64", "float32", "float32"]
    assert twins.sent == [6]
    assert [str(one.dtype) for _, one in sums] == ["paddle.float32", "paddle.float64", "paddle.float32"]
    assert twins.sent == [6, 3, 3]


def test_alone_nothing_travels(paddle: Any) -> None:
    from sft_parallel_4d.topology import Axis

    pairs, axis = [("one", paddle.ones([2])), ("other", paddle.ones([4]))], Axis(0, None)
    for kept in (axis.sums(pairs), axis.sums_own(pairs), axis.gathers(pairs)):
        assert all(one is other[1] for (_, one), other in zip(kept, pairs, strict=True))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_collectives_of_a_sharded_step_do_not_grow_with_its_tensors(paddle: Any, stage: int) -> None:
    """Of two micro-batches, and three layers that exist whole while they compute."""
    from sft_parallel_4d.sharding import Shards

    def collectives(tensors: int) -> int:
        twins = Twins(0)
        shards = Shards(twins.axis, stage, False, lambda pairs: pairs)
        layers = [paddle.nn.LayerList([paddle.nn.Linear(3, 5) for _ in range(tensors)]) for _ in range(3)]
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        shards.watch(parameters)
        for parameter in filter(shards.takes, parameters):
            parameter._clear_data()
        for _ in range(2):
            for layer in layers:
                with shards.whole(layer):
                    paddle.add_n([one(paddle.ones([1, 3])).sum() for one in layer]).backward()
            shards.flush()
        shards.collect(parameter for parameter in parameters if shards.waits(parameter))
        shards.spread(parameters)
        for parameter in parameters:
            assert parameter.grad is None
            # Each value's gradient is 1; there are two micro-batches, and two processes.
            np.testing.assert_array_equal(shards.piece(parameter).grad.numpy(), [4.0] * (-(-parameter.size // 2)))
        return len(twins.sent)

    few = collectives(1)
    gathered, summed, spread = {1: (0, 1, 1), 2: (0, 2, 1), 3: (3 * 2, 2, 1)}[stage]
    assert few == gathered + summed + spread
    assert collectives(9) == few

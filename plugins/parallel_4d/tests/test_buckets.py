"""Gradients travel together: few collectives a step, whose results are those of one a tensor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def axis(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An axis of two processes, of which the other one has the same tensors; ``sent`` has the values of each sum."""
    from sft_parallel_4d.topology import Axis

    made = Axis(0, SimpleNamespace(nranks=2))
    made.sent = []  # type: ignore[attr-defined]

    def total(tensor: Any) -> Any:
        made.sent.append(int(np.prod(tensor.shape)))  # type: ignore[attr-defined]
        return tensor.scale_(2.0)

    monkeypatch.setattr(made, "sum", total)
    return made


@pytest.mark.parametrize(
    ("room", "sent"), [(1 << 20, [31]), (4 * 20, [18, 13]), (4 * 6, [6, 12, 8, 5]), (1, [6, 12, 8, 5])]
)
def test_sums_of_many_in_buffers(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, axis: Any, room: int, sent: list[int]
) -> None:
    from sft_parallel_4d import topology

    monkeypatch.setattr(topology, "BUCKET", room)
    shapes = [(2, 3), (12,), (2, 2, 2), (5, 1)]
    arrays = [np.random.default_rng(n).standard_normal(shape).astype(np.float32) for n, shape in enumerate(shapes)]
    found = list(axis.sums(paddle.to_tensor(array) for array in arrays))
    assert axis.sent == sent
    for one, array in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(one.numpy(), 2 * array)


def test_types_travel_apart_and_tensors_are_asked_for_when_they_are_due(paddle: Any, axis: Any) -> None:
    """So that not all that rests on the host comes to the device at once."""
    asked: list[str] = []

    def tensors() -> Any:
        for dtype in ("float32", "float32", "float64", "float32"):
            asked.append(dtype)
            yield paddle.ones([3], dtype)

    sums = axis.sums(tensors())
    assert str(next(sums).dtype) == "paddle.float32"
    assert asked == ["float32", "float32", "float64"]
    assert [str(one.dtype) for one in sums] == ["paddle.float32", "paddle.float64", "paddle.float32"]
    assert axis.sent == [6, 3, 3]


def test_alone_nothing_travels(paddle: Any) -> None:
    from sft_parallel_4d.topology import Axis

    tensors = [paddle.ones([2]), paddle.ones([3])]
    assert all(one is other for one, other in zip(Axis(0, None).sums(tensors), tensors, strict=True))

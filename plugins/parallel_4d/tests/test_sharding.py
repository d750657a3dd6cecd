"""The pieces of one process: in which type gradients add up, beside real processes that other tests start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sft.training.wide_sums import WideSums
from sft_parallel_4d.sharding import Shards
from sft_parallel_4d.topology import Axis


class Noting(Axis):
    """An axis of one process that notes the types of what it sums."""

    def __init__(self) -> None:
        super().__init__(0, None)
        self.types: set[str] = set()

    def sum_own(self, tensor: Any, dimension: int, spoil: bool = False) -> Any:
        self.types.add(str(tensor.dtype))
        return super().sum_own(tensor, dimension, spoil)


@pytest.mark.parametrize("stage", [1, 2])
def test_16_bit_gradients_add_up_in_float32_over_micro_batches_and_ranks(paddle: Any, stage: int) -> None:
    """In stage 2 after each micro-batch, in stage 1 after the last one: 40 gradients near 1, against float64. In
    bfloat16 they would be off by 1e-2."""
    axis, reduced = Noting(), []

    def reduce(pairs: Any) -> Any:
        for parameter, gradient in pairs:
            reduced.append(str(gradient.dtype))
            yield parameter, gradient

    shards = Shards(axis, stage, False, reduce)
    parameter = paddle.base.framework.EagerParamBase.from_tensor(paddle.ones([6]).astype("bfloat16"))
    parameter.stop_gradient = False
    shards.watch([parameter])
    sums = WideSums([parameter])
    draws = 1 + 0.1 * np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    gradients = [paddle.to_tensor(draw).astype("bfloat16") for draw in draws]
    for gradient in gradients:
        with sums.backward():
            (parameter * gradient).sum().backward()
        shards.flush()
    if shards.waits(parameter):
        shards.collect([parameter])
    piece = shards.piece(parameter)
    assert (piece.dtype, piece.grad.dtype, parameter.grad) == (paddle.bfloat16, paddle.float32, None)
    np.testing.assert_allclose(piece.grad.numpy(), sum(g.astype("float64").numpy() for g in gradients), rtol=1e-6)
    assert axis.types == set(reduced) == {"paddle.float32"}

"""``python collectives.py DEVICE``, in several processes at once: each collective of an axis of all of them, on whole
numbers, has to give what numpy gives. Every process ends with the first one that does not."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

WHOLE = ("int32", "int64", "float32")
NARROW = ("bfloat16", "float16")
"""Types that hold the numbers here, and their sums over 8 processes, exactly."""


def given(rank: int, size: int) -> np.ndarray:
    """What process ``rank`` of ``size`` brings: whole numbers up to 15, [2 · size, 3 · size]."""
    return np.random.default_rng(rank).integers(0, 16, (2 * size, 3 * size))


def found_and_wanted(axis: Any, dtype: str) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Of each collective its name, what came out, and what numpy says."""
    import paddle

    rank, size = axis.rank, axis.size
    every = np.stack([given(one, size) for one in range(size)])
    total, mine = every.sum(0), every[rank]

    def own() -> Any:
        return paddle.to_tensor(mine.astype("int64")).astype(dtype)

    yield "sum", axis.sum(own()), total
    begun = own()
    axis.begin_sum(begun).wait()
    yield "begin_sum", begun, total
    yield "maximum", axis.maximum(own()), every.max(0)
    for dimension in (0, 1):
        yield f"gather along {dimension}", axis.gather(own(), dimension), np.concatenate(every, dimension)
        part = np.split(total, size, dimension)[rank]
        yield f"sum_own along {dimension}", axis.sum_own(own(), dimension), part
    yield "broadcast", axis.broadcast(own(), size - 1), every[-1]
    parts = own().reshape([size, 2, 3 * size])
    yield "swap", axis.swap(parts), every.reshape(size, size, 2, 3 * size)[:, rank]
    leaving = [[(one + 2 * other) % 3 for other in range(size)] for one in range(size)]  # rows, none among them
    coming = [leaving[one][rank] for one in range(size)]
    starts = [np.cumsum([0, *counts]) for counts in leaving]
    rows = [every[one, starts[one][rank] : starts[one][rank + 1]] for one in range(size)]
    sent = own()[: sum(leaving[rank])]
    yield "trade", axis.trade(sent, leaving[rank], coming), np.concatenate(rows)
    partner = rank ^ 1
    if partner < size:
        received = paddle.zeros(list(mine.shape), dtype)
        axis.exchange([(own(), partner)], [(received, partner)])
        yield "exchange", received, every[partner]


def main() -> None:
    import paddle

    from sft_parallel_4d.plans import Plan
    from sft_parallel_4d.topology import connect

    if sys.argv[1] == "cpu":
        paddle.device.set_device("cpu")
    axis = connect(Plan(data=int(os.environ["PADDLE_TRAINERS_NUM"]))).data
    assert axis.size > 1
    for dtype in (*WHOLE, *(NARROW if sys.argv[1] == "gpu" else ())):
        names = []
        for name, found, wanted in found_and_wanted(axis, dtype):
            assert str(found.dtype).rpartition(".")[2] == dtype
            values = found.astype("float64").numpy()
            if not np.array_equal(values, wanted):
                raise ValueError(f"{name} of {dtype} gives {values.tolist()}, not {wanted.tolist()}")
            names.append(name)
        if axis.rank == 0:
            print(f"{dtype}: {len(names)} collectives are exact: {', '.join(names)}", flush=True)


if __name__ == "__main__":
    main()

"""What one token more of an answer costs: products of few rows, which take as long as it takes to read the matrix, and
attention of single tokens over keys and values that lie where they are."""

from __future__ import annotations

import math
from typing import Any

import paddle

import sft
from sft_kernels_cpu.tensors import BFLOAT16, FLOAT32, dense, empty, fits, learning

MOST = {FLOAT32: 32, BFLOAT16: 8}
"""By what a matrix is held in: of how many rows the native product is the faster one."""
MORE = 64
"""For how many tokens more there is room at least, each time that it is full."""


def few_rows(
    library: Any,
    x: Any,
    weight: Any,
    bias: Any | None,
    transposed: bool = False,
    update: tuple[Any, Any] | None = None,
    scaling: float = 1.0,
) -> Any | None:
    """x [..., in] · W + bias + ``scaling`` · (x · A) · B, of ``update`` (A, B): x, A and B float32, W [in, out], or
    [out, in] where ``transposed`` and then without an update, and bias float32 or bfloat16 → float32 [..., out]. None
    where there is something to learn, and where it is not made for the number of rows or the types."""
    *before, width = x.shape
    rows, held = math.prod(before), weight.dtype
    if not 0 < rows <= MOST.get(held, 0) or not weight.place.is_cpu_place():
        return None
    factors = (x, *update) if update else (x,)
    if not fits(*factors) or learning(weight, *factors, *(() if bias is None else (bias,))):
        return None
    if bias is not None and bias.dtype != FLOAT32:
        bias = bias.astype("float32")
    inner, columns = weight.shape[::-1] if transposed else weight.shape
    if inner != width:
        return None
    x, weight = dense(x), dense(weight)
    low = [dense(one) for one in update or ()]
    y = empty([*before, columns])
    done = library.few_rows(
        *(x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()),
        *(rows, inner, columns, held == BFLOAT16, transposed),
        *((*(one.data_ptr() for one in low), low[0].shape[1]) if low else (None, None, 0)),
        scaling,
    )
    if not done:
        raise MemoryError("no memory for a product of few rows")
    return y


class RoomyKeys(sft.KeptKeys):
    """Keys and values with room for what comes: nothing is copied for a token but where the room ends, and then half as
    much again is made. What is no single float32 token goes to what ``rest`` keeps."""

    def __init__(self, key: Any, value: Any, library: Any, rest: sft.Kernels) -> None:
        super().__init__(key, value)
        self._library, self._rest = library, rest
        self._seen = self._room = key.shape[1]
        self._others: sft.KeptKeys | None = None

    def attend(self, query: Any, key: Any, value: Any, seen: sft.Seen, cap: float | None) -> Any:
        (rows, count, heads, size), kv_heads = query.shape, key.shape[2]
        if self._others is None and (count > 1 or not fits(query, key, value) or learning(query, key, value)):
            before = (one[:, :, : self._seen].transpose([0, 2, 1, 3]) for one in (self._key, self._value))
            self._others = self._rest.kept_keys(*before)
        if self._others is not None:
            return self._others.attend(query, key, value, seen, cap)
        if self._seen == self._room:
            self._room += max(MORE, self._room // 2)
            self._key, self._value = self._roomier(self._key), self._roomier(self._value)
        query, key, value, first = dense(query), dense(key), dense(value), seen.first
        out = empty(query.shape)
        done = self._library.attention_of_one(
            *(one.data_ptr() for one in (query, key, value, self._key, self._value)),
            *(first.ctypes.data, out.data_ptr()),
            *(rows, heads, kv_heads, size, self._room, self._seen, 1.0 / math.sqrt(size), cap or 0.0),
        )
        if not done:
            raise MemoryError("no memory for the scores of a token")
        self._seen += 1
        return out

    def _roomier(self, kept: Any) -> Any:
        rows, heads, _, size = kept.shape
        more = paddle.zeros([rows, heads, self._room - self._seen, size], "float32")
        return paddle.concat([kept, more], axis=2)

"""Matrices in oneDNN's own layout, for as long as answers are computed: they meet a few rows again and again.

oneDNN's GEMM brings a matrix into that layout each time, which takes longer than a product of few rows.
"""

from __future__ import annotations

import weakref
from typing import Any

import paddle

from sft import dnnl

MOST = 64
"""Of how many rows; a prompt has more, and comes once."""

_FLOAT32 = paddle.float32  # paddle looks for its types anew each time
_CPU = paddle.CPUPlace()


class Packs:
    """The matrices that were met. They take as much memory as the model's own once more."""

    def __init__(self, engine: dnnl.Engine | None) -> None:
        """``engine`` is None where oneDNN has no such product, on processors without its instructions."""
        self._engine = engine
        self._products: dict[tuple[int, ...], dnnl.PackedProduct] = {}
        self._matrices: dict[tuple[Any, ...], tuple[weakref.ref[Any], int, Any]] = {}

    def product(self, x: Any, weight: Any, transposed: bool) -> Any | None:
        """x bfloat16 [B, 1, in] · W, bfloat16 [in, out], or [out, in] where ``transposed`` → float32 [B, 1, out]. None
        where x is not one token of each row, which is what comes again, the rows are many, or the matrix is no
        parameter."""
        inner, columns = weight.shape[::-1] if transposed else weight.shape
        engine, (*before, width) = self._engine, x.shape
        if engine is None or before[1:] != [1] or not 0 < before[0] <= MOST or width != inner or 0 in (inner, columns):
            return None
        if not weight.persistable:  # made anew for each product, it may be
            return None
        x, y = x.contiguous(), paddle._C_ops.empty([*before, columns], _FLOAT32, _CPU)
        with engine.lock:
            key = before[0], inner, columns
            product = self._products.get(key)
            if product is None:
                product = self._products[key] = dnnl.PackedProduct(engine, *key)
            packed = self._packed(product, before[0], weight, (1, inner) if transposed else (columns, 1))
            product.run(x.data_ptr(), packed.data_ptr(), y.data_ptr())
        return y

    def _packed(self, product: dnnl.PackedProduct, rows: int, weight: Any, strides: tuple[int, int]) -> Any:
        """The layout depends on the number of rows; a matrix that has changed is packed anew."""
        key = id(weight), rows, strides
        of, version, packed = self._matrices.get(key, (None, 0, None))
        if of is not None and bool(of() is weight) and version == weight.inplace_version:
            return packed
        packed, dense = paddle.empty([product.size], "uint8"), weight.contiguous()
        packing = product.packing(strides)
        try:
            packing.run(dense.data_ptr(), packed.data_ptr())
        finally:
            packing.close()
        self._matrices[key] = weakref.ref(weight), weight.inplace_version, packed
        return packed

    def close(self) -> None:
        """Give back what it holds."""
        while self._products:
            self._products.popitem()[1].close()
        self._matrices.clear()

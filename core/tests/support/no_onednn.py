"""What oneDNN computes, by paddle's own operations: for machines whose processor it cannot multiply bfloat16 on."""

from __future__ import annotations

from typing import Any


class Emulated:
    """The same methods as :class:`sft.models.onednn.OneDNN`: factors are rounded, products and sums are float32."""

    def product(
        self, x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False, out: Any | None = None
    ) -> Any:
        import paddle

        assert x.dtype == y.dtype
        product = paddle.matmul(x.astype("float32"), y.astype("float32"), transpose_x, transpose_y)
        return product if out is None else out.add_(product)

    def rounded(self, x: Any) -> Any:
        return x.astype("bfloat16")

    def widened(self, x: Any) -> Any:
        return x.astype("float32")

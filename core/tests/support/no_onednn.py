"""oneDNN, and what it computes by paddle's own operations: for machines on which it does not multiply bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft.models.onednn import OneDNN


def itself() -> OneDNN:
    """oneDNN, or a skip where this build of paddle has none. Where it has one that cannot be used, the test fails."""
    import pytest

    from sft import dnnl
    from sft.models.onednn import onednn

    if dnnl.library() is None:
        pytest.skip("this build of paddle has no oneDNN")
    return onednn()


class Emulated:
    """The same methods as :class:`sft.models.onednn.OneDNN`: factors are rounded, products and sums are float32."""

    def product(
        self, x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False, out: Any | None = None
    ) -> Any:
        import paddle

        assert x.dtype == y.dtype
        product = paddle.matmul(x.astype("float32"), y.astype("float32"), transpose_x, transpose_y)
        return product if out is None else out.add_(product.reshape(out.shape))

    def packs(self) -> Any:
        return EmulatedPacks()

    def rounded(self, x: Any) -> Any:
        return x.astype("bfloat16")

    def widened(self, x: Any) -> Any:
        return x.astype("float32")


class EmulatedPacks:
    """The same methods as :class:`sft.models.packed.Packs`."""

    def product(self, x: Any, weight: Any, transposed: bool) -> Any:
        return Emulated().product(x, weight, transpose_y=transposed)

    def close(self) -> None:
        """There is nothing to give back."""


def stand_in(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Where this processor does not multiply bfloat16 fast, runs get what oneDNN would compute; ``replace`` sets the
    attributes, such as monkeypatch's."""
    from sft.models import onednn, own_kernels

    if onednn.why_not() is not None:
        replace(onednn, "why_not", lambda: None)
        replace(own_kernels, "onednn", Emulated)

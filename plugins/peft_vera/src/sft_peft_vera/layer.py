"""The VeRA layer: y = x·W + ((x·A) ⊙ d)·B ⊙ b (arXiv 2310.11454, equation 2), in Paddle's [in, out] layout."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import paddle


class SharedPair:
    """The frozen pair of all layers: ``a`` float32 [widest in, r], ``b`` float32 [r, widest out]."""

    def __init__(self, a: np.ndarray, b: np.ndarray) -> None:
        self.a, self.b = paddle.to_tensor(np.ascontiguousarray(a)), paddle.to_tensor(np.ascontiguousarray(b))
        self._slices: dict[tuple[str, int], Any] = {}

    @property
    def rank(self) -> int:
        return int(self.a.shape[1])

    def set(self, a: np.ndarray, b: np.ndarray) -> None:
        """Other values, of the same shapes, for all layers."""
        self.a.set_value(np.ascontiguousarray(a))
        self.b.set_value(np.ascontiguousarray(b))
        for (half, width), part in self._slices.items():
            part.set_value(self.a[:width] if half == "a" else self.b[:, :width])

    def slices(self, in_features: int, out_features: int) -> tuple[Any, Any]:
        """The first rows of ``a`` and the first columns of ``b``; one copy for each width, however many layers."""
        if ("a", in_features) not in self._slices:
            self._slices["a", in_features] = self.a[:in_features]
        if ("b", out_features) not in self._slices:
            self._slices["b", out_features] = self.b[:, :out_features]
        return self._slices["a", in_features], self._slices["b", out_features]


class VeraLinear(paddle.nn.Layer):
    """A frozen Linear (or what stands for one) with trainable vectors ``vera_d`` [r] and ``vera_b`` [out], over its
    slices ``pair_A`` [in, r] and ``pair_B`` [r, out] of the shared pair."""

    sides: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "vera_d": (None,),
        "vera_b": ("out",),
        "pair_A": ("in", None),
        "pair_B": (None, "out"),
    }

    def __init__(
        self, base: Any, in_features: int, out_features: int, pair: SharedPair, d_initial: float, dropout: float
    ) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = in_features, out_features
        self.pair_A, self.pair_B = pair.slices(in_features, out_features)
        constant = paddle.nn.initializer.Constant
        self.vera_d = self.create_parameter([pair.rank], dtype="float32", default_initializer=constant(d_initial))
        self.vera_b = self.create_parameter([out_features], dtype="float32", default_initializer=constant(0.0))
        self.dropout = paddle.nn.Dropout(dropout) if dropout else None

    def forward(self, x: Any) -> Any:
        update = x if self.dropout is None else self.dropout(x)
        # b ⊙ scales columns of B: on [r, out] instead of on [..., out].
        return self.base(x) + paddle.matmul(paddle.matmul(update, self.pair_A) * self.vera_d, self.pair_B * self.vera_b)

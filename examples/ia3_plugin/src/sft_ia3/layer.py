"""The two layers of (IA)³ (arXiv 2205.05638, section 3.3). This imports paddle; the plugin imports it inside hooks."""

from __future__ import annotations

from typing import Any, ClassVar

import paddle


class Scaled(paddle.nn.Layer):
    """A frozen Linear and ``scale``, which trains: float32, as many as there are of what it scales, ones at first."""

    def __init__(self, base: Any, length: int) -> None:
        super().__init__()
        self.base = base
        ones = paddle.nn.initializer.Constant(1.0)
        self.scale = self.create_parameter([length], dtype="float32", default_initializer=ones)


class ScaledInputs(Scaled):
    """y = (l ⊙ x)·W + b: input [..., in] → output [..., out]."""

    sides: ClassVar[dict[str, tuple[str | None, ...]]] = {"scale": ("in",)}

    def forward(self, x: Any) -> Any:
        return self.base(x * self.scale.astype(x.dtype))


class ScaledOutputs(Scaled):
    """y = l ⊙ (x·W + b): input [..., in] → output [..., out]."""

    sides: ClassVar[dict[str, tuple[str | None, ...]]] = {"scale": ("out",)}

    def forward(self, x: Any) -> Any:
        y = self.base(x)
        return y * self.scale.astype(y.dtype)

"""The LoRA layer: y = x·W + b + s·dropout(x)·A·B (arXiv 2106.09685, equation 3), in Paddle's [in, out] layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import paddle

import sft

if TYPE_CHECKING:
    from sft_peft_lora.hooks import LoraForm


class LoraLinear(paddle.nn.Layer):
    """A frozen Linear (or the layer that stands for one) and a trainable low-rank update beside it.

    ``base`` is the Linear, ``lora_A`` float32 [in, r], ``lora_B`` float32 [r, out], ``scaling`` s. Input [..., in] →
    output [..., out]. A refinement may :meth:`subtract` a frozen pair from the base. A form (:class:`LoraForm`) derives
    its layers from this class: their further tensors are attributes, and for their ``forward`` there are
    :meth:`drops`, ``dropout``, :meth:`residual`, :meth:`update` and :meth:`pair`.
    """

    kernels = sft.PLAIN

    sides: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "lora_A": ("in", None),
        "lora_B": (None, "out"),
        "frozen_A": ("in", None),
        "frozen_B": (None, "out"),
    }
    further: ClassVar[Mapping[str, tuple[str | None, ...]]] = {}
    """Tensors that a form adds, and the side of each of their dimensions."""

    def __init__(self, base: Any, in_features: int, out_features: int, rank: int, scaling: float, dropout: float):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.scaling = rank, scaling
        lengths = {"in": in_features, "out": out_features, None: rank}
        zero = paddle.nn.initializer.Constant(0.0)
        for name, sides in {"lora_A": ("in", None), "lora_B": (None, "out"), **self.further}.items():
            shape = [lengths[side] for side in sides]
            setattr(self, name, self.create_parameter(shape, dtype="float32", default_initializer=zero))
        self.dropout = paddle.nn.Dropout(dropout) if dropout else None
        self.frozen_A: Any = None
        self.frozen_B: Any = None

    def subtract(self, a: np.ndarray, b: np.ndarray) -> None:
        """From now on the base is W − s·a·b; float32 [in, r] and [r, out]."""
        self.frozen_A, self.frozen_B = paddle.to_tensor(a), paddle.to_tensor(b)

    def subtracted(self) -> tuple[np.ndarray, np.ndarray]:
        """The pair given to :meth:`subtract`."""
        return self.frozen_A.numpy(), self.frozen_B.numpy()

    def forward(self, x: Any) -> Any:
        if type(self.base) is sft.Linear and not self.drops():
            pair = self.lora_A, self.lora_B, self.scaling
            y = self.kernels.low_rank_linear(x, self.base.weight, self.base.bias, *pair)
        else:
            y = self.base(x) + self.update(x if self.dropout is None else self.dropout(x))
        return y if self.frozen_A is None else y - self._product(x, self.frozen_A, self.frozen_B)

    def drops(self) -> bool:
        """Whether :attr:`dropout` has a part in this pass."""
        # With dropout gradients come in one order, whether it draws or not: other processes may wait for each of them.
        return self.dropout is not None and (self.training or paddle.is_grad_enabled())

    def residual(self, x: Any) -> Any:
        """What the frozen base gives of ``x``, its bias included: less what a refinement subtracts from it."""
        y = self.base(x)
        return y if self.frozen_A is None else y - self._product(x, self.frozen_A, self.frozen_B)

    def update(self, x: Any) -> Any:
        """s·x·A·B."""
        return self._product(x, self.lora_A, self.lora_B)

    def pair(self) -> tuple[Any, Any]:
        """A [in, r'] and B [r', out], whose product times s is all that is added to W, and what is subtracted."""
        if self.frozen_A is None:
            return self.lora_A, self.lora_B
        a, b = [self.lora_A, self.frozen_A], [self.lora_B, -self.frozen_B]
        return paddle.concat(a, axis=1), paddle.concat(b, axis=0)

    def _product(self, x: Any, a: Any, b: Any) -> Any:
        # Scaled where it is smallest: [..., r].
        return paddle.matmul(paddle.matmul(x, a) * self.scaling, b)


def layer_class(form: LoraForm | None) -> type:
    """The class of a run's layers: LoRA's, or what a form makes of it."""
    if form is None:
        return LoraLinear
    further = {name: sides for name, (_, sides) in form.tensors.items()}
    members = {"further": further, "sides": {**LoraLinear.sides, **further}}
    return form.layer(type("FormedLinear", (LoraLinear,), members))

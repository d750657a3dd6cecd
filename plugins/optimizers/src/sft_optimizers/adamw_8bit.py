"""AdamW with block-wise 8-bit moments (arXiv 2110.02861)."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import paddle

import sft
from sft_optimizers.codes import BLOCK, Codes

if TYPE_CHECKING:
    from sft import ParameterGroup

LOT = 1 << 22
"""Values of a parameter that are float32 at a time."""


class AdamW8bit(sft.AdamW):
    """Each step of AdamW is taken in float32, and what it leaves of the moments is coded again.

    Kept of the parameters that are ``coded`` (names): ``code1`` and ``code2``, uint8, a code for each value of the
    moments; ``scale1`` and ``scale2``, float32, one for 256 values; the powers of β. Of the others, what AdamW keeps.
    Blocks begin with the parameter, or with the piece of it that this process steps.
    """

    grains: ClassVar[dict[str, int]] = {**sft.AdamW.grains, "scale1": BLOCK, "scale2": BLOCK}

    def __init__(self, groups: Sequence[ParameterGroup], training: Any, coded: Set[str]) -> None:
        super().__init__(groups, training)
        self._coded = coded
        self._tables: tuple[Codes, Codes] | None = None

    def new_state(self, name: str, value: Any) -> dict[str, Any]:
        if name not in self._coded:
            return super().new_state(name, value)
        codes = {f"code{number}": paddle.zeros(value.shape, "uint8") for number in (1, 2)}
        blocks = -(-int(value.size) // BLOCK)
        return {**codes, **{f"scale{number}": paddle.zeros([blocks]) for number in (1, 2)}, **self.powers()}

    def update(self, gradients: dict[str, Any], rate: float, decay: float) -> None:
        plain = {name: gradient for name, gradient in gradients.items() if name not in self._coded}
        if plain:
            super().update(plain, rate, decay)
        for name, gradient in gradients.items():
            if name in self._coded:
                self._step_coded(name, gradient, rate, decay)

    def _step_coded(self, name: str, gradient: Any, rate: float, decay: float) -> None:
        """Of one parameter, so many values at a time that what is float32 of them does not count."""
        first, second = self._tables = self._tables or (Codes(signed=True), Codes(signed=False))
        kept, (value, gradient) = self.kept[name], map(_flat, (self.values[name], gradient))
        for start in range(0, value.shape[0], LOT):
            stop = min(value.shape[0], start + LOT)
            blocks = slice(start // BLOCK, -(-stop // BLOCK))
            powers = ("beta1_pow_acc", "beta2_pow_acc")
            one: dict[str, Any] = {kind: _on_host(kept[kind].numpy()) for kind in powers}
            for number, table in ((1, first), (2, second)):
                codes = _flat(kept[f"code{number}"])._slice(start, stop)
                one[f"moment{number}"] = table.decode(codes, kept[f"scale{number}"][blocks])
            self.adam([value._slice(start, stop)], [gradient._slice(start, stop)], [one], rate, decay)
            for number, table in ((1, first), (2, second)):
                codes, scale = table.encode(one[f"moment{number}"])
                paddle.assign(codes, _flat(kept[f"code{number}"])._slice(start, stop))
                paddle.assign(scale, kept[f"scale{number}"]._slice(blocks.start, blocks.stop))
            if stop == value.shape[0]:
                for kind in powers:
                    kept[kind].set_value(one[kind].numpy())


def _on_host(values: np.ndarray) -> Any:
    return paddle.to_tensor(values, place=paddle.CPUPlace())


def _flat(tensor: Any) -> Any:
    """Another tensor over the same memory, of one dimension."""
    return paddle._C_ops.reshape(tensor, [-1])

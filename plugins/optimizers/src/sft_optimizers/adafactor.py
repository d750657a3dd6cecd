"""Adafactor (arXiv 1804.04235), with a learning rate from outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import paddle

import sft

if TYPE_CHECKING:
    from sft import ParameterGroup
    from sft_optimizers.options import AdafactorOptions


class Adafactor(sft.Optimizer):
    """Of a matrix (or a stack of them) it keeps the averages of squared gradients along ``row`` and ``column``; of a
    vector ``square``, one for each value. With ``adafactor_beta1`` also ``average``, of updates. ``steps`` int64 [1].

    Rows, columns and the size of an update are those of the whole parameter, so that none can be divided.
    """

    grains: ClassVar[dict[str, int]] = {"steps": 0, "row": 0, "column": 0}

    def __init__(self, groups: Sequence[ParameterGroup], options: AdafactorOptions) -> None:
        super().__init__(groups)
        self._options = options

    def new_state(self, name: str, value: Any) -> dict[str, Any]:
        # On the host, where it is read.
        kept = {"steps": paddle.to_tensor(np.zeros(1, np.int64), place=paddle.CPUPlace())}
        if value.ndim > 1:
            shape = list(value.shape)
            kept |= {"row": paddle.zeros(shape[:-1]), "column": paddle.zeros([*shape[:-2], shape[-1]])}
        else:
            kept["square"] = paddle.zeros_like(value)
        if self._options.adafactor_beta1 is not None:
            kept["average"] = paddle.zeros_like(value)
        return kept

    def update(self, gradients: dict[str, Any], rate: float, decay: float) -> None:
        options = self._options
        for name, gradient in gradients.items():
            value, kept = self.values[name], self.kept[name]
            steps = int(kept["steps"].numpy()[0]) + 1
            kept["steps"].set_value(np.array([steps]))
            beta2 = 1 - steps**options.adafactor_decay_rate
            own: Any = rate
            if options.adafactor_scale_parameter:
                own = rate * _size(value).clip(min=options.adafactor_epsilon2)
            step = gradient * self._inverse_roots(kept, gradient.square() + options.adafactor_epsilon1, beta2)
            step = step * (own / (_size(step) / options.adafactor_clip_threshold).clip(min=1.0))
            if options.adafactor_beta1 is not None:
                step = kept["average"].scale_(options.adafactor_beta1).add_(step * (1 - options.adafactor_beta1))
            if decay:
                value.subtract_(value * (decay * own))
            value.subtract_(step)

    def _inverse_roots(self, kept: dict[str, Any], squares: Any, beta2: float) -> Any:
        """One over the root of the averaged squares, after these have taken ``squares`` in."""
        if "square" in kept:
            return kept["square"].scale_(beta2).add_(squares * (1 - beta2)).rsqrt()
        rows, columns = squares.shape[-2:]
        row = kept["row"].scale_(beta2).add_(sft.row_sums(squares).squeeze(-1) * ((1 - beta2) / columns))
        down = squares.transpose([*range(squares.ndim - 2), squares.ndim - 1, squares.ndim - 2]).contiguous()
        column = kept["column"].scale_(beta2).add_(sft.row_sums(down).squeeze(-1) * ((1 - beta2) / rows))
        mean = sft.row_sums(row) / rows
        return (row / mean).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)


def _size(tensor: Any) -> Any:
    """The root mean square of all values, of no dimension."""
    return (sft.row_sums(tensor.square().reshape([1, -1])) / math.prod(tensor.shape)).sqrt().reshape([])

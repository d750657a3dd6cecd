"""The formats, written down once more, tried by `sft certify`: the group ``sft.certify`` in pyproject.toml."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np

_PLACE = 0.9677083
"""Of the outermost quantile of NF4, as its authors' code has it."""


def normal_float() -> np.ndarray:
    """NF4's 16 values (arXiv 2305.14314, section 3): quantiles of N(0, 1), 8 above zero, 7 below, by the largest."""
    quantile = NormalDist().inv_cdf
    above = [quantile(one) for one in np.linspace(_PLACE, 0.5, 9)[:-1]]
    below = [-quantile(one) for one in np.linspace(_PLACE, 0.5, 8)[:-1]]
    values = np.array(sorted([*above, 0.0, *below]))
    return values / values.max()


FLOAT = np.array([0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])
"""FP4's values above zero: 1 bit of mantissa, 2 of exponent, as bitsandbytes has them."""


def _held(lab: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """A weight [out, in], and what stands for it."""
    quantizer = lab.run(started=lambda run: run.hook.sft_quantizer(run=run), **options).started
    weight = np.random.default_rng(0).standard_normal((256, 192), dtype=np.float32)  # [in, out]
    weight *= np.linspace(0.1, 1.0, 192, dtype=np.float32)
    layer = quantizer.quantize("model.layers.0.mlp.up_proj", weight, None)
    return weight.T.astype(np.float64), layer.dequantize().numpy().T


def _check_blocks(lab: Any, codes: np.ndarray) -> None:
    weight, held = _held(lab)
    blocks = weight.reshape(-1, 64)
    largest = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs((blocks / largest)[..., None] - codes).argmin(-1)
    off = np.abs(codes[nearest] * largest - held.reshape(-1, 64)).max(1) / largest[:, 0]
    wrong = int((off > 1e-5).sum())
    assert not wrong, f"{wrong} of {len(off)} blocks do not hold the nearest of the values, times their absmax"


def check_holds_quantiles_of_a_normal(lab: Any) -> None:
    """Each block of 64 values of the weight [out, in] holds the nearest of NF4's 16 values, times its absmax."""
    _check_blocks(lab, normal_float())


def check_holds_small_floats(lab: Any) -> None:
    """Each block of 64 values of the weight [out, in] holds the nearest of FP4's values, times its absmax."""
    _check_blocks(lab, np.concatenate([-FLOAT[::-1], FLOAT]))


def _check_channels(lab: Any, largest: int) -> None:
    weight, held = _held(lab)
    scale = np.abs(weight).max(1, keepdims=True) / largest
    off = float(np.abs(np.rint(weight / scale) * scale - held).max())
    assert off < 1e-6, f"{off:.2e} from round(W/s)·s with s = absmax/{largest} of each output"


def check_holds_whole_numbers_of_8_bits(lab: Any) -> None:
    """An output holds round(W/s)·s with s = absmax/127 of its own weights."""
    _check_channels(lab, 127)


def check_holds_whole_numbers_of_4_bits(lab: Any) -> None:
    """An output holds round(W/s)·s with s = absmax/7 of its own weights."""
    _check_channels(lab, 7)


NF4, FP4 = (check_holds_quantiles_of_a_normal,), (check_holds_small_floats,)
INT8, INT4 = (check_holds_whole_numbers_of_8_bits,), (check_holds_whole_numbers_of_4_bits,)

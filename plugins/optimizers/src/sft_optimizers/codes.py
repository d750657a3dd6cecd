"""Values in 8 bits: blocks of 256, each with its largest absolute value, and a table of 256 values between -1 and 1 (or
0 and 1) that is denser towards 0, as arXiv 1511.04561 has it and bitsandbytes uses it for optimizer states."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

BLOCK = 256
"""Values that share a scale."""


def dynamic_map(signed: bool) -> np.ndarray:
    """The table, float32 [256], ascending: a decimal exponent from 10⁻⁶ to 1, with less of a fraction the smaller."""
    found = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        edges = np.linspace(0.1, 1, count + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        found += [*means, *(-means if signed else ())]
    return np.sort(np.array(found, np.float32))


class Codes:
    """Between float32 values and codes, where paddle computes now. Code 0 is the value 0, so that what is filled up
    with zeros holds none; the others are places of the table counted from there."""

    def __init__(self, signed: bool) -> None:
        table = dynamic_map(signed)
        self._zero = int(np.searchsorted(table, 0.0))
        self._values = paddle.to_tensor(np.roll(table, -self._zero))
        self._between = paddle.to_tensor((table[1:] + table[:-1]) / 2)

    def encode(self, values: Any) -> tuple[Any, Any]:
        """float32 [n] → codes uint8 [n], and the scale of each block, float32 [⌈n / 256⌉]."""
        blocks = _blocks(values)
        scale = blocks.abs().max(axis=1, keepdim=True)
        shares = (blocks / paddle.where(scale > 0, scale, paddle.ones_like(scale))).reshape([-1])
        places = paddle.bucketize(shares, self._between, out_int32=True)
        return _first((places - self._zero).astype("uint8"), values.shape[0]), scale.reshape([-1])  # modulo 256

    def decode(self, codes: Any, scale: Any) -> Any:
        """What :meth:`encode` gave → float32 [n]."""
        values = _blocks(paddle.gather(self._values, codes.astype("int32")))
        return _first((values * scale.unsqueeze(1)).reshape([-1]), codes.shape[0])


def _first(values: Any, size: int) -> Any:
    """[n] → [size]."""
    return values if values.shape[0] == size else values[:size]


def _blocks(values: Any) -> Any:
    """float32 [n] → [⌈n / 256⌉, 256], filled up with zeros."""
    missing = -values.shape[0] % BLOCK
    if missing:
        values = paddle.concat([values, paddle.zeros([missing])])
    return values.reshape([-1, BLOCK])

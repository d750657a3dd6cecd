"""The dtypes of a run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

SMALLEST, LARGEST = 2.0**-126, 2.0**128 * (1 - 2.0**-24)
"""What a float32 can be in size, beside 0: a smaller number is 0 where paddle computes, a larger one infinite."""


@dataclass(frozen=True)
class Precision:
    """``dtype`` "float32", "bfloat16" or "float16" is that of matrix products, ``weights`` that of the model's
    weights, and ``frozen`` that of the matrices of a base that does not train."""

    dtype: str = "float32"
    weights: str = "float32"
    frozen: str = "float32"

    def autocast(self) -> Any:
        """The context in which the model goes forward. On a CPU it changes nothing: there kernels of the model's own
        compute in 16 bits."""
        if self.dtype == "float32":
            return contextlib.nullcontext()
        import paddle

        if paddle.device.get_device() == "cpu":
            return contextlib.nullcontext()
        return paddle.amp.auto_cast(dtype=self.dtype, level="O1" if self.weights == "float32" else "O2")


FLOAT32 = Precision()


def product_dtype(x: Any) -> Any:
    """The paddle dtype in which a matrix product of ``x`` is computed here."""
    import paddle

    return getattr(paddle, paddle.get_autocast_dtype()) if paddle.is_autocast_enabled() else x.dtype


def no_casts() -> contextlib.AbstractContextManager[None]:
    """A context without automatic casts: operations in it compute in the types that they are given."""
    import paddle

    return paddle.amp.auto_cast(enable=False) if paddle.is_autocast_enabled() else contextlib.nullcontext()

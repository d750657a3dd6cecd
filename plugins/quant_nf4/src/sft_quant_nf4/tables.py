"""What codes stand for, as tensors that all layers share."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

_tables: dict[tuple[str, str], Any] = {}


def table(name: str, values: np.ndarray) -> Any:
    """``values`` as one tensor on each device, by ``name``: a tensor takes 4 kB of memory more than its values."""
    key = (name, paddle.device.get_device())
    if key not in _tables:
        _tables[key] = paddle.to_tensor(values)
    return _tables[key]

"""Computing a block again in backward, instead of keeping what is in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle


def recomputed(block: Callable[..., Any], hidden: Any, *more: Any) -> Any:
    """``block(hidden, *more)``, of which nothing but ``hidden`` is kept for backward, which calls it again.

    Dropout draws the same again. Where no gradients are recorded it is only called.
    """
    from paddle.distributed.fleet.utils import recompute

    if not paddle.is_grad_enabled():
        return block(hidden, *more)
    if hidden.stop_gradient:
        # Before the first block of a frozen model: paddle would take it that nothing in the block learns either.
        hidden = hidden.detach()
        hidden.stop_gradient = False
    return recompute(block, hidden, *more)

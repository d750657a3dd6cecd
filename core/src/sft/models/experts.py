"""Tokens through the experts that are chosen for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paddle

from sft.distributed.meeting import Exchange

_HERE = Exchange()


def through_experts(
    tokens: Any,
    weights: Any,
    chosen: Any,
    experts: Sequence[Callable[[Any], Any]],
    count: int | None = None,
    exchange: Exchange = _HERE,
) -> Any:
    """Tokens [N, hidden], each through the experts of the numbers ``chosen`` [N, k] for it, and what these make of it
    times ``weights`` [N, k], added up: [N, hidden].

    The choices are sorted by expert, so that each expert takes its own as one matrix, and the device is asked once,
    not for each expert, how many those are. An expert that nothing is for is not called.

    ``experts`` are those in this process, of ``count`` that there are (None: these), and ``exchange`` knows where the
    others are.
    """
    size, each = tokens.shape[-1], chosen.shape[-1]
    choices, expert_of_choice = tokens.unsqueeze(1).expand([-1, each, -1]), chosen.flatten()
    order = paddle.argsort(expert_of_choice, stable=True)
    # Where each expert's choices begin. Counting them would make a GPU wait for the number of counts besides.
    sorted_choices, numbers = paddle.gather(expert_of_choice, order), paddle.arange((count or len(experts)) + 1)
    begins = paddle.searchsorted(sorted_choices, numbers.astype(sorted_choices.dtype))
    results = exchange.through(paddle.gather(choices.reshape([-1, size]), order), begins, experts)
    results = paddle.gather(results, paddle.argsort(order)).reshape([-1, each, size])
    return paddle.matmul(weights.unsqueeze(1).astype(results.dtype), results).squeeze(1)

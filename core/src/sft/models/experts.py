"""Tokens through the experts that are chosen for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import paddle


def through_experts(tokens: Any, weights: Any, chosen: Any, experts: Sequence[Callable[[Any], Any]]) -> Any:
    """Tokens [N, hidden], each through the experts of the numbers ``chosen`` [N, k] for it, and what these make of it
    times ``weights`` [N, k], added up: [N, hidden].

    The choices are sorted by expert, so that each expert takes its own as one matrix, and the device is asked once,
    not for each expert, how many those are. An expert that nothing is for is not called.
    """
    size, each = tokens.shape[-1], chosen.shape[-1]
    choices, expert_of_choice = tokens.unsqueeze(1).expand([-1, each, -1]), chosen.flatten()
    order = paddle.argsort(expert_of_choice, stable=True)
    # Where each expert's choices begin. Counting them would make a GPU wait for the number of counts besides.
    sorted_choices, numbers = paddle.gather(expert_of_choice, order), paddle.arange(len(experts) + 1)
    begins = paddle.searchsorted(sorted_choices, numbers.astype(sorted_choices.dtype)).tolist()
    counts = [end - begin for begin, end in pairwise(begins)]
    busy = [number for number, count in enumerate(counts) if count]
    parts = paddle.split(paddle.gather(choices.reshape([-1, size]), order), [counts[number] for number in busy])
    results = paddle.concat([experts[number](part) for number, part in zip(busy, parts, strict=True)])
    results = paddle.gather(results, paddle.argsort(order)).reshape([-1, each, size])
    return paddle.matmul(weights.unsqueeze(1).astype(results.dtype), results).squeeze(1)

"""Micro-batches of ranks that have fewer than others: what meets in collectives must come as often everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from sft import Batch
from sft_parallel_4d.experts import mixtures
from sft_parallel_4d.passes import IDLE


def nothing() -> Batch:
    """A batch whose loss counts for nothing, but which reaches every parameter."""
    rows, tokens = IDLE
    ids = np.zeros(IDLE, np.int64)
    ends = np.full((rows, 1, tokens, 1), tokens, np.int32)
    return Batch(ids, ids.copy(), np.arange(tokens)[None], ends, ((tokens,),) * rows)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Within it nothing changes what is trained on, as noise does: an idle micro-batch is none of that. Only experts
    train on, as what other ranks do train on comes to them. Also for backward, where blocks may be computed again."""
    model.eval()
    for mlp in mixtures(model):
        mlp.experts.train()
    try:
        yield
    finally:
        model.train()

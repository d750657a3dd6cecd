"""Ranks of real runs whose buckets are so small that each kind of gradient fills several. Run by ``run_ranks``."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import sft


def train(settings: dict[str, Any], size: int, spoiled: str | None = None, late: bool = False) -> dict[str, Any]:
    """One rank of a run with buckets of ``size`` bytes: how many buckets it has of each kind. Of kind ``spoiled``, the
    second one takes each gradient twice. With ``late`` copies to the host are made when they are waited for."""
    from sft_parallel_4d import options

    options.BUCKET = size
    if late:
        copy_late()
    found: Counter[str] = Counter()

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            for bucket, kind in kinds_of(run.strategy):
                found[kind] += 1
                if kind == spoiled and found[kind] == 2:
                    twice(bucket)

    sft.run(settings, plugins=[Look], say=lambda text: None)
    return {"process": os.getpid(), "buckets": found}


def kinds_of(strategy: Any) -> list[tuple[Any, str]]:
    """Each bucket, and of which gradients it is: experts', those that are sums over tensor ranks, and others."""
    buckets, found = strategy._buckets, []
    for way in buckets._ways:
        one = way.bucket.params[0]
        is_partial = strategy._at.tensor in buckets._kinds.over(one)
        found.append(
            (way.bucket, "experts" if id(one) in buckets._kinds.with_block else "partial" if is_partial else "dense")
        )
    return found


def copy_late() -> None:
    import paddle

    from sft_parallel_4d.offload import Host, Resting

    def take(self: Host, tensor: Any) -> Resting:
        there = paddle.empty_like(tensor)
        return Resting(there, tensor, wait=lambda: paddle.assign(tensor, there))

    Host.take = take  # type: ignore[method-assign]


def twice(bucket: Any) -> None:
    add = bucket.add

    def added(parameter: Any, gradient: Any) -> None:
        add(parameter, gradient)
        add(parameter, gradient)

    bucket.add = added

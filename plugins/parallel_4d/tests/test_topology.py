"""Where processes compute once they have met: fleet, which is a stub here, moves them to GPUs wherever it can."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from sft_parallel_4d import topology
from sft_parallel_4d.plans import Plan


class MetError(Exception):
    """The end of what is looked at."""


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("gpu:1", None)])
def test_a_run_stays_on_the_device_that_it_is_on(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, device: str, backend: str | None
) -> None:
    """As with a paddle that is built with CUDA: fleet chooses by what it is built with, unless gloo is asked for, and
    then sets the device."""
    current = [device]
    monkeypatch.setattr(paddle.device, "get_device", lambda: current[0])
    monkeypatch.setattr(paddle.device, "set_device", lambda name: current.__setitem__(0, name))
    monkeypatch.setenv("PADDLE_DISTRI_BACKEND", "")  # so that it is put back
    monkeypatch.delenv("PADDLE_DISTRI_BACKEND")
    asked = []

    def init(**_: Any) -> None:
        asked.append(os.environ.get("PADDLE_DISTRI_BACKEND"))
        current[0] = "gpu:1"

    def met() -> None:
        raise MetError

    stub = SimpleNamespace(DistributedStrategy=SimpleNamespace, init=init, get_hybrid_communicate_group=met)
    monkeypatch.setattr(topology, "fleet", stub)
    with pytest.raises(MetError):
        topology.connect(Plan(data=2))
    assert asked == [backend]
    assert current == [device]


@pytest.mark.parametrize("ranks", [[3], [1, 3]])
def test_who_is_alone_along_an_axis_is_its_first(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, ranks: list[int]
) -> None:
    """Of a group of one paddle says that the rank is -1, with which a slice would lie outside its buffer."""
    monkeypatch.setattr(paddle.distributed, "get_rank", lambda: 3)
    group = SimpleNamespace(nranks=len(ranks), ranks=ranks, rank=-1 if len(ranks) == 1 else 1)
    axis = topology._along(group)
    assert (axis.rank, axis.size) == (len(ranks) - 1, len(ranks))
    assert axis.group is (group if len(ranks) > 1 else None)

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

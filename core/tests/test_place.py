"""What rests on the host while the run computes on a GPU is stepped, measured and restored there."""

from __future__ import annotations

from typing import Any

import pytest

from sft.seams import ParameterGroup
from sft.settings.arguments import TrainingArguments


class Devices:
    """Stands for paddle on a GPU whose parameters rest on the host: where paddle computes at each moment."""

    def __init__(self, paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.seen = "gpu:0", []  # type: ignore[var-annotated]
        monkeypatch.setattr(paddle.device, "get_device", lambda: self.current)
        monkeypatch.setattr(paddle.device, "set_device", lambda device: setattr(self, "current", device))
        for owner, name in (
            (paddle._C_ops, "fused_adam_"),
            (paddle, "zeros_like"),
            (paddle.Tensor, "set_value"),
            (paddle, "concat"),
            (paddle, "assign"),
        ):
            self.watch(monkeypatch, owner, name)

    def watch(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        own = getattr(owner, name)

        def noted(*arguments: Any, **more: Any) -> Any:
            self.seen.append((name, self.current))
            return own(*arguments, **more)

        monkeypatch.setattr(owner, name, noted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_rests_on_the_host_is_stepped_there(paddle: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments are made where paddle computes, and paddle takes an operation on tensors of both places to the GPU:
    in a run on a GPU everything that touches them must be told to stay."""
    from sft.training.adamw import AdamW
    from sft.training.strategy import squared_gradients

    def optimizer() -> Any:
        parameter = paddle.base.framework.EagerParamBase.from_tensor(paddle.ones([3, 2]).astype(dtype))
        parameter.stop_gradient = False
        parameter.grad = paddle.ones([3, 2])
        other = paddle.base.framework.EagerParamBase.from_tensor(parameter)
        other.stop_gradient = False
        other.grad = paddle.ones([3, 2])
        return AdamW([ParameterGroup("all", {"p": parameter, "q": other})], TrainingArguments())

    first, second = optimizer(), optimizer()
    devices = Devices(paddle, monkeypatch)
    assert squared_gradients(first.parameters.values()) == 12
    first.step(0.1)
    second.load(first.state())
    assert {device for _, device in devices.seen} == {"cpu"}
    rounds = {"assign"} if dtype == "bfloat16" else set()
    assert {"fused_adam_", "zeros_like", "set_value", "concat"} | rounds == {name for name, _ in devices.seen}
    assert devices.current == "gpu:0"

"""On a GPU: the steps of optimizers that are not AdamW, against those on the host, and their state as it comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sft
from sft.settings.arguments import TrainingArguments
from sft.testing import needs

pytestmark = [pytest.mark.gpu, needs("lion", "adafactor", "adamw-8bit", "muon")]

SHAPES = {"matrix": (96, 80), "other": (80, 96), "vector": (80,)}


def maker(name: str) -> Callable[[list[sft.ParameterGroup]], Any]:
    from sft_optimizers.adafactor import Adafactor
    from sft_optimizers.adamw_8bit import AdamW8bit
    from sft_optimizers.lion import Lion
    from sft_optimizers.muon import Muon
    from sft_optimizers.options import AdafactorOptions

    training, matrices = TrainingArguments(), {"matrix", "other"}
    made: dict[str, Callable[[list[sft.ParameterGroup]], Any]] = {
        "lion": lambda groups: Lion(groups, 0.9, 0.99),
        "adafactor": lambda groups: Adafactor(groups, AdafactorOptions(adafactor_beta1=0.9)),
        "adamw-8bit": lambda groups: AdamW8bit(groups, training, matrices),
        "muon": lambda groups: Muon(groups, training, matrices, 0.95, 5),
    }
    return made[name]


@pytest.mark.parametrize("name", ["lion", "adafactor", "adamw-8bit", "muon"])
def test_steps_are_those_of_the_host_and_state_comes_back(paddle: Any, row: Callable[..., None], name: str) -> None:
    """Five steps; after three of them another optimizer goes on from the state. A sign, or a code, may differ where a
    value is next to a border of theirs."""
    device, random = paddle.device.get_device(), np.random.default_rng(8)
    start = {key: random.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}
    gradients = [{key: random.standard_normal(s).astype(np.float32) for key, s in SHAPES.items()} for _ in range(5)]

    def taken() -> dict[str, np.ndarray]:
        parameters = {key: paddle.create_parameter(list(shape), "float32") for key, shape in SHAPES.items()}
        for key, parameter in parameters.items():
            parameter.set_value(start[key])
        groups = [sft.ParameterGroup("all", parameters, 1.0, 0.1)]
        optimizer = maker(name)(groups)
        for step, values in enumerate(gradients):
            for key, parameter in parameters.items():
                parameter.grad_ = paddle.to_tensor(values[key])
            optimizer.step(0.01, 0.5)
            if step == 2:
                state = optimizer.state()
                optimizer = maker(name)(groups)
                optimizer.load(state)
                again = optimizer.state()
                assert {key: array.tobytes() for key, array in again.items()} == {
                    key: array.tobytes() for key, array in state.items()
                }
        return {key: parameter.numpy() for key, parameter in parameters.items()}

    found = taken()
    paddle.device.set_device("cpu")
    try:
        wanted = taken()
    finally:
        paddle.device.set_device(device)
    away = np.concatenate([np.abs(found[key] - wanted[key]).ravel() for key in SHAPES])
    row(f"{name}: share of values more than 1e-5 from the host's", float((away > 1e-5).mean()), 0.01)
    assert max(np.abs(found[key] - start[key]).max() for key in SHAPES) > 0.01

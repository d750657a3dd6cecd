"""A model whose adapter is switched off for a moment: its base, whatever has been learned, and back again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from toy_plugins import toy

import sft

Adapt = Callable[..., sft.Run]
IDS = np.arange(12)[None] + 5


def adapting(times: int = 1, also_trains: str = "") -> type[sft.Plugin]:
    """Adds a trained vector after each q_proj, ``times`` over each other, with dropout before it."""

    def adapt_model(self: sft.Plugin, run: sft.Run, model: Any) -> None:
        import paddle

        class Shift(paddle.nn.Layer):
            sides = {"shift": ("out",)}

            def __init__(self, base: Any, size: int) -> None:
                super().__init__()
                self.base, self.dropout = base, paddle.nn.Dropout(0.5)
                self.shift = self.create_parameter([size], default_initializer=paddle.nn.initializer.Constant(0.5))

            def forward(self, x: Any) -> Any:
                return self.base(self.dropout(x)) + self.shift

        for target in sft.target_layers(model, ["q_proj"]):
            layer = Shift(target.layer, target.out_features)
            target.replace(layer)
            if times == 2:
                again = sft.Target(target.name, target.parent, target.attribute, layer, 1, target.out_features)
                again.replace(Shift(layer, target.out_features))
        for name, parameter in model.named_parameters():
            if also_trains and also_trains in name:
                parameter.stop_gradient = False

    def export(self: sft.Plugin, run: sft.Run, model: Any) -> sft.AdapterFiles:
        tensors = {name: p.numpy() for name, p in model.named_parameters() if not p.stop_gradient}
        return sft.AdapterFiles({"peft_type": "SHIFT"}, tensors)

    return toy("shift", sft_adapt_model=adapt_model, sft_export_adapter=export)


def logits(model: Any) -> np.ndarray:
    import paddle

    from sft.parallel import hidden_states

    example = sft.Example(IDS[0], IDS[0])
    with paddle.no_grad():
        return model.lm_head(hidden_states(model, sft.assemble([[example]], pad_id=0))).numpy()


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_within_it_the_model_is_its_base_to_the_bit(adapt: Adapt, times: int) -> None:
    base = adapt().model
    base.eval()
    model = adapt(adapting(times)).model
    model.eval()
    adapted, names = logits(model), [name for name, _ in model.named_parameters()]
    model.train()
    assert np.abs(adapted - logits(base)).max() > 1e-3
    with sft.without_adapter(model):
        assert not model.training  # or dropout would draw
        assert logits(model).tobytes() == logits(base).tobytes()
    assert model.training
    assert [name for name, _ in model.named_parameters()] == names
    model.eval()
    assert logits(model).tobytes() == adapted.tobytes()


@pytest.mark.slow
def test_it_is_undone_when_something_fails(adapt: Adapt) -> None:
    model = adapt(adapting()).model
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ZeroDivisionError), sft.without_adapter(model):
        raise ZeroDivisionError
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("also", [None, "norm"])
def test_a_base_that_trains_is_refused(adapt: Adapt, also: str | None) -> None:
    model = (adapt() if also is None else adapt(adapting(also_trains=also))).model
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(sft.UsageError, match="trains and is no part of an adapter"), sft.without_adapter(model):
        pass
    assert [name for name, _ in model.named_parameters()] == names

"""The model before training, for a moment, whatever has been learned; and back again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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
    with sft.Reference(model)():
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
    with pytest.raises(ZeroDivisionError), sft.Reference(model)():
        raise ZeroDivisionError
    assert [name for name, _ in model.named_parameters()] == names


def test_an_adapter_that_cannot_be_switched_off_is_refused(adapt: Adapt) -> None:
    model = adapt(adapting(also_trains="norm")).model
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(sft.UsageError, match="trains and is no part of an adapter"):
        sft.Reference(model)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("model", ["llama-tied-gqa", "qwen2-untied"])
def test_where_all_of_a_model_trains_it_is_a_copy(adapt: Adapt, models: Path, model: str) -> None:
    """Bit by bit what it was; the graph of a pass that came before, and what trains, do not change by it."""
    import paddle

    trained = adapt(model_name_or_path=str(models / model)).model
    reference, began = sft.Reference(trained), logits(trained)
    assert reference.copied == 4 * sum(int(p.size) for p in trained.parameters())
    parameters = dict(trained.named_parameters())
    with paddle.no_grad():
        for parameter in parameters.values():
            parameter.set_value(parameter * 1.25)
    learned, weight = logits(trained), trained.model.layers[0].mlp.up_proj.weight
    assert np.abs(learned - began).max() > 1e-3
    trained.train()
    x = paddle.to_tensor(np.ones((1, 32), np.float32))
    y = trained.model.layers[0].mlp(x)
    with reference():
        assert not trained.training
        assert logits(trained).tobytes() == began.tobytes()
        assert not any(not p.stop_gradient for p in trained.parameters())
    assert trained.training
    y.sum().backward()
    found = weight.grad.numpy()
    weight.clear_grad()
    trained.model.layers[0].mlp(x).sum().backward()
    np.testing.assert_array_equal(found, weight.grad.numpy())
    assert all(one is parameters[name] for name, one in trained.named_parameters())
    trained.eval()
    assert logits(trained).tobytes() == learned.tobytes()

"""The optimizer: AdamW as its paper has it, parameter groups, few calls, and state under structured names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from adamw import SHAPES, adamw, apply, gradients_of, parameters_of

import sft
from sft.seams import ParameterGroup
from sft.settings.arguments import TrainingArguments


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adam_beta1": 0.8, "adam_beta2": 0.95},
        {"adam_epsilon": 0.05},
        {"weight_decay": 0.1},
        {"weight_decay": 0.3, "adam_epsilon": 0.01, "adam_beta1": 0.5, "adam_beta2": 0.6},
    ],
    ids=["plain", "betas", "epsilon", "decay", "all"],
)
def test_steps_are_those_of_the_paper(paddle: Any, settings: dict[str, float]) -> None:
    """Steps of 0.01 to 0.05 at values of up to 3: an epsilon or a decay in the wrong place is off by 1e-4 and more."""
    from sft.training.adamw import AdamW
    from sft.training.groups import default_groups

    training = TrainingArguments(**settings)
    rates = [0.01, 0.05, 0.02, 0.0, 0.03]
    parameters, gradients = parameters_of(paddle), gradients_of(len(rates))
    start = {name: parameter.numpy() for name, parameter in parameters.items()}
    optimizer = AdamW(default_groups(parameters, training.weight_decay), training)
    apply(paddle, optimizer, gradients, range(len(rates)), rates)
    for name, parameter in parameters.items():
        decay = training.weight_decay if len(SHAPES[name]) > 1 else 0.0
        expected = adamw(start[name], gradients[name], rates, decay, training)
        np.testing.assert_allclose(parameter.numpy(), expected, atol=2e-6, rtol=0, err_msg=name)
        assert np.abs(parameter.numpy() - start[name]).max() > 0.01


def test_a_groups_learning_rate_multiplies_the_schedules(paddle: Any) -> None:
    """The decay too goes with the group's rate, as in every framework's parameter groups."""
    from sft.training.adamw import AdamW

    training = TrainingArguments(adam_epsilon=1e-3)
    rates = [0.01, 0.02, 0.01]
    parameters, gradients = parameters_of(paddle), gradients_of(len(rates))
    start = {name: parameter.numpy() for name, parameter in parameters.items()}
    scales = {"block.weight": 16.0, "block.bias": 1.0, "head.weight": 0.0}
    decays = {"block.weight": 0.1, "block.bias": 0.2, "head.weight": 0.3}
    groups = [ParameterGroup(name, {name: parameters[name]}, scales[name], decays[name]) for name in SHAPES]
    apply(paddle, AdamW(groups, training), gradients, range(len(rates)), rates)
    for name, parameter in parameters.items():
        scaled = [rate * scales[name] for rate in rates]
        expected = adamw(start[name], gradients[name], scaled, decays[name], training)
        np.testing.assert_allclose(parameter.numpy(), expected, atol=5e-6, rtol=0, err_msg=name)
    np.testing.assert_array_equal(parameters["head.weight"].numpy(), start["head.weight"])


def test_gradients_are_cleared_by_a_step(paddle: Any) -> None:
    from sft.training.adamw import AdamW
    from sft.training.groups import default_groups

    parameters = parameters_of(paddle)
    optimizer = AdamW(default_groups(parameters, 0.0), TrainingArguments())
    apply(paddle, optimizer, gradients_of(1), range(1), [0.1])
    assert all(p.grad is None or not p.grad.numpy().any() for p in parameters.values())


# --- groups -------------------------------------------------------------------------------------------------


def test_matrices_decay_and_vectors_do_not(paddle: Any) -> None:
    from sft.training.groups import default_groups

    groups = default_groups(parameters_of(paddle), 0.1)
    assert [(g.name, list(g.parameters), g.learning_rate, g.weight_decay) for g in groups] == [
        ("decay", ["block.weight", "head.weight"], 1.0, 0.1),
        ("no_decay", ["block.bias"], 1.0, 0.0),
    ]


def test_there_is_no_empty_group(paddle: Any) -> None:
    from sft.training.groups import default_groups

    parameters = parameters_of(paddle)
    assert [g.name for g in default_groups({"block.weight": parameters["block.weight"]}, 0.1)] == ["decay"]
    assert [g.name for g in default_groups({"block.bias": parameters["block.bias"]}, 0.1)] == ["no_decay"]


def test_a_parameter_in_two_groups_is_named(paddle: Any) -> None:
    from sft.training.groups import check_groups, default_groups

    parameters = parameters_of(paddle)
    groups = default_groups(parameters, 0.1)
    check_groups(groups, parameters)
    groups[1].parameters["head.weight"] = parameters["head.weight"]
    with pytest.raises(sft.UsageError, match=r"Parameter head\.weight is in 2 optimizer groups"):
        check_groups(groups, parameters)


def test_a_parameter_in_no_group_is_named(paddle: Any) -> None:
    from sft.training.groups import check_groups, default_groups

    parameters = parameters_of(paddle)
    groups = default_groups(parameters, 0.1)
    del groups[0].parameters["block.weight"]
    with pytest.raises(sft.UsageError, match=r"Parameter block\.weight is in 0 optimizer groups"):
        check_groups(groups, parameters)


# --- one call for many --------------------------------------------------------------------------------------


def test_all_are_stepped_by_a_call_for_each_group(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor by tensor, 448 of them cost the host of a GPU some ten milliseconds a step."""
    from sft.training.adamw import AdamW
    from sft.training.groups import default_groups

    calls: list[int] = []
    real = paddle._C_ops.fused_adam_
    monkeypatch.setattr(
        paddle._C_ops, "fused_adam_", lambda stepped, *more: (calls.append(len(stepped)), real(stepped, *more))
    )
    optimizer = AdamW(default_groups(parameters_of(paddle), 0.1), TrainingArguments())
    apply(paddle, optimizer, gradients_of(2), range(2), [0.1, 0.1])
    assert calls == [2, 1] * 2


def test_gradients_are_scaled_in_calls_of_so_many(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's kernel has room for 6,143 in a call, and adapters on a mixture of experts have more."""
    from sft import optimizer as module
    from sft.training.adamw import AdamW
    from sft.training.groups import default_groups

    calls: list[int] = []
    scale = paddle._C_ops.check_finite_and_unscale_
    monkeypatch.setattr(
        paddle._C_ops, "check_finite_and_unscale_", lambda many, by: (calls.append(len(many)), scale(many, by))
    )
    monkeypatch.setattr(module, "TENSORS", 2)
    optimizer = AdamW(default_groups(parameters_of(paddle), 0.1), TrainingArguments())
    gradients = gradients_of(1)
    for name, parameter in optimizer.parameters.items():
        parameter.grad = paddle.to_tensor(gradients[name][0])
    optimizer.step(0.1, 0.5)
    assert calls == [2, 1]
    for name, (gradient, *_) in gradients.items():
        np.testing.assert_allclose(optimizer.state()[f"{name}.moment1"], 0.05 * gradient, rtol=1e-6)


def test_gradients_that_are_views_of_a_buffer(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those are on a GPU that data ranks have summed together: its fused kernel reads four values at a time, and
    looks whether it can at all its tensors but the gradients."""
    from sft.training.adamw import AdamW
    from sft.training.groups import default_groups

    def at(tensor: Any) -> int:
        return int(tensor.data_ptr() % 16)

    places: list[int] = []
    step = paddle._C_ops.fused_adam_
    monkeypatch.setattr(
        paddle._C_ops, "fused_adam_", lambda one, two, *more: (places.extend(map(at, two)), step(one, two, *more))
    )
    whole, views = parameters_of(paddle), parameters_of(paddle)
    for parameters in (whole, views):
        optimizer = AdamW(default_groups(parameters, 0.1), TrainingArguments())
        for name, (gradient, *_) in gradients_of(1).items():
            value = paddle.to_tensor(gradient)
            flat = paddle.concat([paddle.zeros([1]), value.reshape([-1])])
            parameters[name].grad_ = (
                flat._slice(1, flat.shape[0]).reshape(value.shape) if parameters is views else value
            )
            assert (at(parameters[name].grad) > 0) == (parameters is views)
        optimizer.step(0.1, 0.5)
    assert places == [0] * 6
    for name in SHAPES:
        assert whole[name].numpy().tobytes() == views[name].numpy().tobytes()


def test_bit_by_bit_what_paddles_optimizer_does(paddle: Any) -> None:
    from sft.training.adamw import AdamW
    from sft.training.groups import default_groups

    ours, theirs, gradients = parameters_of(paddle), parameters_of(paddle), gradients_of(4)
    training = TrainingArguments(weight_decay=0.1, adam_epsilon=1e-6)
    optimizer = AdamW(default_groups(ours, training.weight_decay), training)
    matrices, vectors = [theirs["block.weight"], theirs["head.weight"]], [theirs["block.bias"]]
    reference = paddle.optimizer.AdamW(
        epsilon=training.adam_epsilon,
        parameters=[{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
    )
    for step in range(4):
        for name in SHAPES:
            ours[name].grad, theirs[name].grad = (paddle.to_tensor(gradients[name][step]) for _ in range(2))
        optimizer.step(0.01)
        reference.set_lr(0.01)
        reference.step()
        reference.clear_grad()
        for name in SHAPES:
            assert ours[name].numpy().tobytes() == theirs[name].numpy().tobytes(), (step, name)


def test_what_backward_has_not_reached_has_a_gradient_of_zeros(paddle: Any) -> None:
    """As experts that no token of a step chose; the state of such a run goes on too."""
    from sft.training.adamw import AdamW
    from sft.training.groups import default_groups

    training, gradients = TrainingArguments(), gradients_of(5)
    parameters = parameters_of(paddle)
    start = {name: parameter.numpy() for name, parameter in parameters.items()}
    seen = {"block.weight": [0, 1, 2, 3, 4], "block.bias": [0, 2, 3, 4], "head.weight": [1, 4]}
    optimizer = AdamW(default_groups(parameters, 0.0), training)
    for step in range(5):
        for name, steps in seen.items():
            parameters[name].grad = paddle.to_tensor(gradients[name][step]) if step in steps else None
        optimizer.step(0.01)
        if step == 2:
            state = optimizer.state()
            optimizer = AdamW(default_groups(parameters, 0.0), training)
            optimizer.load(state)
    for name, steps in seen.items():
        every = [gradients[name][step] * (step in steps) for step in range(5)]
        expected = adamw(start[name], every, [0.01] * 5, 0.0, training)
        np.testing.assert_allclose(parameters[name].numpy(), expected, rtol=2e-6, atol=2e-7)


# --- state --------------------------------------------------------------------------------------------------


def test_state_has_structured_names_and_no_others(paddle: Any) -> None:
    from sft.training.adamw import AdamW
    from sft.training.groups import default_groups

    optimizer = AdamW(default_groups(parameters_of(paddle), 0.1), TrainingArguments())
    apply(paddle, optimizer, gradients_of(1), range(1), [0.1])
    kinds = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")
    assert set(optimizer.state()) == {f"{name}.{kind}" for name in SHAPES for kind in kinds}


def test_a_fresh_optimizer_goes_on_bit_by_bit(paddle: Any) -> None:
    """In another process paddle names parameters otherwise; here the second set is named otherwise too."""
    from sft.training.adamw import AdamW
    from sft.training.groups import default_groups

    training = TrainingArguments(weight_decay=0.1)
    rates = [0.01, 0.02, 0.03, 0.02, 0.01]
    gradients = gradients_of(len(rates))
    first = parameters_of(paddle)
    one = AdamW(default_groups(first, training.weight_decay), training)
    apply(paddle, one, gradients, range(3), rates)
    state = {name: array.copy() for name, array in one.state().items()}

    second = parameters_of(paddle, seed=9)
    assert {p.name for p in first.values()}.isdisjoint({p.name for p in second.values()})
    for name, parameter in second.items():
        parameter.set_value(first[name].numpy())
    other = AdamW(default_groups(second, training.weight_decay), training)
    other.load(state)
    for name, array in other.state().items():
        assert array.tobytes() == state[name].tobytes(), name

    apply(paddle, one, gradients, range(3, 5), rates)
    apply(paddle, other, gradients, range(3, 5), rates)
    for name in SHAPES:
        assert first[name].numpy().tobytes() == second[name].numpy().tobytes(), name
    assert {n: a.tobytes() for n, a in one.state().items()} == {n: a.tobytes() for n, a in other.state().items()}


def test_state_matters(paddle: Any) -> None:
    """The control of the test above: without the state the next steps are others."""
    from sft.training.adamw import AdamW
    from sft.training.groups import default_groups

    training, rates, gradients = TrainingArguments(), [0.01, 0.02, 0.03], gradients_of(3)
    first = parameters_of(paddle)
    one = AdamW(default_groups(first, 0.0), training)
    apply(paddle, one, gradients, range(2), rates)
    second = parameters_of(paddle)
    for name, parameter in second.items():
        parameter.set_value(first[name].numpy())
    apply(paddle, one, gradients, range(2, 3), rates)
    apply(paddle, AdamW(default_groups(second, 0.0), training), gradients, range(2, 3), rates)
    assert all(np.abs(first[name].numpy() - second[name].numpy()).max() > 1e-3 for name in SHAPES)


def test_state_of_other_parameters_is_an_error(paddle: Any) -> None:
    from sft.training.adamw import AdamW
    from sft.training.groups import default_groups

    parameters = parameters_of(paddle)
    optimizer = AdamW(default_groups(parameters, 0.0), TrainingArguments())
    apply(paddle, optimizer, gradients_of(1), range(1), [0.1])
    state = optimizer.state()
    state["other.weight.moment1"] = state.pop("block.weight.moment1")
    fresh = AdamW(default_groups(parameters_of(paddle), 0.0), TrainingArguments())
    with pytest.raises(sft.SftError, match=r"first difference: block\.weight\.moment1"):
        fresh.load(state)

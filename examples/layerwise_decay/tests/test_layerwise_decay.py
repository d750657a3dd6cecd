"""What the README promises: rates by depth, and steps of that size."""

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.testing import needs, suite

TestLayerwiseDecay = suite("layerwise-decay", learning_rate=1e-2)


@pytest.fixture(scope="session")
def run_settings():
    return {"plugin": ["layerwise-decay"], "learning_rate": 1e-2, "layerwise_decay_factor": 0.5, "max_steps": 1}


def level(name):
    return int(name.split(".")[2]) + 1 if ".layers." in name else 0 if "embed" in name else 2


@pytest.fixture
def rates_of(train):
    """``rates_of(**settings)``: the rate of each parameter that trains, by its name."""

    def run(**settings):
        rates = {}

        class Look(sft.Plugin):
            name = "look"
            api_version = 1
            order = 99

            @sft.hookimpl
            def sft_parameter_groups(self, run, groups):
                rates.update({name: group.learning_rate for group in groups for name in group.parameters})
                parameters = run.model.named_parameters()
                assert {*rates} == {name for name, parameter in parameters if not parameter.stop_gradient}

        train(plugins=(Look,), **settings)
        return rates

    return run


def test_each_parameter_has_the_rate_of_its_depth(rates_of):
    rates = rates_of()
    assert {level(name): rate for name, rate in rates.items()} == {0: 0.25, 1: 0.5, 2: 1.0}
    assert all(rate == 0.5 ** (2 - level(name)) for name, rate in rates.items())


def test_the_first_step_of_adamw_is_as_large_as_the_rate(train, base_model, tmp_path):
    """Whose size is the rate where a gradient is much larger than ε, whatever the gradient."""
    train(weight_decay=0, lr_scheduler_type="constant")
    before, after = (load_file(folder / "model.safetensors") for folder in (base_model, tmp_path / "out"))
    for name in before:
        largest = np.abs(after[name].astype(np.float64) - before[name]).max()
        assert largest == pytest.approx(1e-2 * 0.5 ** (2 - level(name)), rel=2e-3), name


@needs("lora")
def test_with_an_adapter_it_is_the_adapters_layers(rates_of):
    rates = rates_of(plugin=["lora", "layerwise-decay"])
    assert set(rates.values()) == {0.5, 1.0}
    assert all("lora_" in name and rate == 0.5 ** (2 - level(name)) for name, rate in rates.items())

"""An adapter whose files leave out what trains is refused before it trains, however its export is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_plugins import toy

import sft
from sft.testing import needs

Train = Callable[..., sft.Summary]
Export = Callable[[dict[str, Any]], dict[str, np.ndarray]]


def files(tensors: dict[str, np.ndarray], **config: Any) -> sft.AdapterFiles:
    return sft.AdapterFiles({"peft_type": "TOY", **config}, tensors)


def made(paddle: Any, *shapes: tuple[int, ...], dtype: str = "float32") -> dict[str, Any]:
    """Parameters a, b, c … of these shapes; each second one is zero, as adapters begin."""
    found = {}
    for number, shape in enumerate(shapes):
        zero = paddle.nn.initializer.Constant(0.0)
        parameter = paddle.create_parameter(list(shape), dtype, default_initializer=zero)
        values = paddle.zeros(shape) if number % 2 else paddle.arange(int(np.prod(shape, dtype=int))) / 7 - 1
        parameter.set_value(values.reshape(shape).astype(dtype))
        found[chr(ord("a") + number)] = parameter
    return found


SHAPES = ((4, 2), (2, 3), (3,), (), (1,), (5, 2), (2, 4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("count", range(1, 8))
def test_each_single_parameter_is_missed(paddle: Any, count: int, dtype: str) -> None:
    """And what is asked leaves no trace."""
    from sft.training.export_checks import left_out

    parameters = made(paddle, *SHAPES[:count], dtype=dtype)
    before = {name: p.numpy().tobytes() for name, p in parameters.items()}

    def export(without: set[str]) -> sft.AdapterFiles:
        return files({f"T.{name}": p.numpy() for name, p in parameters.items() if name not in without})

    assert left_out(parameters, lambda: export(set())) == []
    for name in parameters:
        assert left_out(parameters, lambda name=name: export({name})) == [name]
    assert left_out(parameters, lambda: export(set(parameters))) == list(parameters)
    assert {name: p.numpy().tobytes() for name, p in parameters.items()} == before


EXPORTS: dict[str, Export] = {
    "product": lambda p: {"delta": p["a"] @ p["b"]},
    "products": lambda p: {"x": p["a"] @ p["b"], "y": p["f"] @ p["g"]},
    "side by side": lambda p: {"a": np.concatenate([p["a"], np.ones_like(p["a"])], 1), "b": p["b"]},
    "all in one": lambda p: {"all": np.concatenate([value.ravel() for value in p.values()])},
    "directions": lambda p: {name: value / np.linalg.norm(value) for name, value in p.items() if value.size > 1},
    "logarithms": lambda p: {name: np.log(np.abs(value)) for name, value in p.items()},
    "bfloat16": lambda p: {name: (value.view(np.uint32) >> 16).astype(np.uint16) for name, value in p.items()},
    "sum": lambda p: {"sum": np.asarray(sum(float(value.sum()) for value in p.values()))},
}
HELD = {
    "product": "ab",
    "products": "abfg",
    "side by side": "ab",
    "all in one": "abcdefg",
    "directions": "abcfg",
    "logarithms": "abcdefg",
    "bfloat16": "abcdefg",
    "sum": "abcdefg",
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_whatever_the_export_makes_of_them(paddle: Any, kind: str) -> None:
    from sft.training.export_checks import left_out

    parameters = made(paddle, *SHAPES)
    found = left_out(
        parameters, lambda: files(EXPORTS[kind]({name: p.numpy().reshape(p.shape) for name, p in parameters.items()}))
    )
    assert found == [name for name in parameters if name not in HELD[kind]]


def test_a_number_in_the_config_counts(paddle: Any) -> None:
    from sft.training.export_checks import left_out

    parameters = made(paddle, (), ())
    assert left_out(parameters, lambda: files({}, gate=float(parameters["a"]))) == ["b"]


def test_few_exports_are_enough(paddle: Any) -> None:
    from sft.training.export_checks import left_out

    parameters = {str(number): one["a"] for number in range(100) for one in [made(paddle, (2, 2))]}
    asked: list[None] = []

    def export() -> sft.AdapterFiles:
        asked.append(None)
        return files({name: p.numpy() for name, p in parameters.items() if name != "77"})

    assert left_out(parameters, export) == ["77"]
    assert len(asked) == (1 + 2 * 7 + 1) + (
        1 + 1
    )  # all together, then the one that is missing; each time once more as it was


@pytest.mark.parametrize("tensors", ["", "b"])
@pytest.mark.parametrize("every", [1, 3, 9], ids="each {} exports".format)
def test_what_changes_by_itself_tells_nothing(paddle: Any, every: int, tensors: str) -> None:
    """A date in the config, or a tensor of random numbers, which may change at each export or seldom."""
    from sft.training.export_checks import left_out

    parameters = made(paddle, *SHAPES[:5])
    count = 0

    def export() -> sft.AdapterFiles:
        nonlocal count
        count += 1
        date = count // every
        return files(
            {
                "noise": np.float32([date]),
                f"of {date}": np.ones(1),
                **{name: parameters[name].numpy() for name in tensors},
            },
            created=date,
        )

    assert left_out(parameters, export) == [name for name in parameters if name not in tensors]


class Forgets(sft.Plugin):
    """Trains two vectors on each v_proj, and writes one of them."""

    name = "forgets"
    api_version = 1

    @sft.hookimpl
    def sft_adapt_model(self, run: sft.Run, model: Any) -> None:
        import paddle

        class Scaled(paddle.nn.Layer):
            def __init__(self, base: Any, size: int) -> None:
                super().__init__()
                self.base = base
                self.v, self.w = (self.create_parameter([size], is_bias=True) for _ in range(2))

            def forward(self, x: Any) -> Any:
                return self.base(x) * (1 + self.v) + self.w

        self.layers = {}
        for target in sft.target_layers(model, ["v_proj"]):
            self.layers[target.name] = Scaled(target.layer, target.out_features)
            target.replace(self.layers[target.name])

    @sft.hookimpl
    def sft_export_adapter(self, run: sft.Run, model: Any) -> sft.AdapterFiles:
        return files({f"{name}.v": layer.v.numpy() for name, layer in self.layers.items()})


def test_such_an_adapter_is_refused_before_it_trains(train: Train, tmp_path: Path) -> None:
    message = (
        r"Plugin forgets leaves model\.layers\.0\.self_attn\.v_proj\.w, model\.layers\.1\.self_attn\.v_proj\.w "
        "out of the adapter that it writes, so what they learn would be lost"
    )
    with pytest.raises(sft.UsageError, match=message):
        train("out", (Forgets,))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "plugins",
    [
        pytest.param(["lora"], marks=needs("lora")),
        pytest.param(["lora", "pissa"], marks=needs("lora", "pissa")),
        pytest.param(["vera"], marks=needs("vera")),
    ],
    ids="-".join,
)
def test_our_adapters_are_as_if_nobody_had_asked(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins: list[str]
) -> None:
    settings = {"plugin": plugins, "max_steps": 2, "do_eval": False, "vera_rank": 2, "lora_rank": 2}
    settings = {key: value for key, value in settings.items() if not key.endswith("rank") or key[:4] in plugins}
    train("out", **settings)
    monkeypatch.setattr("sft.training.export_checks.check_export", lambda run: None)
    train("unasked", **settings)
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "unasked"))
    assert one == other


def adapter(export: Callable[[Any], sft.AdapterFiles], **hooks: Callable[..., Any]) -> type[sft.Plugin]:
    """Trains the weight of each q_proj; ``export`` makes the files, given the run's model."""

    def adapt(self: Any, model: Any) -> None:
        for target in sft.target_layers(model, ["q_proj"]):
            target.layer.weight.stop_gradient = False

    return toy(**{"sft_adapt_model": adapt, "sft_export_adapter": lambda self, model: export(model), **hooks})


def weights(model: Any) -> dict[str, np.ndarray]:
    """What the adapter trains, [out, in]: views of paddle's [in, out]."""
    return {target.name: target.layer.weight.numpy().T for target in sft.target_layers(model, ["q_proj"])}


def test_an_export_may_transpose(train: Train, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    trained: dict[str, np.ndarray] = {}
    keep = adapter(
        lambda model: files(weights(model)),
        sft_run_ended=lambda self, run: trained.update(weights(run.model)),
    )
    train("out", (keep,), max_steps=1, do_eval=False)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == trained.keys()
    for name, tensor in trained.items():
        np.testing.assert_array_equal(found[name], tensor)


TWICE: list[Any] = []
TWICE.append(TWICE)


@pytest.mark.parametrize(
    ("config", "dtype", "message"),
    [
        ({"target_modules": {"q_proj"}}, None, "cannot be written as JSON: 'target_modules' is a set (Object of type"),
        ({"r": np.int64(3)}, None, "cannot be written as JSON: 'r' is an int64 (Object of type int64 is not"),
        ({"deep": [{"x": np.float32(3)}]}, None, "cannot be written as JSON: 'deep' is a list (Object of type float32"),
        ({"round": TWICE}, None, "cannot be written as JSON: 'round' is a list (Circular reference detected)"),
        ({"text": "half \ud83d"}, None, "cannot be written as JSON: 'text' is a str ("),
        (
            {"peft_type": None},
            None,
            "a config whose 'peft_type' is None where the kind of adapter, a text, is expected",
        ),
        ({}, object, "a tensor that safetensors cannot hold: 'model.layers.0.self_attn.q_proj' is of object"),
        ({}, np.longdouble, "a tensor that safetensors cannot hold: 'model.layers.0.self_attn.q_proj' is of float"),
    ],
)
def test_an_export_that_cannot_be_written_is_found_before_the_first_step(
    train: Train, tmp_path: Path, config: dict[str, Any], dtype: Any, message: str
) -> None:
    def export(model: Any) -> sft.AdapterFiles:
        return files({name: tensor.astype(dtype or tensor.dtype) for name, tensor in weights(model).items()}, **config)

    with pytest.raises(sft.PluginError) as caught:
        train("out", (adapter(export),), do_eval=False)
    assert str(caught.value).startswith("Plugin toy (given directly as Toy) answers sft_export_adapter with a ")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()

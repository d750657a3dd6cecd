"""The seams of optimizer and schedule, through toy plugins: each is asked and obeyed, its state survives, and what it
gets wrong is said with its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from adamw import gradients_of, parameters_of
from toy_plugins import toy

import sft
from sft.distributed.parts import Part
from sft.distributed.pieces import Piece, SavedState, save_pieces
from sft.seams import ParameterGroup

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]

SAVES = {
    **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "do_eval": False, "weight_decay": 0.1},
    "lr_scheduler_type": "constant",
}


@pytest.fixture
def momentum(paddle: Any) -> type:
    """Heavy-ball SGD, which also counts its steps."""

    class Momentum(sft.Optimizer):
        elementwise = True
        grains: ClassVar[dict[str, int]] = {"steps": 0}

        def new_state(self, name: str, value: Any) -> dict[str, Any]:
            return {"velocity": paddle.zeros_like(value), "steps": paddle.zeros([1], "int64")}

        def update(self, gradients: dict[str, Any], rate: float, decay: float) -> None:
            for name, gradient in gradients.items():
                value, kept = self.values[name], self.kept[name]
                kept["steps"] += 1
                kept["velocity"].set_value(0.9 * kept["velocity"] + gradient + decay * value)
                value.set_value(value - rate * kept["velocity"])

    return Momentum


def plugin_of(optimizer: type, called: str = "heavy") -> type[sft.Plugin]:
    def answer(self: Any, run: sft.Run, groups: list[ParameterGroup]) -> Any:
        return optimizer(groups)

    return toy(called, sft_optimizer=answer)


def momentum_by_hand(value: np.ndarray, gradients: list[np.ndarray], rate: float, decay: float) -> np.ndarray:
    value, velocity = value.astype(np.float64), np.zeros(value.shape)
    for gradient in gradients:
        velocity = 0.9 * velocity + gradient + decay * value
        value = value - rate * velocity
    return value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_hands_over_float32_gradients_and_values_by_group(paddle: Any, momentum: type, dtype: str) -> None:
    """Factor, the group's rate and decay, masters of 16-bit parameters, and state that another one goes on from."""
    parameters, gradients = {}, gradients_of(4)
    for name, parameter in parameters_of(paddle).items():
        parameters[name] = paddle.base.framework.EagerParamBase.from_tensor(parameter.detach().astype(dtype))
        parameters[name].stop_gradient = False
    start = {name: parameter.astype("float32").numpy() for name, parameter in parameters.items()}
    decays = {"block.weight": 0.1, "block.bias": 0.0, "head.weight": 0.3}
    groups = [ParameterGroup(name, {name: p}, 2.0, decays[name]) for name, p in parameters.items()]
    optimizer = momentum(groups)
    for step in range(4):
        for name, parameter in parameters.items():
            parameter.grad_ = paddle.to_tensor(gradients[name][step])
        optimizer.step(0.01, 0.5)
        assert all(parameter.grad is None for parameter in parameters.values())
        if step == 1:
            state = {name: array.copy() for name, array in optimizer.state().items()}
            masters = {f"{name}.master" for name in parameters} if dtype == "bfloat16" else set()
            assert set(state) == {f"{name}.{kind}" for name in parameters for kind in ("velocity", "steps")} | masters
            optimizer = momentum(groups)
            optimizer.load(state)
    for name, value in optimizer.values.items():
        halves = [0.5 * gradient for gradient in gradients[name]]
        expected = momentum_by_hand(start[name], halves, 0.02, decays[name])
        np.testing.assert_allclose(value.numpy(), expected, atol=2e-6, rtol=0)
        np.testing.assert_array_equal(parameters[name].numpy(), value.astype(dtype).numpy())
        assert int(optimizer.kept[name]["steps"]) == 4


def test_a_plugins_optimizer_steps_and_resumes_to_the_bit(train: Train, momentum: type, tmp_path: Path) -> None:
    plugin, said = plugin_of(momentum), list[str]()
    train("whole", (plugin,), adam_beta1=0.5, say=said.append, **SAVES)
    for name, plugins in (("half", (plugin,)), ("adamw", ())):
        train(name, plugins, **{**SAVES, "max_steps": 2})
    halves = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "adamw")]
    train("half", (plugin,), resume_from_checkpoint=True, **SAVES)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "half")]
    assert weights[0] == weights[1]
    assert len({*halves, *weights}) == 3
    assert any("adam_beta1 0.5: optim is heavy" in text for text in said)
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["settings"]["optim"] == "heavy"
    with pytest.raises(sft.UsageError, match=r"was trained with plugins none, and this run has heavy"):
        train("adamw", (plugin,), resume_from_checkpoint=True, **SAVES)


def test_what_reads_settings_of_another_optimizer_says_so(train: Train, momentum: type) -> None:
    plugin, said = plugin_of(momentum), list[str]()
    plugin.reads = ("adam_beta1",)
    train("out", (plugin,), adam_beta1=0.5, adam_beta2=0.9, say=said.append, max_steps=1, do_eval=False)
    (line,) = [text for text in said if text.startswith("settings without effect")]
    assert "adam_beta2 0.9" in line
    assert "adam_beta1" not in line


def test_naming_the_cores_optimizer_beside_a_plugins_is_refused(train: Train, momentum: type) -> None:
    with pytest.raises(sft.UsageError, match=r"optim is adamw, and plugin heavy \(given directly as Toy\) brings ano"):
        train("out", (plugin_of(momentum),), optim="adamw")


# --- what it gets wrong -------------------------------------------------------------------------------------


def test_an_optimizer_that_fails_or_answers_wrongly_is_named(train: Train, momentum: type) -> None:
    class Fails(momentum):  # type: ignore[valid-type, misc]
        def update(self, gradients: dict[str, Any], rate: float, decay: float) -> None:
            raise KeyError("lost")

    class Large(momentum):  # type: ignore[valid-type, misc]
        grains: ClassVar[dict[str, int]] = {}

    def few(groups: list[ParameterGroup]) -> Any:
        return momentum(groups[:1])

    for made, message in (
        (Fails, r"Plugin heavy \(given directly as Toy\) failed in its optimizer's update \(KeyError: 'lost'\)"),
        (lambda groups: [], r"Plugin heavy .* answers sft_optimizer with a list where an Optimizer is expected"),
        (few, r"Plugin heavy .* answers sft_optimizer with an optimizer of other parameters than its groups have"),
    ):
        with pytest.raises(sft.PluginError, match=message):
            train("out", (plugin_of(made),), max_steps=1, do_eval=False, overwrite_output_dir=True)  # type: ignore[arg-type]
    with pytest.raises(sft.SftError, match=r"Large keeps a tensor of \[1\] as 'steps' of .*, which has \[.*\] values"):
        train("out", (plugin_of(Large),), max_steps=1, do_eval=False, overwrite_output_dir=True)


@pytest.mark.parametrize("cut", ["pieces", "flat", "whole"])
def test_what_is_stepped_as_a_whole_refuses_pieces(paddle: Any, momentum: type, cut: str) -> None:
    """A piece of a parameter; or a whole one that is stepped flat, so that its shape is lost."""
    from sft.training.groups import _check_division

    class Whole(momentum):  # type: ignore[valid-type, misc]
        elementwise = False

    shape = [12] if cut == "flat" else [3, 4]
    parameter = paddle.create_parameter(shape, "float32")
    piece = Piece(Part((3, 4), 0, 0, 1), 0, 6 if cut == "pieces" else 12)
    strategy = SimpleNamespace(pieces=lambda stepped: {"w": piece}, largest=lambda value: value)
    run: Any = SimpleNamespace(strategy=strategy)
    made = [kind([ParameterGroup("all", {"w": parameter})]) for kind in (Whole, momentum)]
    _check_division(run, made[1], "heavy")
    if cut == "whole":
        _check_division(run, made[0], "heavy")
        return
    with pytest.raises(sft.UsageError, match=r"optimizer of plugin heavy steps a parameter as a whole, .*\(here w\); "):
        _check_division(run, made[0], "heavy")


# --- state in blocks ----------------------------------------------------------------------------------------


def test_state_in_blocks_is_read_where_blocks_are_not_cut(tmp_path: Path) -> None:
    """One number stands for four values. 26 values in two pieces of 12 and 14, which begin at borders of blocks, and in
    pieces that do not."""
    grains = {"scale": 4}
    whole = np.arange(7, dtype=np.float32)

    def piece(start: int, stop: int) -> Piece:
        return Piece(Part((2, 13), 0, 0, 1), start, stop)

    def write(*cuts: int) -> SavedState:
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
        for number, (start, stop) in enumerate(pairwise(cuts)):
            own = whole[start // 4 : -(-stop // 4)]
            padded = np.concatenate([own, [9]]).astype(np.float32)  # padding that must not be written
            save_pieces(tmp_path / f"o{number}.safetensors", {"w.scale": padded}, {"w": piece(start, stop)}, grains)
        return SavedState(tmp_path, "o", grains)

    for saved in (write(0, 26), write(0, 12, 26), write(0, 8, 16, 26)):
        np.testing.assert_array_equal(saved.piece("w.scale", piece(0, 26), (2, 13)), whole)
        np.testing.assert_array_equal(saved.piece("w.scale", piece(0, 20), (20,)), whole[:5])
        np.testing.assert_array_equal(saved.piece("w.scale", piece(20, 26), (8,)), [5, 6])
        np.testing.assert_array_equal(saved.piece("w.scale", piece(20, 26), (10,)), [5, 6, 0])
        with pytest.raises(sft.UsageError, match=r"holds w\.scale in blocks of 4 values, which the processes of"):
            saved.piece("w.scale", piece(13, 26), (13,))
    uneven = write(0, 13, 26)
    np.testing.assert_array_equal(uneven.piece("w.scale", piece(13, 26), (13,)), whole[3:7])
    with pytest.raises(sft.UsageError, match=r"resume with the number of processes and the parallel plan of that run"):
        uneven.piece("w.scale", piece(0, 26), (2, 13))
    other = Piece(Part((4, 13), 0, 0, 2), 0, 26)
    with pytest.raises(sft.UsageError, match=r"in blocks of 4 values"):
        write(0, 26).piece("w.scale", other, (2, 13))


# --- the schedule -------------------------------------------------------------------------------------------


def schedule(rate: Callable[[int, int], Any]) -> type[sft.Plugin]:
    def answer(self: Any, run: sft.Run, total: int) -> Any:
        return lambda step: rate(step, total)

    return toy("stairs", sft_schedule=answer)


def test_a_plugins_schedule_is_asked_for_each_step(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    stairs = schedule(lambda step, total: 0.01 if step <= total // 2 else 0.001)
    train("out", (stairs,), max_steps=4, do_eval=False)
    assert [line["learning_rate"] for line in metrics(tmp_path / "out") if "loss" in line] == [0.01] * 2 + [0.001] * 2
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["lr_scheduler_type"] == "stairs"


def test_none_is_no_answer(train: Train, tmp_path: Path) -> None:
    silent = toy("silent", sft_schedule=lambda self: None, sft_optimizer=lambda self: None)
    train("out", (silent,), max_steps=2, do_eval=False)
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert (settings["optim"], settings["lr_scheduler_type"]) == ("adamw", "linear")
    train("without", max_steps=2, do_eval=False)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "without")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (lambda step, total: -0.1, r"Plugin stairs .* with a learning rate of -0\.1 for step 1"),
        (lambda step, total: float("nan"), r"with a learning rate of nan for step 1"),
        (
            lambda step, total: 1 / (step - 1),
            r"Plugin stairs .* failed in the schedule that it gave \(ZeroDivisionE",
        ),
        (lambda step, total: "0.1", r"with a str \('0\.1'\) where a number is expected"),
    ],
)
def test_a_rate_that_is_none_is_said_with_the_plugins_name(train: Train, rate: Any, message: str) -> None:
    with pytest.raises(sft.PluginError, match=message):
        train("out", (schedule(rate),), max_steps=2, do_eval=False)


# --- words of plugins ---------------------------------------------------------------------------------------


@pytest.fixture
def words(distribute: Callable[..., None]) -> None:
    """Two installed plugins that bring optimizers; one of them also answers another name of its own."""
    source = """
        import sft

        class Sign(sft.Plugin):
            name = "sign"
            api_version = 1
            @sft.hookimpl
            def sft_optimizer(self, run, groups): ...

        class Ball(Sign):
            name = "ball"
            api_version = 1
    """
    requests = {"value.optim.sign": "Sign", "value.optim.sign_32bit": "Sign", "value.optim.ball": "Ball"}
    distribute("sft-test-steps", source, {"sign": "Sign", "ball": "Ball"}, requests)


@pytest.mark.usefixtures("words")
class TestWords:
    @pytest.mark.parametrize(
        ("values", "plugins", "optim"),
        [
            ({}, [], "adamw"),
            ({"optim": "adamw_torch"}, [], "adamw_torch"),
            ({"optim": "sign"}, ["sign"], "sign"),
            ({"optim": "Sign_32bit"}, ["sign"], "sign_32bit"),
            ({"plugin": "sign"}, ["sign"], "sign"),
            ({"plugin": "ball", "optim": "ball"}, ["ball"], "ball"),
            ({"plugin": "no:ball", "optim": "sign"}, ["sign"], "sign"),
        ],
    )
    def test_a_word_asks_for_its_plugin_and_a_plugin_brings_its_word(
        self, values: dict[str, Any], plugins: list[str], optim: str
    ) -> None:
        from sft.resolve import resolve

        settings, active, without_effect = resolve({**values, "device": "gpu"}, ())
        assert [name for name in active.names if name in ("sign", "ball")] == plugins
        assert settings.training.optim == optim
        assert without_effect == []

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"optim": "adam"}, r"optim: expected one of adamw, .*ball, .*sign, sign_32bit, got 'adam'"),
            (
                {"optim": "adamw", "plugin": "sign"},
                r"optim is adamw, and plugin sign \(sft-test-steps 1\.0\) brings a",
            ),
            (
                {"optim": "sign", "plugin": "no:sign"},
                r"optim sign asks for plugin sign, which is switched off; keep",
            ),
            ({"optim": "sign", "plugin": "ball"}, r"Plugins .* both provide sft_optimizer, which has one place"),
        ],
    )
    def test_a_word_that_nobody_or_another_answers_is_refused(self, values: dict[str, Any], message: str) -> None:
        from sft.resolve import resolve

        with pytest.raises(sft.UsageError, match=message):
            resolve({**values, "device": "gpu"}, ())

    def test_help_lists_the_words(self) -> None:
        from sft.commands.run import help_text

        (line,) = [line for line in help_text({}).splitlines() if line.startswith("  --optim ")]
        assert {"adamw", "adamw_torch", "ball", "sign", "sign_32bit"} < {*line.split()[1].split("|")}

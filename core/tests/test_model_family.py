"""Hook ``sft_model_family``: wherever a model is opened, a plugin may say how its config is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
from safetensors.numpy import load_file
from toy_families import INSTALLED, Reader, toy_model

import sft
from sft.inference.evaluate import evaluate_finished
from sft.inference.merge import merge
from sft.testing import forward, load, make_model

Train = Callable[..., sft.Summary]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("bases") / "toy")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a Llama."""
    return make_model(tmp_path_factory.mktemp("bases") / "llama", tie_word_embeddings=False)


@pytest.fixture(params=["Reader", "OwnClass"])
def toy(request: pytest.FixtureRequest, distribute: Callable[..., None]) -> str:
    """The name of an installed plugin."""
    distribute("sft-toy-models", INSTALLED.format(kind=request.param, name="toys"), {"toys": "Toy"})
    return "toys"


@pytest.mark.parametrize("toy", ["OwnClass"], indirect=True)
def test_linears_of_a_class_of_its_own_become_the_decoders(toy: str, base: Path, paddle: Any) -> None:
    linears = [layer for layer in load(base, plugins=[toy]).sublayers() if isinstance(layer, paddle.nn.Linear)]
    assert len(linears) > 7
    assert {type(layer) for layer in linears} == {sft.Linear}


def test_a_run_and_every_command_read_it(
    toy: str, train: Train, base: Path, llama: Path, dataset: Path, tmp_path: Path
) -> None:
    """Each gives what it gives for the Llama."""
    from sft.commands.chat import command as chat
    from sft.commands.generate import command as generate

    settings: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-2}
    mine = train("mine", model_name_or_path=str(base), plugin=[toy], **settings)
    plain = train("plain", model_name_or_path=str(llama), **settings)
    assert (mine.train_loss_last, mine.eval_loss_after) == (plain.train_loss_last, plain.eval_loss_after)
    written, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("mine", "plain"))
    assert {name.replace("model.", "toy.") for name in expected} == set(written)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(written[name.replace("model.", "toy.")], tensor)
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["architectures"] == ["ToyForCausalLM"]

    def measured(model: Path, *plugins: str) -> float:
        values = {"model_name_or_path": str(model), "dataset_name_or_path": str(dataset)}
        return float(evaluate_finished(values, None, lambda text: None, plugins)["eval_loss"])

    def typed(command: Any, model: Path, *words: str, given: str | None = None) -> str:
        line = ["--model_name_or_path", str(model), "--max_new_tokens", "6", *words]
        result = click.testing.CliRunner().invoke(
            command, line, input=given, standalone_mode=False, catch_exceptions=False
        )
        return result.stdout

    assert measured(tmp_path / "mine", toy) == pytest.approx(mine.eval_loss_after, abs=1e-6)
    prompt = ("--prompt", "a river in winter")
    answer = typed(generate, tmp_path / "mine", *prompt, "--plugin", toy)
    assert answer == typed(generate, tmp_path / "plain", *prompt)
    said = typed(chat, tmp_path / "mine", "--plugin", toy, given="a river in winter\n")
    assert said == typed(chat, tmp_path / "plain", given="a river in winter\n")


def test_a_checkpoint_is_resumed_with_the_plugin_alone(toy: str, train: Train, base: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model_name_or_path": str(base), "save_steps": 1, "max_steps": 3, "learning_rate": 1e-2}
    settings["save_strategy"] = "steps"
    whole = train("whole", plugin=[toy], **settings)
    middle = {**settings, "resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-1")}
    assert train("again", plugin=[toy], **middle).train_loss_last == whole.train_loss_last
    with pytest.raises(sft.UsageError, match=r"model_type 'toy' is not a family that is known here.*--plugin NAME"):
        train("without", **middle)


def test_what_goes_wrong_in_a_family_is_its_plugins_fault(base: Path, train: Train) -> None:
    class Broken(Reader):
        name = "broken"
        api_version = 1

        def read(self, values: sft.Values) -> sft.Architecture:
            raise KeyError("hidden")

    class NoModel(Reader):
        name = "no-model"
        api_version = 1

        def build(self, architecture: Any) -> Any:
            return architecture

    with pytest.raises(sft.PluginError, match=r"Plugin broken \(.*\) failed in sft_model_family's read \(KeyError"):
        train(model_name_or_path=str(base), plugins=(Broken,))
    wrong = r"build with an Architecture where a LanguageModel .* has no get_input_embeddings, embed"
    with pytest.raises(sft.PluginError, match=wrong):
        train(model_name_or_path=str(base), plugins=(NoModel,))


def test_an_adapter_brings_the_plugin_back(
    toy: str, train: Train, base: Path, llama: Path, dataset: Path, tmp_path: Path
) -> None:
    pytest.importorskip("sft_peft_lora")
    settings: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-2}
    train("mine", model_name_or_path=str(base), plugin=[toy, "lora"], **settings)
    train("plain", model_name_or_path=str(llama), plugin=["lora"], **settings)
    ids = np.arange(3, 43)[None]
    expected = forward(load(llama, tmp_path / "plain"), ids)
    assert np.array_equal(forward(load(base, tmp_path / "mine"), ids), expected)
    merge(str(base), tmp_path / "mine", tmp_path / "merged", lambda text: None)
    found = forward(load(tmp_path / "merged", plugins=[toy]), ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_two_that_read_one_model_type_are_refused(distribute: Callable[..., None], base: Path, train: Train) -> None:
    distribute("sft-toys-one", INSTALLED.format(kind="Reader", name="one"), {"one": "Toy"})
    distribute("sft-toys-two", INSTALLED.format(kind="OwnClass", name="two"), {"two": "Toy"}, version="2.0")
    both = r"Plugin one \(sft-toys-one 1.0\) and Plugin two \(sft-toys-two 2.0\) both read model_type 'toy'; leave"
    with pytest.raises(sft.UsageError, match=both):
        train(model_name_or_path=str(base), plugin=["one", "two"])
    with pytest.raises(sft.UsageError, match=both):
        load(base, plugins=["one", "two"])


def test_a_family_of_sft_is_nobody_elses(models: Path, train: Train) -> None:
    class Llamas(Reader):
        name = "llamas"
        api_version = 1

        @sft.hookimpl
        def sft_model_family(self, config: dict[str, Any]) -> sft.Family | None:
            return sft.Family("llama", "LlamaForCausalLM", self.read)

    with pytest.raises(sft.UsageError, match=r"sft itself and Plugin llamas \(given .*\) both read model_type 'llama'"):
        train(plugins=(Llamas,))


def test_what_is_no_family_is_the_plugins_fault(base: Path, train: Train) -> None:
    class Wrong(Reader):
        name = "wrong"
        api_version = 1

        @sft.hookimpl
        def sft_model_family(self, config: dict[str, Any]) -> sft.Family | None:
            config.clear()  # its own copy
            return "toy"  # type: ignore[return-value]

    with pytest.raises(sft.PluginError, match=r"answers sft_model_family with a str \('toy'\) where a Family is"):
        train(model_name_or_path=str(base), plugins=(Wrong,))


def test_a_plugin_that_reads_nothing_here_changes_nothing(train: Train, models: Path) -> None:
    assert train("out", plugins=(Reader,), max_steps=1).steps == 1


def test_a_class_of_its_own_cannot_be_planned_or_divided(
    distribute: Callable[..., None], train: Train, base: Path
) -> None:
    paper = pytest.importorskip("sft_parallel_4d.paper")
    distribute("sft-toy-models", INSTALLED.format(kind="OwnClass", name="toys"), {"toys": "Toy"})
    message = "'toy' is a class of a plugin's own, of which nothing is known"
    with pytest.raises(sft.UsageError, match=message):
        paper.outline({"model_name_or_path": str(base), "plugin": ["toys"]})
    with pytest.raises(sft.UsageError, match=message):
        train(model_name_or_path=str(base), plugin=["toys"], nproc=2)

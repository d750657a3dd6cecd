"""``generate``, ``chat`` and ``evaluate`` open a model as a run does: device, precision, attention."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typed_commands import MODEL, Type

import sft
from sft.precision import Precision

COMMANDS = [
    ("generate", ["--prompt", "x"]),
    ("chat", []),
    ("evaluate", ["--dataset_name_or_path", "DATA"]),
]


@pytest.mark.parametrize(("command", "arguments"), COMMANDS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--device", "moon"], "There is no device 'moon'; give cpu, gpu or gpu:N."),
        (["--device", "cpu", "--fp16", "true", "--require_precision"], "fp16 is asked for, and paddle has no float16"),
        (["--bf16", "true", "--fp16", "true"], "bf16 and fp16 are both set; leave one of them out."),
        (["--fp16_opt_level", "O2"], "fp16_opt_level does nothing, for neither bf16 nor fp16 is set"),
    ],
)
def test_device_and_precision_are_those_of_a_run(
    typed: Type, dataset: Path, command: str, arguments: list[str], settings: list[str], message: str
) -> None:
    line = [str(dataset) if word == "DATA" else word for word in arguments]
    with pytest.raises(sft.UsageError) as caught:
        typed(command, *line, *settings)
    assert str(caught.value).startswith(message)


def test_weights_and_products_have_the_precision_that_is_set(
    typed: Type, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the device can: this one is told that it can."""
    from sft.training import precision

    opened: list[tuple[Precision, str]] = []

    class OpenedError(sft.SftError):
        pass

    def load(source: Any, quantizer: Any, precision: Precision, **more: Any) -> Any:
        opened.append((precision, source.folder.name))
        raise OpenedError

    monkeypatch.setattr(precision, "lacking", lambda dtype, device: None)
    monkeypatch.setattr("sft.models.loading.load_model", load)
    for half, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        for level, frozen in (([], dtype), (["--fp16_opt_level", "O1"], "float32")):
            for command, arguments in COMMANDS:
                line = [str(dataset) if word == "DATA" else word for word in arguments]
                with pytest.raises(OpenedError):
                    typed(command, *line, f"--{half}", "true", *level)
                assert opened.pop() == (Precision(dtype, "float32", frozen), MODEL)


def test_evaluate_refuses_an_attention_that_cannot_compute_the_model(
    distribute: Any, typed: Type, models: Path, dataset: Path, tmp_path: Path
) -> None:
    """One without windows over a model that has them, as a run does."""
    distribute("toy-attention", ATTENTION, {"toy-attention": "Toy"})
    folder = tmp_path / "model"
    shutil.copytree(models / MODEL, folder)
    values = json.loads((folder / "config.json").read_text())
    values.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=4)
    (folder / "config.json").write_text(json.dumps(values))
    command = import_module("sft.commands.evaluate").command
    line = ["--model_name_or_path", str(folder), "--dataset_name_or_path", str(dataset), "--plugin", "toy-attention"]
    with pytest.raises(sft.UsageError, match="a window of 4 tokens, which attention backend toy-attention does not"):
        command.main(line, standalone_mode=False)


ATTENTION = """
    import sft

    class Toy(sft.Plugin):
        name = "toy-attention"
        api_version = 1

        @sft.hookimpl
        def sft_attention_backend(self, run, config):
            return Backend()

    class Backend:
        def mask(self, ends):
            raise AssertionError("it is refused")

        def attend(self, query, key, value, mask, cap=None):
            raise AssertionError("it is refused")
"""

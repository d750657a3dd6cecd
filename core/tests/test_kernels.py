"""What computes a model's pieces: a plugin's kernels, and the wish to be active on a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_plugins import plugin, toy

import sft
from sft.models.kernels import use_kernels
from sft.plugins.requests import by_device
from sft.resolve import resolve
from sft.testing import forward, load

Distribute = Callable[..., None]
Train = Callable[..., sft.Summary]
Metrics = Callable[..., Any]

PIECES = ("rms_norm", "rotate", "mask", "attention", "swiglu", "geglu", "linear", "product")


class Counting(sft.Kernels):
    """The plain pieces, counted."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        if name in PIECES:
            self.calls[name] += 1
        return super().__getattribute__(name)


class CountingPlugin(sft.Plugin):
    name = "counting"
    api_version = 1

    @sft.hookimpl
    def sft_kernels(self, run: Any, precision: Any) -> Any:
        self.kernels = Counting()
        assert precision.dtype == "float32"
        return self.kernels

    @sft.hookimpl
    def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
        assert run.model.kernels is self.kernels
        run.say(f"pieces: {dict(self.kernels.calls)}")


def test_a_plugins_kernels_compute_every_piece(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    said: list[str] = []
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "seed": 3}
    none = [f"no:{name}" for name in by_device({})]
    plain = train(**settings, plugin=none, output_dir=str(tmp_path / "plain"))
    counted = train(
        **settings,
        output_dir=str(tmp_path / "counted"),
        plugins=[CountingPlugin],
        say=said.append,
        num_samples=1,
        max_new_tokens=4,
    )
    (line,) = [line for line in said if line.startswith("pieces: ")]
    assert all((piece in line) == (piece != "geglu") for piece in PIECES)
    assert counted.train_loss_last == plain.train_loss_last
    assert counted.eval_loss_after == plain.eval_loss_after


def test_a_model_with_gelu_asks_them_for_its_gates(models: Path) -> None:
    model, kernels = load(models / "gemma-tied"), Counting()
    use_kernels(model, kernels)
    forward(model, np.arange(1, 9)[None])
    assert (kernels.calls["geglu"], kernels.calls["swiglu"]) == (len(model.architecture.blocks), 0)


def test_what_is_no_kernels_is_refused(train: Train, tmp_path: Path) -> None:
    with pytest.raises(sft.PluginError, match=r"answers sft_kernels with an int \(3\) where a Kernels is expected"):
        train(output_dir=str(tmp_path / "out"), plugins=[toy(sft_kernels=lambda self: 3)])


class TestWishes:
    """``device.KIND``: active where nobody objects."""

    @pytest.fixture(autouse=True)
    def tools(self, distribute: Distribute) -> None:
        body = "@sft.hookimpl\n        def sft_kernels(self, run, precision): return None"
        distribute("sft-test-quick", plugin("quick", body), {"quick": "Tool"}, {"device.cpu": "Tool"})
        distribute("sft-test-rival", plugin("rival", body), {"rival": "Tool"})
        distribute("sft-test-foe", plugin("foe", 'conflicts = ("quick",)'), {"foe": "Tool"})
        distribute("sft-test-better", plugin("better", 'supersedes = ("quick",)'), {"better": "Tool"})
        distribute("sft-test-lame", plugin("lame", 'requires = ("rival",)'), {"lame": "Tool"}, {"device.cpu": "Tool"})

    def active(self, **values: Any) -> list[str]:
        return [name for name in resolve(values, ())[1].names if name in ("quick", "rival", "foe", "better", "lame")]

    def test_on_its_device_alone(self) -> None:
        assert self.active() == self.active(device="cpu") == ["quick"]
        assert self.active(device="gpu:0") == []

    @pytest.mark.parametrize("off", [{"plugin": "no:quick"}, {"quick": False}])
    def test_switched_off(self, off: dict[str, Any]) -> None:
        assert self.active(**off) == []

    @pytest.mark.parametrize("asked", ["foe", "better"])
    def test_it_stays_out_beside_what_the_user_asks_for(self, asked: str) -> None:
        assert self.active(plugin=asked) == [asked]

    def test_a_place_that_is_taken_is_left_and_what_it_needs_may_come(self) -> None:
        assert self.active(plugin="rival") == ["rival", "lame"]

    def test_asked_for_by_name_it_is_as_any_other(self) -> None:
        with pytest.raises(sft.UsageError, match="cannot work together"):
            self.active(plugin=["quick", "foe"])

    def test_a_hidden_gpu_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sft import runtime

        monkeypatch.setattr(runtime.importlib.metadata, "version", lambda name: "3.3.1")
        monkeypatch.setattr(runtime.Path, "exists", lambda path: True)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert runtime.likely_device() == "gpu"
        for hidden in ("", "-1"):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
            assert runtime.likely_device() == "cpu"

"""Runs that are stopped and resumed: settings in which everything that could be forgotten is in play."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft
from sft.testing import needs

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]

LORA = {"plugin": ["lora"], "lora_dropout": 0.3}
KINDS = [pytest.param({}, id="full"), pytest.param(LORA, id="lora-dropout", marks=needs("lora"))]

# 8 steps an epoch; a line every 4 steps, a checkpoint every 3; everything that could be forgotten is in play.
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 13,
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "evaluation_strategy": "steps",
    "eval_steps": 5,
}


class StoppedError(sft.SftError):
    """The end of the process, as it were."""


def stopping(step: int) -> type[sft.Plugin]:
    """A plugin that ends the run after ``step``."""

    class Stop(sft.Plugin):
        name = "stop"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] == step:
                raise StoppedError

    return Stop


def stopping_when_saved(step: int) -> type[sft.Plugin]:
    """A plugin that ends the run when it has a checkpoint of ``step``."""

    class Stop(sft.Plugin):
        name = "stop"
        api_version = 1

        @sft.hookimpl
        def sft_checkpoint_saved(self, run: sft.Run, folder: Path) -> None:
            if folder.name == f"checkpoint-{step}":
                raise StoppedError

    return Stop


def stop(train: Train, step: int, name: str = "out", plugins: tuple[type, ...] = (), **settings: Any) -> None:
    with pytest.raises(StoppedError):
        train(name, (*plugins, stopping(step)), **settings)


def watching(steps: list[int]) -> type[sft.Plugin]:
    """A plugin that writes down which steps were really done."""

    class Watch(sft.Plugin):
        name = "watch"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            steps.append(record["step"])

    return Watch


REPORT = ("report.html", "report.json")
TIMED = ("metrics.jsonl", "run.json", "sft.log", "state.json", "manifest.json")
"""Files that hold times or paths, or what comes of them."""


def contents(folder: Path, without: tuple[str, ...] = TIMED) -> dict[str, bytes]:
    """Every file under ``folder``, but for the names ``without``."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without and not (without and path.name.endswith(REPORT))
    }


def checkpoints_of(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs stand that several tests compare with or begin from."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def whole(train: Train, shared: Path) -> Callable[..., Path]:
    """The run of SETTINGS that was never stopped, full or with ``LORA``; not to be changed."""

    def get(kind: dict[str, Any] | None = None) -> Path:
        folder = shared / ("whole-lora" if kind else "whole")
        if not folder.exists():
            train(str(folder), **SETTINGS, **(kind or {}))
        return folder

    return get


@pytest.fixture
def stopped(train: Train, shared: Path, tmp_path: Path) -> Path:
    """A copy of the run of SETTINGS that was stopped after step 5, with a checkpoint of step 3."""
    if not (shared / "stopped").exists():
        stop(train, 5, str(shared / "stopped"), **SETTINGS)
    return shutil.copytree(shared / "stopped", tmp_path / "out")

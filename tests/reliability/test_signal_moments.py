"""Signals at every moment of what writes a run's folder and ends the run: ``run.json`` tells the truth of it."""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from moments import Moments, source
from toy_plugins import raising, toy

import sft
from reliability import figures
from sft.files import read_report
from sft.stopping import SIGNALS

Train = Callable[..., sft.Summary]
MODULES = ("training/run_folder", "training/report", "training/ending", "fine_tune", "folder_lock", "files", "stopping")
MOMENTS = None if figures.WHOLE else 20
"""How many to a case; None for all."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600 if figures.WHOLE else 120)]


class CauseError(sft.SftError):
    """What ends a run."""


FAILS = toy("fails", sft_run_started=raising(CauseError("the cause")))
STOPS = toy("stops", sft_step_ended=lambda self: signal.raise_signal(signal.SIGTERM))
CASES: dict[str, tuple[str, type[sft.Plugin] | None, dict[str, Any]]] = {
    "a new folder, to the end": ("open_run_folder", None, {"do_eval": False, "save_strategy": "steps"}),
    "measuring over an older run": ("open_run_folder", None, {"do_train": False, "overwrite_output_dir": True}),
    "a run that fails": ("run", FAILS, {}),
    "a second signal": ("fail", STOPS, {"max_steps": 2}),
}
"""From where on, with what, and the settings."""


@pytest.mark.row("signals", "at each moment: {name}")
@pytest.mark.parametrize("name", CASES)
def test_signals_at_each_moment(train: Train, tmp_path: Path, name: str) -> None:
    begins, plugin, settings = CASES[name]
    trial = Trial(train, tmp_path, begins, plugin, {"max_steps": 1, "save_steps": 1, **settings})
    began, draw = time.monotonic(), random.Random(name)
    assert trial.wrong(-1, signal.SIGTERM) == []  # at none
    count = len(trial.moments.at)
    chosen = range(count) if MOMENTS is None else sorted(draw.sample(range(count), MOMENTS))
    lost = [one for at, moment in enumerate(chosen) for one in trial.wrong(moment, SIGNALS[at % 3])]
    heard = trial.heard
    figures.record(
        "signals",
        f"at each moment: {name}",
        signals=len(chosen),
        heard=heard,
        lost=len(lost),
        seconds=time.monotonic() - began,
    )
    assert not lost, "\n".join(lost)
    assert heard > len(chosen) / 2


class Trial:
    """One case, and what is wrong with it when a signal comes."""

    def __init__(
        self, runs: Train, place: Path, begins: str, plugin: type[sft.Plugin] | None, settings: dict[str, Any]
    ) -> None:
        self._train, self._place, self._plugin, self._settings = runs, place, plugin, settings
        self.moments = Moments(begins, *map(source, MODULES))
        self.heard = 0
        """How many signals have come before the run was over."""
        if "overwrite_output_dir" in settings:
            runs("old", max_steps=1, do_eval=False)

    def wrong(self, moment: int, number: int) -> list[str]:
        folder, old, told = self._place / "out", self._place / "old", []
        shutil.rmtree(folder, ignore_errors=True)
        if old.exists():
            shutil.copytree(old, folder)
        listens = toy(
            "listens",
            sft_run_ended=lambda self: told.append("ended"),
            sft_run_failed=lambda self, error: told.append(type(error).__name__),
        )
        handlers = [signal.getsignal(each) for each in SIGNALS]
        sent = False

        def send() -> None:
            nonlocal sent
            sent = signal.getsignal(number) not in handlers  # else the run is over, and hears none
            if sent:
                signal.raise_signal(number)

        end = "finished"
        with self.moments.counted(moment, send):
            try:
                self._train("out", (*filter(None, [self._plugin]), listens), **self._settings)
            except (sft.SignalError, CauseError) as error:
                end = type(error).__name__
        self.heard += sent
        status, has_failed = self._status(folder, old), self._plugin is FAILS and sent
        ends = {
            "finished": ["finished"],
            "CauseError": ["failed"],
            "SignalError": ["nothing", "interrupted", "finished", *["failed"] * has_failed],
        }
        has_result = (folder / "config.json").exists() or "do_train" in self._settings
        faults = {
            f"it ended with {end}, and run.json says {status}": status not in ends[end],
            f"plugins were told {told}": len(told) > 1 or (told == ["ended"]) != (status == "finished"),
            "there is no result": status == "finished" and not has_result,
            "handlers stay": [signal.getsignal(each) for each in SIGNALS] != handlers,
            "the folder stays locked": (folder / "run.lock").exists(),
            "the lock's thread runs": any(each.name == "sft-folder-lock" for each in threading.enumerate()),
        }
        where = f"{signal.Signals(number).name} at {self.moments.at[moment]}"
        return [f"{where}: {fault}" for fault, is_so in faults.items() if is_so]

    @staticmethod
    def _status(folder: Path, old: Path) -> str:
        """What run.json says that is not of the older run."""
        found = read_report(folder)
        return "nothing" if found in ({}, read_report(old)) else str(found["status"])

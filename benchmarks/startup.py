"""Start-up: how long a user waits for the first sign of life, and for the first step."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import peers, steps
from benchmarks.turns import Side, SideError

if TYPE_CHECKING:
    from benchmarks.bench import Bench

TITLE = "Start-up"
TEXT = """\
Seconds from the start of a program until it has said how it is used (`--help`), and until a LoRA run on 400 packed
records is ready for its first step: libraries imported, records encoded and packed, model loaded and adapted. With
`lazy`, records are read and encoded while they are needed: as many lines as are said, in one file."""
LINES = {"lazy-1m": 1_000_000, "lazy-10m": 10_000_000}


def cases() -> dict[str, str]:
    lazy = {case: f"ready, lazy, {lines:,} lines" for case, lines in LINES.items()}
    return {"help": "--help", "ready": "ready for the first step", **lazy}


def measure(bench: Bench, case: str) -> dict[str, Any]:
    if case == "help":
        sides: dict[str, Any] = {
            "sft": lambda: Command("sft", sys.executable, "sft-core"),
            "trl": lambda: Command("trl", peers.python_of("trl"), "trl"),
        }
    elif case in LINES:
        sides = {"sft": lambda: bench.restarted("sft", partial(lazy_side, bench, many_lines(bench, LINES[case])))}
    else:
        starts = steps.sides(bench, steps.__name__, "lora-packed-float32", bench.records(400))
        sides = {name: lambda name=name, start=start: bench.restarted(name, start) for name, start in starts.items()}
    return bench.compare(
        sides, lambda turn: turn["seconds"], turns=7 if case == "help" else 5, unit="seconds", more_is_better=False
    )


def many_lines(bench: Bench, lines: int) -> Path:
    """A folder with so many lines, each a record of its own."""
    folder = bench.scratch / f"lines-{lines}"
    if not folder.is_dir():
        folder.mkdir()
        with (folder / "train.json").open("w", encoding="utf-8") as file:
            for first in range(0, lines, 10_000):
                numbers = range(first, min(first + 10_000, lines))
                file.writelines(f'{{"src": "What is {n} + 1?", "tgt": "It is {n + 1}."}}\n' for n in numbers)
    return folder


def lazy_side(bench: Bench, data: Path) -> Side:
    places = {"model": str(bench.model), "data": str(data), "out": str(bench.new_folder("out"))}
    work = {"kind": "lora", "packed": True, "dtype": "float32", "settings": {**bench.settings, "lazy": True}}
    return bench.side(steps.__name__, "sft", **work, **places)


class Command(Side):
    """A side whose turn is a whole program that ends by itself: ``name --help``, of ``package`` beside ``python``."""

    def __init__(self, name: str, python: str, package: str) -> None:
        self.name, self._command = name, [str(Path(python).parent / name), "--help"]
        self.facts = {"versions": versions_of(python, package)}

    def turn(self, order: Any = None) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except OSError as error:  # such as an environment that was moved: its programs name a Python that is gone
            raise SideError(self.name, f"{self._command[0]} does not start ({error.strerror})") from error
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            message = f"{' '.join(self._command)} ended with exit code {process.returncode}"
            raise SideError(self.name, message)
        return {"seconds": seconds, "peak_mib": usage.ru_maxrss // 1024}

    def end(self) -> None:
        pass


def versions_of(python: str, package: str) -> dict[str, str]:
    """Those of an interpreter and of a package in its environment; none where it does not start."""
    code = f"import importlib.metadata as m, platform as p; print(p.python_version(), m.version({package!r}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # its program will say why
        return {}
    return dict(zip(("python", package), done.stdout.split(), strict=True))

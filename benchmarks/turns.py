"""Programs that take turns: each is a process that stays up and does one repetition whenever it is told to.

What is compared is measured in turns, so that a machine that is slower for a while is slower for all sides. One side
begins the first turn, the next one the second. The benchmark holds a :class:`Side` for each process; the process itself
uses :class:`Turns` or :func:`serve`. They talk in JSON, a line at a time, over the process's standard input and output;
what libraries print goes to a log. Both ends need nothing but Python's own library.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

LIMIT = 1800.0
"""Seconds that a side may take for one answer."""
PAUSE = 0.3
"""Seconds between turns: OpenMP's threads go on spinning for 0.2 seconds after their last work."""


class SideError(RuntimeError):
    """Side ``side`` ended, or was stopped at the limit; the message has the last line of its log."""

    def __init__(self, side: str, message: str) -> None:
        super().__init__(message)
        self.side = side


class Side:
    """The benchmark's end of a process.

    ``facts`` is what the process said when it was ready, such as versions; ``memory`` the most that it may allocate,
    in bytes, so that what takes too much fails before the machine does.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        limit: float = LIMIT,
        memory: int | None = None,
    ) -> None:
        self.name, self._log, self._limit = name, log, limit

        def bound() -> None:
            if memory is not None:
                resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, cwd=folder,
                env={**os.environ, **(environment or {})}, preexec_fn=bound,
            )  # fmt: skip
        self.facts = self._answer()

    @property
    def process(self) -> int:
        """Its number in the system."""
        return self._process.pid

    def turn(self, order: Any = None) -> dict[str, Any]:
        """One repetition: what the process measured, and ``peak_mib``, its peak resident memory so far."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(order), file=self._process.stdin, flush=True)
        except OSError:
            self._fail()
        return {**self._answer(), "peak_mib": peak_mib(self.process)}

    def end(self) -> None:
        """Stop the process; it may have ended already."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(self._limit, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            self._fail()
        found: dict[str, Any] = json.loads(line)
        return found

    def _fail(self) -> NoReturn:
        with contextlib.suppress(subprocess.TimeoutExpired):  # its output is closed: it is about to end by itself
            self._process.wait(timeout=10)
        self.end()
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["(it said nothing)"]
        how = f"exit code {self._process.returncode}"
        if self._process.returncode == -9:
            how = f"killed: it took more than {self._limit:.0f} seconds, or too much memory"
        raise SideError(self.name, f"{self.name} ended ({how}); the last line of its log: {lines[-1].strip()}")


class Restarted:
    """A side whose repetition is a whole program: each turn starts it, and ends when it says that it is ready.

    What it says then is what was measured, with ``seconds`` since it was started.
    """

    def __init__(self, name: str, start: Callable[[], Side]) -> None:
        self.name, self._start = name, start
        self.facts: dict[str, Any] = {}

    def turn(self, order: Any = None) -> dict[str, Any]:
        began = time.perf_counter()
        side = self._start()
        seconds = time.perf_counter() - began
        try:
            peak = peak_mib(side.process)
        finally:
            side.end()
        self.facts = {key: value for key, value in side.facts.items() if key in ("versions", "threads", "plugins")}
        return {**side.facts, "seconds": seconds, "peak_mib": peak}

    def end(self) -> None:
        pass


def peak_mib(process: int) -> int:
    """The largest resident memory that a process has had, in MiB (Linux)."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    return 0


def alternate(
    sides: Iterable[Side | Restarted], turns: int, order: Any = None, warm: int = 1, pause: float = PAUSE
) -> dict[str, list[dict[str, Any]]]:
    """What each side measured in each of ``turns`` turns, after ``warm`` turns that do not count."""
    sides = list(sides)
    found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for turn in range(warm + turns):
        first = turn % len(sides)
        for side in sides[first:] + sides[:first]:
            measured = side.turn(order)
            if turn >= warm:
                found[side.name].append(measured)
            time.sleep(pause)
    return found


class Turns:
    """The process's end. Make it before anything prints: it keeps standard output for itself."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        self._began = 0.0

    def ready(self, *packages: str, **facts: Any) -> None:
        """Say that turns can begin, with the versions of ``packages`` and other facts."""
        versions = {"python": sys.version.split()[0], **{name: metadata.version(name) for name in packages}}
        self._say({"versions": versions, **facts})

    def begin(self) -> Any:
        """Wait for one's turn; its order. The process ends where there is no other."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        self._began = time.perf_counter()
        return json.loads(line)

    def done(self, **measured: Any) -> None:
        """End the turn: ``seconds`` since it began, and what else was measured."""
        self._say({"seconds": time.perf_counter() - self._began, **measured})

    def _say(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), file=self._out, flush=True)


def serve(turns: Turns, repeat: Callable[[Any], dict[str, Any]]) -> NoReturn:
    """Turn by turn, do ``repeat(order)`` and answer what it returns; its ``seconds``, if any, win over the turn's."""
    while True:
        order = turns.begin()
        turns.done(**repeat(order))

"""Runs of the command line that are killed: at an operation on files, which ``operations.c`` counts, or at a moment.

A run is forked from a process that has made the imports and computed nothing, so one takes about half a second.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import processes
import pytest

HERE = Path(__file__).parent
IMPORTED = ("sft", "sft_", "tokenizers", "safetensors", "jinja2", "ml_dtypes", "paddle.distributed")
"""What a run imports as it goes, and is worth importing once before any is forked, by how the names begin."""
LIMIT = 120.0
"""Seconds that a run may take."""
GRACE = 35.0
"""Seconds that the ranks of a run have to end after a signal."""


@dataclass(frozen=True)
class Operation:
    number: int
    at: int
    """Nanoseconds on a clock that all processes share."""
    kind: str
    path: Path
    other: Path | None
    size: int


@dataclass(frozen=True)
class Ended:
    code: int
    """The exit code; negative for a signal."""
    said: str
    by_rank: list[list[Operation]]
    """The operations of each process."""
    seconds: float


@dataclass
class Runs:
    """Starts runs of the command line in forks. ``work`` is for its own files."""

    work: Path
    library: Path
    server: processes.Server
    imports: list[str] = field(default_factory=lambda: list(processes.IMPORTS))
    number: int = 0

    def run(
        self,
        settings: Mapping[str, Any],
        kill: tuple[int, str] = (-1, "never"),
        after: float | None = None,
        number: int = signal.SIGKILL,
        ranks: int = 1,
        rank: int = 0,
        **facts: Any,
    ) -> Ended:
        """``sft run`` with ``settings``: killed at an operation of ``rank``, or sent a signal ``after`` some seconds.

        Of several ranks the others are killed with that one, as if the machine had gone.
        """
        self.number += 1
        place = self.work / str(self.number)
        place.mkdir()
        arguments = ["run", *(f"--{name}={value}" for name, value in settings.items())]
        began = time.monotonic()
        with ExitStack() as stack:
            port = stack.enter_context(processes.reserved_port()) if ranks > 1 else 0
            forks = [
                self._fork(
                    place / str(n), n, ranks, port, arguments, settings, kill if n == rank else (-1, "never"), facts
                )
                for n in range(ranks)
            ]
            whole = False
            try:
                whole = self._wait(forks, began, after, number)
            finally:
                for fork in forks:
                    fork.kill()
        ends = [fork.code() or 0 for fork in forks]
        # Where a signal has ended one, the others may end because of that.
        by_signal = [end for end in ends if end > 128 or end == -number]
        if not whole and not by_signal:
            by_signal = [-number]
        code = next((end for end in [*sorted(by_signal, reverse=True), ends[rank], *ends] if end), 0)
        said = "".join(fork.output() for fork in forks)
        if not code and any(fork.outcome().get("value") for fork in forks):
            code = next(fork.outcome()["value"] for fork in forks if fork.outcome().get("value"))
        return Ended(code, said, [read(place / str(n) / "operations") for n in range(ranks)], time.monotonic() - began)

    def _wait(self, forks: list[processes.Rank], began: float, after: float | None, number: int) -> bool:
        """Whether all have ended. One that was killed takes the others along. Those that a signal does not end, because
        they wait in paddle for one that it has ended, have a while, as from what starts processes for users."""
        killed, sent = -signal.SIGKILL, None
        while not all(fork.ended() for fork in forks):
            now = time.monotonic()
            if any(fork.code() == killed for fork in forks) or (sent is not None and now - sent > GRACE):
                return False
            if after is not None and now - began > after:
                after, sent = None, now
                if number == signal.SIGKILL:
                    return False
                for fork in forks:
                    with suppress(ProcessLookupError):
                        os.kill(fork.process, number)
            if now - began > LIMIT:
                raise TimeoutError("".join(processes.last_words(fork) for fork in forks))
            time.sleep(0.002)
        return True

    def _fork(
        self,
        folder: Path,
        number: int,
        ranks: int,
        port: int,
        arguments: list[str],
        settings: Mapping[str, Any],
        kill: tuple[int, str],
        facts: dict[str, Any],
    ) -> processes.Rank:
        folder.mkdir()
        env = processes.environment(number, ranks, port)
        if ranks == 1:
            env = {name: value for name, value in env.items() if not name.startswith("PADDLE_")}
        given = [arguments, str(self.library), str(settings["output_dir"]), str(folder / "operations"), kill, facts]
        (folder / "arguments.json").write_text(json.dumps(given))
        fork = processes.Rank(number, folder)
        fork.start("reliability.one_run:command", env, server=self.server, imports=self.imports, place=folder)
        return fork

    def threads(self) -> int:
        """Threads of the process that is forked."""
        return len(os.listdir(f"/proc/{self.server.pid}/task"))


@contextmanager
def started(work: Path) -> Iterator[Runs]:
    """:class:`Runs` with their server. Skips the test where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here, which builds what counts operations on files")
    library = work / "operations.so"
    source = str(HERE / "operations.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(library), source], check=True)
    server = processes.Server()
    try:
        yield Runs(work, library, server)
    finally:
        server.stop()


def read(log: Path) -> list[Operation]:
    """What ``operations.c`` wrote down. Whoever is killed may leave half a line, of an operation that never was."""
    found = []
    for line in log.read_text().split("\n")[:-1] if log.exists() else ():
        number, at, kind, path, other, size = line.split("\t")
        found.append(Operation(int(number), int(at), kind, Path(path), Path(other) if other else None, int(size)))
    return found


def replayed(operations: Iterable[Operation], before: Iterable[Path]) -> dict[Path, None]:
    """The paths that there must be after ``operations`` of all processes: if they are what there is, none went past the
    count."""
    found = dict.fromkeys(before)
    for one in sorted(operations, key=lambda one: one.at):
        if one.kind in ("mkdir", "open", "open, emptied"):
            found[one.path] = None
        elif one.kind in ("unlink", "rmdir"):
            found.pop(one.path, None)
        elif one.kind == "rename" and one.other is not None:
            for path in [path for path in found if path == one.path or one.path in path.parents]:
                del found[path]
                found[one.other / path.relative_to(one.path)] = None
    return found

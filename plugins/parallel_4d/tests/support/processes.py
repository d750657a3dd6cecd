"""Runs a function in several processes as the ranks of one parallel job, on loopback, with ``groups`` installed.

``run_ranks(2, "module:function", argument, ...)`` gives one ``Result`` for each rank. The first rank that fails ends
the others and its error is raised, a timeout is raised with what every rank last printed and where it stood, and
whatever happens no process is left behind. The function must be importable from the tests' folder or from the caller's
``sys.path``; its arguments and what it returns go through JSON.

Ranks are forked from a server that has made the imports (``rank_main.py``), so that starting them takes milliseconds;
``fresh=True`` starts plain interpreters instead. The server calculates nothing: each rank finds Paddle as imported.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import rank_main

SUPPORT = Path(__file__).parent
MAIN = SUPPORT / "rank_main.py"
IMPORTS = [  # what the server imports
    "paddle.distributed.fleet",
    "sft.fine_tune",
    "sft.models.loading",
    "sft.training.loop",
    "sft_parallel_4d.strategy",
]
HOST = "127.0.0.1"
SHOWN = 6000  # characters of each rank's output in an error
RESULT = "RANK_RESULT"  # names a rank's own file of its outcome


@dataclass(frozen=True)
class Result:
    rank: int
    value: Any  # what the target returned
    output: str  # what the rank printed, both streams


class RankError(RuntimeError):
    """The rank that failed first: its number, and what it printed, its traceback last."""

    def __init__(self, rank: int, how: str, output: str) -> None:
        super().__init__(f"Rank {rank} {how}. Its output:\n{output[-SHOWN:]}")
        self.rank, self.output = rank, output


def run_ranks(
    count: int,
    target: str,
    *args: Any,
    timeout: float = 100.0,
    env: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> list[Result]:
    """Call ``target`` ("module:function") with ``args`` in ``count`` processes; one Result each, in order of ranks.

    ``env`` is added to each rank's environment; what is read at import, such as FLAGS_..., needs ``fresh``.
    Raises RankError with the error of the first rank that fails, and TimeoutError after ``timeout`` seconds.
    """
    if not fresh and (early := [name for name in env or () if name.startswith(("FLAGS_", "OMP_", "PYTHON"))]):
        raise ValueError(f"{', '.join(early)}: read at import, before ranks are forked. Pass fresh=True.")
    ranks: list[Rank] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, reserved_port() as port:
        (Path(folder) / "arguments.json").write_text(json.dumps(args))
        try:
            for number in range(count):
                rank = Rank(number, Path(folder))
                ranks.append(rank)
                rank.start(target, {**environment(number, count, port), **(env or {})}, fresh)
            return _results(ranks, target, timeout)
        finally:
            for rank in ranks:
                rank.kill()


def _results(ranks: list[Rank], target: str, timeout: float) -> list[Result]:
    deadline = time.monotonic() + timeout
    while not all(rank.ended() for rank in ranks):
        if any(rank.failed() for rank in ranks):
            break
        if time.monotonic() > deadline:
            raise TimeoutError(f"{target} took longer than {timeout:g} s.{''.join(map(last_words, ranks))}")
        time.sleep(0.005)
    # A rank writes its moment down before its end can reach the others, whoever is seen to end first.
    if failed := [rank for rank in ranks if "at" in rank.outcome() or rank.failed()]:
        first = min(failed, key=lambda rank: rank.outcome().get("at", time.monotonic()))
        while not first.ended():
            time.sleep(0.005)
        raise RankError(first.number, first.how_it_ended(), first.output())
    return [Result(rank.number, rank.outcome()["value"], rank.output()) for rank in ranks]


def die() -> NoReturn:
    """Kill this rank, which is then known as the one that failed first: the others fail since it is gone."""
    rank_main.write(os.environ[RESULT], json.dumps({"at": time.monotonic()}))
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process went on")


def last_words(rank: Rank) -> str:
    if rank.ended():
        return f"\n--- Rank {rank.number} has ended. Its output:\n{rank.output()[-SHOWN:]}"
    rank.show_stack()
    return f"\n--- Rank {rank.number} was running. Its output, and where it stood:\n{rank.output()[-SHOWN:]}"


def environment(number: int, count: int, port: int) -> dict[str, str]:
    """What a launcher would set for a rank, above this process's own environment."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PADDLE_", "MASTER_", "FLAGS_selected_", "CUDA_VISIBLE_DEVICES"))
    }
    endpoints = [f"{HOST}:{port + 1 + rank}" for rank in range(count)]  # names only: nothing listens there
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(module_path()),
        "OMP_NUM_THREADS": "1",
        "PADDLE_DISTRI_BACKEND": "gloo",
        "SFT_LAUNCH_TOKEN": "of the tests",  # without one a run says a line more
        "PADDLE_MASTER": f"{HOST}:{port}",
        "PADDLE_TRAINER_ID": str(number),
        "PADDLE_TRAINERS_NUM": str(count),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_CURRENT_ENDPOINT": endpoints[number],
    }


def launcher_environment() -> dict[str, str]:
    """For a subprocess such as ``python -m paddle.distributed.launch ... -m sft run``: its ranks use ``groups`` too."""
    path = [str(SUPPORT / "launched"), *module_path()]
    ranks_own = ("PADDLE_MASTER", "PADDLE_TRAINER", "PADDLE_CURRENT")  # the launcher sets these itself
    rest = {name: value for name, value in environment(0, 1, 0).items() if not name.startswith(ranks_own)}
    return {**rest, "PYTHONPATH": os.pathsep.join(path)}


def module_path() -> list[str]:
    """Where a rank finds modules: the support, the tests beside it, and all that the caller sees."""
    return list(dict.fromkeys([str(SUPPORT), str(SUPPORT.parent), *(entry or os.getcwd() for entry in sys.path)]))


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A free port below those that the system hands out; no other test of this machine gets it meanwhile."""
    candidates = list(range(20000, 32000, 16))  # the endpoints after it, too
    random.Random().shuffle(candidates)
    for port in candidates:
        with socket.socket(socket.AF_UNIX) as guard, socket.socket() as trial:
            try:
                guard.bind(f"\0sft-tests-port-{port}")  # an abstract name: free again when its holder dies
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind((HOST, port))
            except OSError:
                continue
            trial.close()
            yield port
            return
    raise RuntimeError("No free port between 20000 and 32000.")


class Rank:
    """A process that runs the target, in a session of its own, with its files in ``folder``."""

    process = 0

    def __init__(self, number: int, folder: Path) -> None:
        self.number = number
        self.arguments, self.result = folder / "arguments.json", folder / f"result-{number}.json"
        self.log, self.exit = folder / f"log-{number}", folder / f"exit-{number}"
        self.log.touch()

    def start(
        self,
        target: str,
        env: Mapping[str, str],
        fresh: bool = False,
        server: Server | None = None,
        imports: Sequence[str] = IMPORTS,
        place: Path | None = None,
    ) -> None:
        """Fork it from ``server``, or from that of all tests, to run in the folder ``place``."""
        self._server = server or _running_server()
        files = {name: str(getattr(self, name)) for name in ("arguments", "result", "log", "exit")}
        env = {**env, RESULT: files["result"]}
        job = {"target": target, "env": env, "fresh": fresh, "imports": [] if fresh else list(imports)}
        self.process = self._server.fork({**job, **files, "path": module_path(), "folder": str(place or os.getcwd())})

    def code(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        if self.exit.exists():
            return int(self.exit.read_text())
        return None if self._server.runs() else -signal.SIGKILL  # ranks die with their server

    def ended(self) -> bool:
        return self.code() is not None

    def outcome(self) -> dict[str, Any]:
        outcome: dict[str, Any] = json.loads(self.result.read_text()) if self.result.exists() else {}
        return outcome

    def failed(self) -> bool:
        return self.ended() and (self.code() != 0 or "value" not in self.outcome())

    def how_it_ended(self) -> str:
        code = self.code() or 0
        if "error" in self.outcome():
            return f"failed with {self.outcome()['error'].strip().splitlines()[-1]}"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code} and without a result"

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def show_stack(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGUSR1)
            time.sleep(0.2)

    def kill(self) -> None:
        """End the process and all that it started, and wait until it is gone."""
        while self.process:
            running = not self.ended()
            for kill in (os.killpg, os.kill) if running else (os.killpg,):
                with contextlib.suppress(ProcessLookupError):
                    kill(self.process, signal.SIGKILL)
            if not running:
                break
            time.sleep(0.002)


class Server:
    """The process from which ranks are forked."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the server)
        self._popen = subprocess.Popen(
            [sys.executable, str(MAIN)],
            env=environment(0, 1, 0),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def runs(self) -> bool:
        return self._popen.poll() is None

    def fork(self, job: Mapping[str, Any]) -> int:
        """The process id of a fork that does the job."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        try:
            self._popen.stdin.write(json.dumps(job) + "\n")
            self._popen.stdin.flush()
            return int(self._popen.stdout.readline())
        except (ValueError, OSError) as error:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace")
            raise RuntimeError(f"The server that forks ranks has died. Its errors:\n{said[-SHOWN:]}") from error
        except BaseException:  # stopped between question and answer: a fork may run that nobody knows
            self.stop()
            raise

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


_server: Server | None = None


def _running_server() -> Server:
    global _server
    if _server is None or not _server.runs():
        _server = Server()
        atexit.register(_server.stop)
    return _server


def free_ports(count: int) -> list[int]:
    """Of this machine, a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports

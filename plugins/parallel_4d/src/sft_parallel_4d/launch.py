"""``sft run --nproc N``: paddle's launcher, started for the user, with one output, one error, and nothing left behind.

The ranks share a temporary folder with the process that the user started: the settings, what rank 0 prints, the
launcher's logs, and, where a rank fails, what it died of.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sft
from sft import SftError, SignalError, UsageError
from sft_parallel_4d.deaths import Deaths, read
from sft_parallel_4d.door import TOKEN, new_token
from sft_parallel_4d.environment import FOLDER
from sft_parallel_4d.last_words import HIDDEN, MEMORY, STOPPED, read_record
from sft_parallel_4d.restarts import RESTARTS

PREFIX = "sft-launch-"
_NEW = 60.0
"""Seconds in which a folder that nobody holds may be one that has just been made."""
LAUNCHER_VARIABLES = (
    *("PADDLE_MASTER", "PADDLE_DEVICES", "PADDLE_NNODES", "PADDLE_RUN_MODE", "PADDLE_LOG_LEVEL", "PADDLE_LOG_DIR"),
    *("PADDLE_LOG_OVERWRITE", "PADDLE_NPROC_PER_NODE", "PADDLE_JOB_ID", "PADDLE_RANK", "PADDLE_MAX_RESTART"),
    *("PADDLE_ELASTIC_LEVEL", "PADDLE_IPS", "PADDLE_START_PORT", "PADDLE_TRAINER_ENDPOINTS"),
    *("DISTRIBUTED_TRAINER_ENDPOINTS", "PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM", "MASTER_ADDR", "MASTER_PORT"),
)
"""Paddle's launcher lets these override its arguments; they would be of another job."""


class LostError(SftError):
    """Ranks were killed: ``ranks``, on devices of which one has ``memory`` bytes (None: on CPUs, or not known)."""

    def __init__(self, text: str, ranks: tuple[int, ...], memory: int | None = None) -> None:
        super().__init__(text)
        self.ranks, self.memory = ranks, memory


def launch(
    values: Mapping[str, Any],
    nproc: int,
    say: Callable[[str], None],
    devices: Sequence[str] = (),
    restarts: Sequence[Mapping[str, Any]] = (),
) -> int:
    """Run ``sft run`` with settings ``values`` (without those of the launch) in ``nproc`` processes of this machine; 0.
    ``devices`` are the GPUs for them, by number (empty: the first ones); ``restarts`` is what the run is to remember of
    earlier launches.

    ``say`` gets each line that rank 0 prints, when it prints it; its standard error goes to that of this process.
    Raises :class:`sft.SftError` with the error of the rank that failed first, and its exit code; :class:`LostError`
    where ranks were killed. A signal that asks this process to end is passed on to the ranks, which know what to finish
    first, and :class:`sft.SignalError` is raised when they have ended. At a second one, or when this process ends in
    any other way, all ranks end.
    """
    settings = {name: value for name, value in values.items() if name not in ("nproc", "max_restarts")}
    files = {"settings.json": json.dumps(settings, default=str), RESTARTS: json.dumps(restarts)}
    return start(["sft", "run", "settings.json"], nproc, say, files, values.get("device") == "cpu", devices)


def start(
    command: list[str],
    nproc: int,
    say: Callable[[str], None],
    files: Mapping[str, str] | None = None,
    on_cpu: bool = False,
    devices: Sequence[str] = (),
) -> int:
    """:func:`launch` for ``python -m COMMAND``; an argument that is one of ``files`` is replaced by its path. With
    ``on_cpu`` the ranks see no GPU."""
    if FOLDER in os.environ or int(os.environ.get("PADDLE_TRAINERS_NUM") or 1) > 1:
        raise UsageError("nproc: this is already one of several processes; leave nproc to one of them, the launcher.")
    files, ended_before = files or {}, _ended_for_memory()
    with _own_folder() as folder:
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
        command = [str(folder / argument) if argument in files else argument for argument in command]
        entry = str(Path(__file__).with_name("rank.py"))
        launcher = [sys.executable, "-u", entry, "paddle.distributed.launch", "--nproc_per_node", str(nproc)]
        launcher += ["--max_restart", "0", "--log_dir", str(folder / "logs"), "--enable_gpu_log", "0", entry, *command]
        (folder / "stdout").touch()
        with (folder / "launcher.log").open("wb") as log:
            process = subprocess.Popen(
                launcher,
                env=_environment(folder, nproc, on_cpu, devices),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for this process, which passes it on
            )
        deaths = Deaths(folder)
        try:
            with _passed_on(folder) as passed:
                _follow(process, folder, say, deaths)
        finally:
            _end(process, folder)
        if process.returncode == 0:
            return 0
        records = [read_record(path) for path in folder.glob("*.error")]
        if passed and all(record["relayed"] or record["code"] == 128 + passed[0] for record in records):
            raise SignalError(passed[0], read(folder / STOPPED))
        error = _first_error(folder, records, process.returncode, _ended_for_memory() - ended_before)
        lost = _lost(folder, records, deaths)
        if lost and not passed:
            raise LostError(str(error), lost, int(read(folder / MEMORY) or 0) or None)
        raise error


def _lost(folder: Path, records: Sequence[dict[str, Any]], deaths: Deaths) -> tuple[int, ...]:
    """The ranks that the system has ended. Before anybody ends the ranks nobody but the system kills one, whatever the
    others then say. Of another death that may be a consequence: who says first what is wrong has not died."""
    is_said = any(record["sure"] and not record["relayed"] for record in records)
    lost, seen = deaths.killed or (() if is_said else deaths.lost), _failed_container(folder)
    if not lost and seen is not None and (seen[1] == -signal.SIGKILL or (seen[1] < 0 and not is_said)):
        return (seen[0],)  # paddle's launcher was there before the next look
    if not lost and not is_said:  # a busy machine looks too late: who serves the ranks has seen it all the same
        return tuple(sorted({rank for record in records for rank in record["gone"]}))
    return lost


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """A temporary folder into which only the user may look. Those of launches that were killed go first."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), _held(left):
            about = left.stat()
            is_old = time.time() - about.st_mtime > _NEW  # a new one may not be held yet
            if is_old and about.st_uid == os.getuid() and not _started_from(left):
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # where nothing can be held nothing is removed either
            held.enter_context(_held(Path(name)))
        yield Path(name)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold ``folder`` as long as this process lives and the block lasts; :class:`OSError` where another one does."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _environment(folder: Path, nproc: int, on_cpu: bool, devices: Sequence[str]) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environ[FOLDER] = str(folder)
    environ[TOKEN] = new_token()
    environ.setdefault("PORT_RANGE", "20000:32000")  # below those that systems give to any connection
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environ.setdefault("GLOG_minloglevel", "1")  # paddle's notes on which socket it has connected
    environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))  # each rank would take them all
    if on_cpu or environ.get("CUDA_VISIBLE_DEVICES") == "":
        # The launcher would give each rank one of the GPUs that it finds, or fail for want of them; an empty variable
        # is one GPU to it. So it gets as many as it wants, and each rank hides them before paddle is imported.
        environ |= {HIDDEN: "1", "PADDLE_DISTRI_BACKEND": "gloo"}
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(nproc)))
    elif devices:
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return environ


@contextlib.contextmanager
def _passed_on(folder: Path) -> Iterator[list[int]]:
    """Within it the first signal that asks this process to end goes on to its ranks, and into the list; the next one
    is raised as :class:`sft.SignalError`."""
    passed: list[int] = []

    def hear(number: int, frame: Any) -> None:
        ranks = [int(path.suffix[1:]) for path in folder.glob("rank.*")]
        if passed or not ranks:
            raise SignalError(number)
        passed.append(number)
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    if threading.current_thread() is not threading.main_thread():
        yield passed
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, hear)
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Tail:
    """What is appended to a file."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._rest = path, 0, b""

    def lines(self, all_of_it: bool = False) -> list[str]:
        """The lines that are new and complete; with ``all_of_it``, an incomplete last one too."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        if all_of_it and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        return [line.decode("utf-8", "replace") for line in lines]


def _follow(process: subprocess.Popen[bytes], folder: Path, say: Callable[[str], None], deaths: Deaths) -> None:
    """Pass on what rank 0 prints until the launcher ends, or until some seconds after a rank's error."""
    output, errors = _Tail(folder / "stdout"), _Tail(folder / "logs" / "workerlog.0")
    deadline, sure = None, False
    while True:
        ended = process.poll() is not None
        deaths.look()
        if not sure and (records := list(folder.glob("*.error"))):
            sure = any(read_record(path)["sure"] for path in records)
            deadline = time.monotonic() + 2 if sure else deadline or time.monotonic() + 10
        for line in output.lines(ended):
            say(line)
        # In an error's case these are its consequences; in a signal's, what this process is going to say itself.
        if deadline is None and not (ended and process.returncode) and not (folder / STOPPED).exists():
            for line in errors.lines(ended):
                print(sft.safe(line), file=sys.stderr, flush=True)
        if ended or (deadline is not None and time.monotonic() > deadline):
            return
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End the launcher and whatever it has started. A second Ctrl-C waits until that is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.terminate()
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        while left := _started_from(folder):
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.02)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _started_from(folder: Path) -> list[int]:
    """Processes that have inherited this launch's folder in their environment (Linux; elsewhere none is found)."""
    mark = f"{FOLDER}={folder}\0".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has ended, or is another user's
            pass
    return found


def _ended_for_memory() -> int:
    """How many processes Linux has ended since it started because memory was short."""
    found = re.search(r"^oom_kill (\d+)$", read(Path("/proc/vmstat")), re.MULTILINE)
    return int(found[1]) if found else 0


def _failed_container(folder: Path) -> tuple[int, int] | None:
    """The rank that paddle's launcher saw first to have failed, before it ended the others, and its exit code: below
    zero the signal that ended it."""
    seen = re.search(r"Container rank (\d+) status failed .* code (-?\d+) log", read(folder / "launcher.log"))
    return None if seen is None else (int(seen[1]), int(seen[2]))


def _first_error(folder: Path, records: Sequence[dict[str, Any]], code: int, ended_for_memory: int) -> SftError:
    """What the rank that failed first died of, as the ranks wrote it down; else as the launcher saw it."""
    seen = _failed_container(folder)
    killed = seen is not None and seen[1] < 0
    if any(record["sure"] for record in records) or (records and not killed):
        text = min(records, key=lambda record: (not record["sure"], record["at"]))["text"]
        # The rank itself knows more about it than those who were told.
        first = next(
            record for record in sorted(records, key=lambda record: record["relayed"]) if record["text"] == text
        )
        if first["details"]:
            print(sft.safe(first["details"]), end="", file=sys.stderr, flush=True)
        return _error(text, first["code"])
    if seen is None:
        return _error(f"Paddle's launcher ended with exit code {code}.{_last(folder / 'launcher.log')}", 1)
    rank, status = seen
    log = folder / "logs" / f"workerlog.{rank}"
    said = re.findall(r"^sft: (.*)$", read(log), re.MULTILINE)
    if said and not killed:
        return _error(f"rank {rank}: {said[-1]}", status)
    how = f"was killed by signal {-status}" if killed else f"ended with exit code {status}"
    if status == -signal.SIGKILL and ended_for_memory:
        how += ", as the system does where memory is short; sft plan says what would fit"
    return _error(f"rank {rank} {how}.{_last(log)}", 1)


def _error(text: str, code: int) -> SftError:
    error = sft.UsageError(text) if code == UsageError.exit_code else SftError(text)
    error.exit_code = code
    return error


def _last(log: Path) -> str:
    lines = [line for line in read(log).splitlines() if line.strip()][-5:]
    return " The last lines of its log:\n" + "\n".join(lines) if lines else ""

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
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sft
from sft import SftError, SignalError, UsageError
from sft_parallel_4d.door import TOKEN, new_token
from sft_parallel_4d.environment import FOLDER
from sft_parallel_4d.watch import OtherRankError, Watch

INTERRUPTED = "interrupted"
"""What other ranks hear of one that a signal has ended."""
STOPPED = "stopped"
"""The file in a launch's folder in which its ranks say after what a signal has ended them."""
HIDDEN = "SFT_LAUNCH_HIDES_GPUS"
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


def launch(values: Mapping[str, Any], nproc: int, say: Callable[[str], None]) -> int:
    """Run ``sft run`` with settings ``values`` (without ``nproc``) in ``nproc`` processes of this machine; 0.

    ``say`` gets each line that rank 0 prints, when it prints it; its standard error goes to that of this process.
    Raises :class:`sft.SftError` with the error of the rank that failed first, and its exit code. A signal that asks
    this process to end is passed on to the ranks, which know what to finish first, and :class:`sft.SignalError` is
    raised when they have ended. At a second one, or when this process ends in any other way, all ranks end.
    """
    settings = {name: value for name, value in values.items() if name != "nproc"}
    files = {"settings.json": json.dumps(settings, default=str)}
    return start(["sft", "run", "settings.json"], nproc, say, files, on_cpu=values.get("device") == "cpu")


def start(
    command: list[str],
    nproc: int,
    say: Callable[[str], None],
    files: Mapping[str, str] | None = None,
    on_cpu: bool = False,
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
                env=_environment(folder, nproc, on_cpu),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for this process, which passes it on
            )
        try:
            with _passed_on(folder) as passed:
                _follow(process, folder, say)
        finally:
            _end(process, folder)
        if process.returncode == 0:
            return 0
        records = [_read_record(path) for path in folder.glob("*.error")]
        if passed and all(record["relayed"] or record["code"] == 128 + passed[0] for record in records):
            raise SignalError(passed[0], _read(folder / STOPPED))
        raise _first_error(folder, process.returncode, _ended_for_memory() - ended_before)


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


def failed(error: BaseException, rank: int, watch: Watch | None = None) -> None:
    """Let the other ranks, and the process that started them, know what ends this one."""
    told = watch is not None and not isinstance(error, OtherRankError)
    record(error, sure=not told)
    if watch is not None and told:
        watch.fail(_sentence(error))  # does not return if the error is a consequence
        record(error)


def report(text: str) -> None:
    """Tell the user what has gone wrong in some rank; this one ends because of it. For :class:`Watch`."""
    if FOLDER in os.environ:
        _write_record(text, 1, relayed=True)
    else:
        print(f"sft: {sft.safe(text)}", file=sys.stderr, flush=True)


def stopped(moment: str) -> None:
    """All ranks end, as a signal has asked, after ``moment``: the process that started them says so."""
    if FOLDER in os.environ and os.environ["PADDLE_TRAINER_ID"] == "0":
        (Path(os.environ[FOLDER]) / STOPPED).write_text(moment, encoding="utf-8")


def enter_rank() -> None:
    """At the start of a rank: what rank 0 prints is kept apart from what goes to its standard error, and signals find
    the rank."""
    (Path(os.environ[FOLDER]) / f"rank.{os.getpid()}").touch()
    if HIDDEN in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.pop("FLAGS_selected_gpus", None)
    if os.environ["PADDLE_TRAINER_ID"] == "0":
        with open(Path(os.environ[FOLDER]) / "stdout", "ab") as file:
            os.dup2(file.fileno(), 1)


def record(error: BaseException, sure: bool = True) -> None:
    """Write down what ends this rank where the process that started it looks, if one did.

    Not ``sure``: it may be the consequence of what happened to another rank. What is sure stays.
    """
    if FOLDER not in os.environ or (_record_path().exists() and _read_record(_record_path())["sure"]):
        return
    rank = os.environ["PADDLE_TRAINER_ID"]
    text = str(error) if isinstance(error, OtherRankError) else f"rank {rank}: {_sentence(error)}"
    code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
    expected = isinstance(error, (SftError, OSError, KeyboardInterrupt))
    details = "" if expected else "".join(traceback.format_exception(error))
    if isinstance(error, sft.PluginError):
        details = error.details()
    _write_record(text, code, details, sure, relayed=isinstance(error, OtherRankError))


def _write_record(text: str, code: int, details: str = "", sure: bool = True, relayed: bool = False) -> None:
    values = {"text": text, "code": code, "details": details, "sure": sure, "relayed": relayed, "at": time.monotonic()}
    path = _record_path()
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(values), encoding="utf-8")
    draft.replace(path)


def _read_record(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _record_path() -> Path:
    return Path(os.environ[FOLDER]) / f"rank{os.environ['PADDLE_TRAINER_ID']}.error"


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return str(error) if isinstance(error, (SftError, OSError)) else f"{type(error).__name__}: {error}"


def _environment(folder: Path, nproc: int, on_cpu: bool) -> dict[str, str]:
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


def _follow(process: subprocess.Popen[bytes], folder: Path, say: Callable[[str], None]) -> None:
    """Pass on what rank 0 prints until the launcher ends, or until some seconds after a rank's error."""
    output, errors = _Tail(folder / "stdout"), _Tail(folder / "logs" / "workerlog.0")
    deadline, sure = None, False
    while True:
        ended = process.poll() is not None
        if not sure and (records := list(folder.glob("*.error"))):
            sure = any(_read_record(path)["sure"] for path in records)
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
    found = re.search(r"^oom_kill (\d+)$", _read(Path("/proc/vmstat")), re.MULTILINE)
    return int(found[1]) if found else 0


def _first_error(folder: Path, code: int, ended_for_memory: int) -> SftError:
    """What the rank that failed first died of, as the ranks wrote it down; else as the launcher saw it."""
    records = [_read_record(path) for path in folder.glob("*.error")]
    seen = re.search(r"Container rank (\d+) status failed .* code (-?\d+) log", _read(folder / "launcher.log"))
    killed = seen is not None and int(seen[2]) < 0
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
    rank, status = int(seen[1]), int(seen[2])
    log = folder / "logs" / f"workerlog.{rank}"
    said = re.findall(r"^sft: (.*)$", _read(log), re.MULTILINE)
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


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _last(log: Path) -> str:
    lines = [line for line in _read(log).splitlines() if line.strip()][-5:]
    return " The last lines of its log:\n" + "\n".join(lines) if lines else ""

"""A process that has imported all that a run needs, and forks a child for each command that is typed.

Importing takes seconds, and the child of a process that has computed nothing has its own state, limits of memory and
time, and permissions. Requests and answers are lines of JSON. Run as a program, this file is that process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY = 3 << 30
"""Bytes of address space that a command may add."""


@dataclass
class Typed:
    """What became of a command: ``code`` is negative where a signal ended it, None where it had to be stopped."""

    code: int | None
    out: str
    err: str
    seconds: float
    mebibytes: int


class Server:
    """The process, as a test sees it."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def type(
        self,
        folder: Path,
        command: list[str],
        stdin: bytes = b"",
        seconds: float = 60.0,
        privileged: bool = True,
        site: str = "",
        flushes: bool = False,
    ) -> Typed:
        """Type ``sft ...`` in ``folder``; it is stopped after ``seconds``. Without privileges even root meets closed
        doors. One that ``flushes`` takes denormals as zero from the beginning, as after a run in the same process."""
        request = [str(folder), command, stdin.decode("latin-1"), seconds, privileged, site, flushes]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Typed(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


# --- in that process ----------------------------------------------------------------------------------------


def _serve() -> None:
    del sys.path[0]  # this folder, whose tables are called like other people's packages
    import paddle  # noqa: F401

    import sft.fine_tune
    import sft.models.setup
    import sft.training.loop  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_answer(*json.loads(line))), flush=True)


def _answer(
    folder: str, command: list[str], stdin: str, seconds: float, privileged: bool, site: str, flushes: bool
) -> list[Any]:
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin.encode("latin-1"))
        given.seek(0)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            for target, file in enumerate((given, out, err)):
                os.dup2(file.fileno(), target)
            _child(folder, command, privileged, site, flushes)
        status, used = _waited(child, seconds)
        took = time.monotonic() - began
        for file in (out, err):
            file.seek(0)
        code = None if status is None else os.waitstatus_to_exitcode(status)
        texts = [file.read().decode("utf-8", "backslashreplace") for file in (out, err)]
        return [code, *texts, took, used >> 10]


def _waited(child: int, seconds: float) -> tuple[int | None, int]:
    """The status of the child, None if it had to be stopped, and its greatest memory in KiB."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            return status, used.ru_maxrss
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    return None, os.wait4(child, 0)[2].ru_maxrss


def _child(folder: str, command: list[str], privileged: bool, site: str, flushes: bool) -> None:
    code = 70
    try:
        import resource

        from sft.commands.cli import main
        from sft.runtime import flush_denormals

        os.setsid()
        os.chdir(folder)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        if not privileged:
            _give_up_privileges()
        if flushes:
            flush_denormals()
        if site:
            sys.path.insert(0, str(Path(folder) / site))
        sys.argv = ["sft", *command]
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _give_up_privileges() -> None:
    """Files without permission are closed to root too, who owns them here."""
    import ctypes

    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())


if __name__ == "__main__":
    _serve()

"""Runs the ranks of parallel tests. ``python rank_main.py`` is their server, ``python rank_main.py JOB`` is one rank.

The server forks a rank for each line of JSON that it reads, answers with its process id, and writes its exit code into
a file when it has ended. It makes the imports that take seconds once, before the first rank that wants them made; a
"fresh" rank is a new interpreter instead. When its input ends, because the caller stopped or died, it kills all ranks.

A rank calls its target, "module:function", with the arguments in one JSON file, and writes another: {"value": what the
target returned} or {"error": the traceback, "at": when, by the machine's monotonic clock}. A rank that kills itself
(``processes.die``) has "at" alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

PARENT_DIED = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the imports print is no answer
    running: dict[int, str] = {}  # process id -> the file for its exit code
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], 0.005 if running else None)
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                write(running.pop(process), str(os.waitstatus_to_exitcode(status)))
        if not ready:
            continue
        line = sys.stdin.readline()  # the caller writes the next one after this one's answer
        if not line:
            break
        job = json.loads(line)
        if job["imports"]:
            prepare()
        for module in job["imports"]:
            importlib.import_module(module)
        process = os.fork()
        if not process:
            answers.close()
            become_rank(job)
        running[process] = job["exit"]
        print(process, file=answers, flush=True)
    for process in running:
        for kill in (os.killpg, os.kill):  # the second in case it is not yet the head of its group
            with contextlib.suppress(ProcessLookupError):
                kill(process, signal.SIGKILL)


def become_rank(job: Mapping[str, Any]) -> NoReturn:
    """In a fork: take on the rank's surroundings, and run it."""
    ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the other signals; the target may hear it
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, source in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(source, stream)
    os.chdir(job["folder"])
    if job["fresh"]:
        os.execve(sys.executable, [sys.executable, __file__, json.dumps(job)], job["env"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.path[:] = job["path"]
    parallel: Any = sys.modules.get("paddle.distributed.parallel")
    if parallel:
        parallel._global_parallel_env = None  # an import may have asked for the world's size
    # All forks would draw the same numbers, which could hide that ranks draw their own.
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if paddle := sys.modules.get("paddle"):
        paddle.seed(int.from_bytes(os.urandom(4), "little"))
    run_rank(job)


def run_rank(job: Mapping[str, Any]) -> NoReturn:
    """Call the target and end the process. Nothing is cleaned up at exit: Paddle can abort there."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # how the caller asks where a rank stands
    code = 1
    try:
        prepare()
        import groups

        groups.install()
        module, _, function = job["target"].partition(":")
        arguments = json.loads(Path(job["arguments"]).read_text())
        value = getattr(importlib.import_module(module), function)(*arguments)
        write(job["result"], json.dumps({"value": value}))
        code = 0
    except BaseException:
        at = time.monotonic()
        traceback.print_exc()
        write(job["result"], json.dumps({"error": traceback.format_exc(), "at": at}))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def prepare() -> None:
    """Import Paddle as a run of sft does: the same flags in all processes whose numbers are compared."""
    importlib.import_module("sft.runtime").prepare()


def write(path: str, text: str) -> None:
    """Make the file in one step: who finds it finds all of it."""
    part = Path(f"{path}.part")
    part.write_text(text)
    part.rename(path)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_rank(json.loads(sys.argv[1]))
    serve()

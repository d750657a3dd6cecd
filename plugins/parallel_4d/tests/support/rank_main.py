"""What a rank of a parallel test runs: ``python rank_main.py TARGET ARGUMENTS RESULT``, or many, forked by a server.

TARGET is "module:function". ARGUMENTS is a JSON file with the list of its arguments; into the JSON file RESULT goes
{"value": what it returned} or {"error": the traceback, "at": when, by the machine's monotonic clock}.

``python rank_main.py --serve MODULE...`` imports the modules, then forks a rank for each line of JSON that it reads,
answers with its process id, and writes its exit code to a file when it ends. The imports, seconds for each process,
are made once. At the end of its input it kills what it forked.
"""

from __future__ import annotations

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


def run(target: str, arguments: str, result: str) -> NoReturn:
    """Call the target and end the process. No cleaning up at exit: gloo can abort there."""
    ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # the caller asks where a rank stands
    code = 1
    try:
        import groups

        groups.install()
        module, _, function = target.partition(":")
        value = getattr(importlib.import_module(module), function)(*json.loads(Path(arguments).read_text()))
        write(result, json.dumps({"value": value}))
        code = 0
    except BaseException:
        traceback.print_exc()
        write(result, json.dumps({"error": traceback.format_exc(), "at": time.monotonic()}))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def write(path: str, text: str) -> None:
    """Make the file in one step: who finds it finds all of it."""
    part = Path(f"{path}.part")
    part.write_text(text)
    part.rename(path)


def serve(modules: list[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the imports print is no answer
    for name in modules:
        importlib.import_module(name)
    running: dict[int, str] = {}  # process id -> the file for its exit code
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], 0.005 if running else None)
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                write(running.pop(process), str(os.waitstatus_to_exitcode(status)))
        if ready:
            line = sys.stdin.readline()  # one at a time: the next is written when this one is answered
            if not line:
                break
            job = json.loads(line)
            process = os.fork()
            if not process:
                answers.close()
                become(job)
            running[process] = job["exit"]
            print(process, file=answers, flush=True)
    for process in running:
        os.kill(process, signal.SIGKILL)


def become(job: Mapping[str, Any]) -> NoReturn:
    """In a fork: be what a process started with the job's surroundings would be, and run its target."""
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, source in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(source, stream)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["folder"])
    sys.path[:] = job["path"]
    # All forks would draw the same numbers, which could hide that ranks draw their own.
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "paddle" in sys.modules:
        sys.modules["paddle"].seed(int.from_bytes(os.urandom(4), "little"))
    run(job["target"], job["arguments"], job["result"])


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2:])
    else:
        run(*sys.argv[1:])

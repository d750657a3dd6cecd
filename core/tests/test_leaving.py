"""How the command line's process ends, alone and as one of many."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit, ctypes, sys, threading, time
from pathlib import Path

out = Path(sys.argv.pop(1))
libc = ctypes.CDLL(None)
libc.strdup.restype = ctypes.c_void_p
assert libc.__cxa_atexit(libc.puts, ctypes.c_void_p(libc.strdup(b"library")), None) == 0
atexit.register(lambda: (out / "python").touch())
threading.Thread(target=lambda: (time.sleep(0.5), (out / "thread").touch())).start()

from sft.commands.cli import main

print("not flushed yet")
main()
"""


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["nonsense"], 2)])
@pytest.mark.parametrize("count", ["1", "2"])
def test_one_of_many_leaves_without_the_exit_handlers_of_libraries(
    tmp_path: Path, count: str, arguments: list[str], code: int
) -> None:
    """Paddle's store now and then aborts in them. All that Python does at an exit is done, and the code is the same."""
    line = [sys.executable, "-c", PROGRAM, str(tmp_path), *arguments]
    environ = {**os.environ, "PADDLE_TRAINERS_NUM": count}
    done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stdout.startswith("not flushed yet\n")
    assert ("There is no command" in done.stderr) == bool(code)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"python", "thread"}
    assert ("library" in done.stdout) == (count == "1")


HELD = """
import os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

out = Path(sys.argv[1])
pool = ThreadPoolExecutor(2)
pool.submit(print, "in the pool").result()
text, binary = (out / "text").open("w"), (out / "binary").open("wb")
text.write("held")
binary.write(b"held")
reader, full = os.pipe()
os.set_blocking(full, False)
try:
    while True:
        os.write(full, bytes(4096))
except BlockingIOError:
    os.set_blocking(full, True)
pipe = os.fdopen(full, "wb")
if sys.argv[2] != "read":
    pipe.write(b"held")

from sft import runtime

runtime._FLUSHING = 2.0
if sys.argv[2] == "Ctrl-C":
    runtime._FLUSHING = 60.0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=lambda: (time.sleep(0.5), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
runtime.leave(3)
"""


@pytest.mark.parametrize("case", ["read", "unread", "Ctrl-C"])
def test_leaving_ends_idle_pools_and_writes_what_open_files_hold(tmp_path: Path, case: str) -> None:
    """As the interpreter does; and a pipe that nobody reads does not hold the process for ever, nor against Ctrl-C."""
    line = [sys.executable, "-c", HELD, str(tmp_path), case]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (3, "in the pool\n", "")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"text": "held", "binary": "held"}

"""What deaths.py and launch.py read in the log of paddle's launcher, which says it to people: a rank really ends, and
the words are paddle's own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sft_parallel_4d.deaths import Deaths
from sft_parallel_4d.launch import _environment, _failed_container

SCRIPT = """
import os, shutil, signal, sys, time
from pathlib import Path

folder, rank = Path(sys.argv[1]), os.environ["PADDLE_TRAINER_ID"]

def end(number, frame):
    shutil.copy(folder / "launcher.log", folder / "log as rank 0 was ended")
    sys.exit(1)

signal.signal(signal.SIGTERM, end)
(folder / f"rank.{os.getpid()}").write_text(rank)  # as last_words.enter_rank does
if rank == "1":
    while len(list(folder.glob("rank.*"))) < 2:
        time.sleep(0.01)
    DEED
time.sleep(60)
"""


def changed(what: str) -> str:
    return f"paddle's launcher {what}: sft_parallel_4d/deaths.py and launch.py read that in its log (paddle 3.3)."


@pytest.mark.parametrize(
    ("deed", "code"), [("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL), ("os._exit(3)", 3)], ids=str
)
def test_what_the_launcher_says_of_a_rank_that_ends(tmp_path: Path, deed: str, code: int) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.replace("DEED", deed))
    launcher = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--max_restart", "0"]
    launcher += ["--log_dir", str(tmp_path / "logs"), "--enable_gpu_log", "0"]
    log = tmp_path / "launcher.log"
    with log.open("wb") as file:
        command = [*launcher, str(tmp_path / "script.py"), str(tmp_path)]
        environment = _environment(tmp_path, 2, True, ())
        done = subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=60)
    said = log.read_text()
    assert done.returncode != 0, changed(f"does not fail with its ranks; it said\n{said}")
    assert _failed_container(tmp_path) == (1, code), changed(f"names a rank that failed otherwise; it said\n{said}")
    assert {path.name for path in (tmp_path / "logs").glob("workerlog.*")} == {"workerlog.0", "workerlog.1"}, changed(
        "writes what ranks print elsewhere"
    )

    # Both are gone, rank 0 by the launcher's hand: with its log nobody is lost, without it both would be.
    (tmp_path / "log as rank 0 was ended").replace(log)
    assert lost(tmp_path) == (), changed(
        "ends the other ranks before it has said 'Pod failed'; until then it said\n" + log.read_text()
    )
    log.unlink()
    assert lost(tmp_path) == (0, 1)


def lost(folder: Path) -> tuple[int, ...]:
    deaths = Deaths(folder)
    deaths.look()
    return deaths.lost

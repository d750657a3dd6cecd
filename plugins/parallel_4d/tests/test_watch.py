"""No run hangs: ranks as real processes, without a model and without paddle."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import free_ports

from sft_parallel_4d.environment import FOLDER
from sft_parallel_4d.last_words import read_record
from sft_parallel_4d.watch import meeting_place

RANK = """
import math, os, signal, sys, threading, time
from pathlib import Path
from sft_parallel_4d import last_words
from sft_parallel_4d.watch import Watch, OtherRankError

rank, world, timeout, deed = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
folder = Path(__file__).parent  # a busy machine starts its processes one long after the other
(folder / f"started.{rank}").touch()
while len(started := list(folder.glob("started.*"))) < int(os.environ["COMING"]):
    time.sleep(0.01)
began = max(path.stat().st_mtime for path in started)
watch = Watch(rank, world, timeout, last_words.report)
if deed == "killed early":
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGKILL)).start()
try:
    watch.start()
    for step in (1, 2):
        watch.enter(f"step {step}")
        time.sleep(0.1)
        watch.leave()
    if deed == "done":
        watch.stop()
        print("done")
    elif deed == "raise":
        raise ValueError("boom")
    elif deed == "consequence":  # what gloo says where the other side of a connection has gone
        watch.enter("step 3")
        time.sleep(began + 1.9 - time.time())
        raise RuntimeError("connection closed by peer")
    elif deed == "sleep":
        time.sleep(100)
    elif deed == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif deed == "killed":
        watch.enter("step 3")
        time.sleep(began + 2.0 - time.time())
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed in ("meets", "late"):
        time.sleep(0.8 if deed == "late" else 0)
        watch.enter("step 3")
        entered = time.time()
        watch.meet()
        print(entered, time.time())
        watch.leave()
        watch.stop()
    elif deed.startswith("brings"):
        watch.enter("step 3")
        print(watch.meet([0.1 + rank, 1e16 if rank else 1.0, -1e300], deed.partition(" ")[2] or "sum"))
        watch.enter("step 4")
        print(watch.meet([rank - 7, math.inf, 0.1 * rank], "largest"))
        watch.leave()
        watch.stop()
    elif deed == "stopped at once":  # by a signal whose handler raises, while it waits for the others
        def stop(*_):
            raise KeyboardInterrupt("stopped")
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 0.6)
        watch.enter("step 3")
        try:
            watch.meet([1.0])
        except KeyboardInterrupt as error:
            last_words.failed(error, rank, watch)
            print("has told the others", file=sys.stderr)
            os._exit(3)
    elif deed == "wait":
        watch.enter("step 3")
        time.sleep(100)
except Exception as error:
    last_words.failed(error, rank, watch)
    print("own:", error, file=sys.stderr)
    sys.exit(3)
"""

Ranks = Callable[..., tuple[list[int], list[str]]]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    """Runs a rank for each deed (None: it never comes); exit codes, and what each wrote to both outputs."""
    processes: list[subprocess.Popen[str]] = []
    script = tmp_path / "rank.py"
    script.write_text(RANK)

    def run(*deeds: str | None, timeout: float = 1.2, within: float = 30) -> tuple[list[int], list[str]]:
        world = len(deeds)
        ports = free_ports(world + 1)
        environ = {
            **os.environ,
            "COMING": str(len(deeds) - deeds.count(None)),
            "PADDLE_MASTER": f"127.0.0.1:{ports[0]}",
            "PADDLE_TRAINER_ENDPOINTS": ",".join(f"127.0.0.1:{port}" for port in ports[1:]),
        }
        for rank, deed in enumerate(deeds):
            if deed is not None:
                environ["PADDLE_TRAINER_ID"] = str(rank)
                command = [sys.executable, str(script), str(rank), str(world), str(timeout), deed]
                processes.append(
                    subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                )
        deadline = time.monotonic() + within
        ending = [p for p, deed in zip(processes, filter(None, deeds), strict=True) if deed != "stopped"]
        outputs = [process.communicate(timeout=deadline - time.monotonic())[0] for process in ending]
        return [process.returncode for process in ending], outputs

    yield run
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_ranks_that_end_well_end_together(ranks: Ranks) -> None:
    assert ranks("done", "done", "done") == ([0, 0, 0], ["done\n"] * 3)


def test_ranks_meet_where_a_phase_begins(ranks: Ranks) -> None:
    """None goes on before the last one has entered it."""
    codes, outputs = ranks("meets", "late", "meets", timeout=60)
    assert codes == [0, 0, 0]
    entered, met = zip(*(map(float, output.split()) for output in outputs), strict=True)
    assert max(entered) - min(entered) > 0.3
    assert min(met) >= max(entered)


def test_hosts_tell_each_other_numbers(ranks: Ranks) -> None:
    """Summed as float64 in the order of ranks, whoever comes first: the same in all, to the last digit."""
    codes, outputs = ranks("brings", "brings", "brings", timeout=60)
    assert codes == [0, 0, 0]
    total = [
        sum(column) for column in zip(*([0.1 + rank, 1e16 if rank else 1.0, -1e300] for rank in range(3)), strict=True)
    ]
    assert outputs == [f"{total}\n{[-5.0, math.inf, 0.2]}\n"] * 3


def test_ranks_that_bring_other_things_end(ranks: Ranks) -> None:
    codes, outputs = ranks("brings", "brings largest", timeout=60)
    assert codes == [1, 1]
    assert outputs == ["sft: The ranks bring different numbers to 'step 3'; run one sft in all.\n"] * 2


def test_a_rank_that_a_signal_ends_while_it_waits_tells_the_others(ranks: Ranks) -> None:
    """It has not read the answer to its last question, and does not take it for that to its next one."""
    codes, outputs = ranks("wait", "stopped at once", timeout=60)
    assert codes == [1, 3]
    assert outputs[0].startswith("sft: rank 1: ")
    assert outputs[1].endswith("has told the others\n")
    assert "Traceback" not in outputs[1]


def test_ranks_that_meet_hear_of_one_that_does_not_come(ranks: Ranks) -> None:
    codes, outputs = ranks("meets", "meets", "raise", timeout=60)
    assert codes == [1, 1, 3]
    assert outputs == ["sft: rank 2: ValueError: boom\n"] * 2 + ["own: boom\n"]


def test_an_error_ends_the_others_with_it(ranks: Ranks) -> None:
    codes, outputs = ranks("wait", "wait", "raise", timeout=60)
    assert codes == [1, 1, 3]
    assert outputs == ["sft: rank 2: ValueError: boom\n"] * 2 + ["own: boom\n"]


def test_an_error_in_the_rank_that_serves_reaches_the_others(ranks: Ranks) -> None:
    codes, outputs = ranks("raise", "wait", "wait", timeout=60)
    assert codes == [3, 1, 1]
    assert outputs == ["own: boom\n"] + ["sft: rank 0: ValueError: boom\n"] * 2


def test_a_rank_that_was_killed_comes_before_what_followed_from_it(ranks: Ranks) -> None:
    """Even if what followed was heard of 0.1 s earlier."""
    codes, outputs = ranks("consequence", "wait", "killed", timeout=60)
    assert codes == [1, 1, -signal.SIGKILL]
    words = "sft: rank 2 ended without a word, last seen in 'step 3'; was it killed, or out of memory?\n"
    assert outputs == [words, words, ""]


@pytest.mark.parametrize("deeds", [("done", "sleep", "meets", "consequence", "killed"), ("wait", "killed early", None)])
def test_who_was_killed_is_written_down_whatever_the_others_do(
    ranks: Ranks, deeds: tuple[str | None, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a number, for the process that started them; it does not read the sentence."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    codes, _ = ranks(*deeds, timeout=60)
    killed = codes.index(-signal.SIGKILL)
    records = [read_record(tmp_path / f"rank{rank}.error") for rank in range(len(codes)) if rank != killed]
    assert [record["gone"] for record in records] == [[killed]] * (len(codes) - 1)


def test_the_serving_rank_is_killed(ranks: Ranks) -> None:
    codes, outputs = ranks("killed", "wait", "wait", timeout=60)
    assert codes == [-signal.SIGKILL, 1, 1]
    assert all(output.startswith("sft: rank 0 ended without a word") for output in outputs[1:])


def test_a_rank_that_works_for_ever_is_named(ranks: Ranks) -> None:
    codes, outputs = ranks("wait", "sleep", "wait")
    expected = "sft: rank 1 is missing: the others have waited 1.2 s in 'step 3'; rank 1 is after 'step 2'.\n"
    assert (codes, outputs) == ([1, 1, 1], [expected] * 3)


def test_a_rank_that_stands_still_is_named(ranks: Ranks) -> None:
    codes, outputs = ranks("wait", "wait", "stopped")
    assert codes == [1, 1]
    assert outputs[0] == outputs[1]
    named = (
        r"sft: rank 2 is missing: the others have waited 1.2 s in 'step 3'; rank 2 has been silent for \d+ s, last .*"
    )
    assert re.match(named, outputs[0]), outputs[0]


def test_ranks_that_wait_for_each_other(ranks: Ranks) -> None:
    codes, outputs = ranks("wait", "wait")
    expected = "sft: All ranks have waited 1.2 s in 'step 3' for each other; look at the network between them.\n"
    assert (codes, outputs) == ([1, 1], [expected] * 2)


def test_a_rank_that_ended_early_is_named(ranks: Ranks) -> None:
    codes, outputs = ranks("wait", "done")
    assert codes == [1, 0]
    assert outputs[0] == (
        "sft: rank 1 is missing: the others have waited 1.2 s in 'step 3'; rank 1 is in 'the end' and has ended.\n"
    )


def test_the_serving_rank_waits_for_those_who_are_not_done(ranks: Ranks) -> None:
    codes, outputs = ranks("done", "done", "sleep")
    expected = "rank 2 is missing: the others have waited 1.2 s in 'the end'; rank 2 is after 'step 2'.\n"
    assert (codes, outputs) == ([3, 0, 1], [f"own: {expected}", "done\n", f"sft: {expected}"])


@pytest.mark.parametrize("serves", [True, False])
def test_a_rank_that_never_comes_is_named(ranks: Ranks, serves: bool) -> None:
    if serves:
        codes, outputs = ranks(None, "done", "done")
        assert all(output.startswith("own: rank 0 is missing: nothing answers at 127.0.0.1:") for output in outputs)
    else:
        codes, outputs = ranks("done", "done", None, None)
        expected = "own: ranks 2, 3 are missing: the others have waited 1.2 s in 'the start'; "
        assert outputs == [expected + "rank 2 has never appeared, rank 3 has never appeared.\n"] * 2
    assert codes == [3, 3]


def test_where_the_ranks_meet() -> None:
    endpoints = "10.0.0.1:70,10.0.0.1:71,10.0.0.2:70"
    # Rank 0's port is free when paddle has an address of its own; else paddle's store takes it.
    environ = {"PADDLE_TRAINER_ENDPOINTS": endpoints}
    assert meeting_place({**environ, "PADDLE_MASTER": "10.0.0.1:99"}) == (0, "10.0.0.1", 70)
    assert meeting_place({**environ, "PADDLE_MASTER": "10.0.0.1:70"}) == (1, "10.0.0.1", 71)
    assert meeting_place(environ) == (1, "10.0.0.1", 71)

"""What a rank says of its end, for the others and for the process that started it; in the folder of the launch."""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sft
from sft import SftError
from sft_parallel_4d.environment import FOLDER
from sft_parallel_4d.watch import OtherRankError, Watch

INTERRUPTED = "interrupted"
"""What other ranks hear of one that a signal has ended."""
STOPPED = "stopped"
"""The file in a launch's folder in which its ranks say after what a signal has ended them."""
MEMORY = "memory"
"""The file with the memory of a GPU, in bytes, where the ranks compute on GPUs."""
HIDDEN = "SFT_LAUNCH_HIDES_GPUS"
"""The environment variable that tells a rank to hide all GPUs from itself."""
_writing = threading.Lock()
"""A rank's own error and news of another rank's may come at once, each in a thread of its own."""


def failed(error: BaseException, rank: int, watch: Watch | None = None) -> None:
    """Let the other ranks, and the process that started them, know what ends this one."""
    told = watch is not None and not isinstance(error, OtherRankError)
    record(error, sure=not told)
    if watch is not None and told:
        watch.fail(_sentence(error))  # does not return if the error is a consequence
        record(error)


def report(text: str, gone: Sequence[int]) -> None:
    """Tell the user what has gone wrong in some rank; this one ends because of it. For :class:`Watch`: ``gone`` are the
    ranks that ended without a word."""
    if FOLDER in os.environ:
        with _writing:
            _write_record(text, 1, relayed=True, gone=gone)
    else:
        print(f"sft: {sft.safe(text)}", file=sys.stderr, flush=True)


def stopped(moment: str) -> None:
    """All ranks end, as a signal has asked, after ``moment``: the process that started them says so."""
    if FOLDER in os.environ and os.environ["PADDLE_TRAINER_ID"] == "0":
        (Path(os.environ[FOLDER]) / STOPPED).write_text(moment, encoding="utf-8")


def computes_on(memory: int) -> None:
    """Rank 0 computes on a GPU of so many bytes: the process that started it plans with them if a rank is lost."""
    if FOLDER in os.environ and os.environ["PADDLE_TRAINER_ID"] == "0":
        (Path(os.environ[FOLDER]) / MEMORY).write_text(str(memory), encoding="utf-8")


def enter_rank() -> None:
    """At the start of a rank: what rank 0 prints is kept apart from what goes to its standard error, and signals find
    the rank. When it comes to an end of its own, it says so."""
    folder, rank = Path(os.environ[FOLDER]), os.environ["PADDLE_TRAINER_ID"]
    (folder / f"rank.{os.getpid()}").write_text(rank, encoding="utf-8")
    atexit.register((folder / f"ended.{rank}").touch)
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
    if FOLDER not in os.environ:
        return
    rank = os.environ["PADDLE_TRAINER_ID"]
    text = str(error) if isinstance(error, OtherRankError) else f"rank {rank}: {_sentence(error)}"
    code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
    expected = isinstance(error, (SftError, OSError, KeyboardInterrupt))
    details = "" if expected else "".join(traceback.format_exception(error))
    if isinstance(error, sft.PluginError):
        details = error.details()
    gone = error.gone if isinstance(error, OtherRankError) else ()
    with _writing:
        if not (_record_path().exists() and read_record(_record_path())["sure"]):
            _write_record(text, code, details, sure, isinstance(error, OtherRankError), gone)


def _write_record(
    text: str, code: int, details: str = "", sure: bool = True, relayed: bool = False, gone: Sequence[int] = ()
) -> None:
    values = {"text": text, "code": code, "details": details, "sure": sure, "relayed": relayed, "gone": list(gone)}
    values["at"] = time.monotonic()
    path = _record_path()
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(values), encoding="utf-8")
    draft.replace(path)


def read_record(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _record_path() -> Path:
    return Path(os.environ[FOLDER]) / f"rank{os.environ['PADDLE_TRAINER_ID']}.error"


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return str(error) if isinstance(error, (SftError, OSError)) else f"{type(error).__name__}: {error}"

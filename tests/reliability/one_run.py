"""What a forked process does in the tests of kills: one command line of sft, counted, or killed at an operation."""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

HOW = ("never", "before", "after", "within")
"""The moments of a kill, by the numbers that operations.c gives them."""


def command(
    arguments: list[str], library: str, folder: str, log: str, kill: tuple[int, str], facts: dict[str, Any]
) -> int:
    """The exit code of ``sft ARGUMENTS``, whose operations under ``folder`` are counted in ``log`` by ``library``.

    ``kill`` is the operation at which it is killed, and one of :data:`HOW`. ``facts``: ``shard_bytes``, the size of
    the files of a result, and ``modules``, a file for the names of what has been imported by the end.
    """
    from sft.commands.cli import main

    if "shard_bytes" in facts:
        _divide_results(facts["shard_bytes"])
    if "modules" in facts:  # one of several processes does not come back from the command line
        atexit.register(lambda: Path(facts["modules"]).write_text("\n".join(sorted(sys.modules))))
    sys.argv = ["sft", *arguments]
    number, how = kill
    begin = ctypes.CDLL(library).operations_begin
    refused = begin(folder.encode(), log.encode(), ctypes.c_long(number), HOW.index(how))
    if refused:
        raise OSError(refused, f"operations cannot be counted here: {os.strerror(refused)}")
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    except KeyboardInterrupt:  # between Python and sft
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        atexit._run_exitfuncs()
    return 0


def _divide_results(size: int) -> None:
    """No setting does this, and a result of the usual size is one file where the model is tiny."""
    from sft.models.shards import WeightFormat

    given = {field.name: field.default for field in dataclasses.fields(WeightFormat)}
    WeightFormat.__init__.__defaults__ = tuple({**given, "shard_bytes": size}.values())  # type: ignore[misc]

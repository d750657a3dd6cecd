"""What ``sft run --nproc`` starts: ``rank.py MODULE ARGUMENTS…``, for paddle's launcher and, through it, for each rank.

It is ``python -m MODULE``, which ends when its parent does, and, in a rank, writes down the error that ends it.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    module, *arguments = sys.argv[1:]
    in_rank = "PADDLE_TRAINER_ID" in os.environ
    if sys.platform == "linux":
        # The launcher then ends its ranks; a rank whose launcher was killed has nobody who would end it.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL if in_rank else signal.SIGTERM)
    sys.path.pop(0)  # this file's folder, whose modules are not to be found as top-level ones
    sys.argv = [module, *arguments]
    if not in_rank:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return

    from sft_parallel_4d import last_words

    last_words.enter_rank()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception as error:
        last_words.record(error)
        raise


if __name__ == "__main__":
    main()

"""What a launcher tells this process by its environment: whether there are others, and which of them it is."""

from __future__ import annotations

import os

from sft_parallel_4d.options import ParallelOptions

FOLDER = "SFT_LAUNCH_DIR"
"""Where ``--nproc`` started this process: the environment variable with the folder of that launch."""


def processes(options: ParallelOptions) -> int:
    """How many processes share the run: as the launcher says, or as one is going to be asked for."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM") or options.nproc)


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("PADDLE_TRAINER_ID") or 0)


def is_launched() -> bool:
    """Whether a launcher has started this process."""
    return bool(os.environ.get("PADDLE_TRAINERS_NUM"))

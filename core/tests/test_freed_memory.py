"""Freed memory: it serves again without new pages, what lies between tensors is given back, a user's variables win.

The C library is glibc wherever PaddlePaddle can be installed on Linux."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def printed(script: str, users: dict[str, str]) -> list[str]:
    """The words that a process prints in which of the variables of the C library's memory only ``users`` are set."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", script], env=own | users, capture_output=True, text=True, check=True)
    return done.stdout.split()


FREED = """
import resource
from sft import runtime
line = runtime.prepare()
import paddle
x = paddle.ones([1 << 19])
x + x
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    x + x
print("freed memory is kept" in line, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("users", [None, "1000000"])
def test_what_is_freed_serves_again_without_new_pages(users: str | None) -> None:
    """Fifty sums of 2 MiB, 512 pages each; a user's own variable wins."""
    said, faults = printed(FREED, {} if users is None else {"MALLOC_MMAP_THRESHOLD_": users})
    assert (said == "True", int(faults) < 2500) == (users is None, users is None)


HOLES = """
import gc
from sft import runtime
runtime.prepare()
import paddle
from sft.freed_memory import give_back_holes
def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) >> 10
held = [paddle.ones([1 << 18]) for _ in range(200)]
del held[::2]
gc.collect()
before = resident()
give_back_holes()
print(before - resident(), float(held[-1].sum()))
"""


@pytest.mark.parametrize("users", [None, "1000000"])
def test_holes_between_tensors_are_given_back(users: str | None) -> None:
    """A hundred holes of 1 MiB; where the user's own variable has settled how memory is kept, nothing is done."""
    given, kept = printed(HOLES, {} if users is None else {"MALLOC_TOP_PAD_": users})
    assert (int(given) > 80) == (users is None)
    assert float(kept) == 1 << 18

"""Freed memory: it serves again without new pages, what lies between tensors is given back, a user's variables win.

The C library is glibc wherever PaddlePaddle can be installed on Linux."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import gc, resource
from sft import runtime
line = runtime.prepare()
import paddle
from sft.freed_memory import give_back_holes

x = paddle.ones([1 << 19])
x + x
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    x + x
print("freed memory is kept" in line, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

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


@pytest.mark.parametrize(
    "users",
    [
        {},
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in ({"MALLOC_MMAP_THRESHOLD_": "1000000"}, {"MALLOC_TOP_PAD_": "1000000"})
        ),
    ],
    ids=" ".join,
)
def test_what_is_freed_serves_again_and_holes_between_tensors_are_given_back(users: dict[str, str]) -> None:
    """Fifty sums of 2 MiB, 512 pages each, take no new pages, and a hundred holes of 1 MiB go back to the system. Where
    the user's own variable has settled how memory is kept, nothing is done."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=own | users, capture_output=True, text=True, check=True)
    said, faults, given, kept = done.stdout.split()
    assert (said == "True") == (not users)
    if "MALLOC_TOP_PAD_" not in users:
        assert (int(faults) < 2500) == (not users)
    assert (int(given) > 80) == (not users)
    assert float(kept) == 1 << 18

"""The libraries of trackers, in an environment of their own: they want another protobuf than paddlenlp leaves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from environments import TRACKERS, done, with_trackers

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_library_keeps_what_a_run_tells_it(tmp_path: Path) -> None:
    """What a library then keeps is what its own tests say."""
    tests = [str(with_trackers(tmp_path)), "-m", "pytest", "plugins/track/tests/test_libraries.py", "-m", "slow", "-q"]
    ended = subprocess.run(tests, capture_output=True, text=True, timeout=400, cwd=ROOT)
    said = done(ended)
    assert f"{len(TRACKERS)} passed" in said
    assert "skipped" not in said

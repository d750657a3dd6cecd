"""The libraries of trackers, in an environment of their own: they want another protobuf than paddlenlp leaves."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from environments import TRACKERS, done, with_trackers

ROOT = Path(__file__).parents[1]
TESTS = ("plugins/track/tests/test_libraries.py", "plugins/track/tests/test_track_suite.py")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_needs_a_library_of_a_tracker_is_run_with_it(tmp_path: Path) -> None:
    """What a library keeps of a run, and what every tracker promises, are elsewhere skipped where it is missing."""
    line = [str(with_trackers(tmp_path)), "-m", "pytest", *TESTS, "-m", "slow", "-q"]
    said = done(subprocess.run(line, capture_output=True, text=True, timeout=600, cwd=ROOT))
    (passed,) = map(int, re.findall(r"(\d+) passed", said))
    assert passed >= 4 * len(TRACKERS)  # each by a test of its own, and by those of its suite
    assert "skipped" not in said

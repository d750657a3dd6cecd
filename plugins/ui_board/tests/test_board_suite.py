"""What every plugin of its kind promises, of this one."""

from __future__ import annotations

import pytest

from sft.testing import suite

pytestmark = pytest.mark.slow

TestBoard = suite("board")

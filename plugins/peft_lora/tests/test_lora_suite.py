"""What every plugin of its kind promises, of these."""

from __future__ import annotations

import pytest

from sft.testing import suite

pytestmark = pytest.mark.slow

TestLora = suite("lora")
TestDora = suite("dora")
TestLoraPlus = suite("lora-plus")
TestPissa = suite("pissa")
TestRslora = suite("rslora")

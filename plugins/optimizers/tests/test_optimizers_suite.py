"""What every plugin of its kind promises, of these."""

from __future__ import annotations

import pytest

from sft.testing import suite

pytestmark = pytest.mark.slow

TestAdamw8bit = suite("adamw-8bit")
TestLion = suite("lion")
TestAdafactor = suite("adafactor")
TestMuon = suite("muon")
TestWsd = suite("wsd", lr_scheduler_type="wsd")
TestCosineWithMinLr = suite("cosine-with-min-lr", lr_scheduler_type="cosine_with_min_lr", min_lr_rate=0.1)
TestInverseSqrt = suite("inverse-sqrt", lr_scheduler_type="inverse_sqrt")

"""What every plugin of its kind promises, of these."""

from __future__ import annotations

import pytest

from sft.testing import suite

pytestmark = pytest.mark.slow

TestNf4 = suite("nf4")
TestFp4 = suite("fp4")
TestInt8 = suite("int8")
TestInt4 = suite("int4")

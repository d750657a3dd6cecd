"""What every plugin of its kind promises, of these."""

from __future__ import annotations

import pytest

from sft.testing import suite

pytestmark = pytest.mark.slow

TestFlashAttention = suite("flash-attention")
TestFlashmask = suite("flashmask")

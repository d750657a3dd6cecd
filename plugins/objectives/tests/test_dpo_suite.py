"""What every plugin of its kind promises, of dpo, which learns from pairs of answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft.testing import needs, suite, write_data

pytestmark = [pytest.mark.slow, needs("lora")]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = [{"prompt": f"type#{n}", "chosen": "A coat" + " for you" * (n % 3), "rejected": "No."} for n in range(16)]
    return write_data(tmp_path_factory.mktemp("pairs"), pairs[:12], pairs[12:])


TestDpo = suite("dpo", plugin=["lora", "dpo"])

"""What tests of the whole share, beside sft's testing kit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from shown_plugins import SHOWN


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], str]:
    """The path of a file with the plugin of a name."""

    def write(name: str) -> str:
        path = tmp_path / f"{name.replace('-', '_')}.py"
        path.write_text(SHOWN[name], encoding="utf-8")
        return str(path)

    return write

"""The cases that llama.cpp has read, and the script that had it read them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def cases() -> ModuleType:
    """make_answers.py, which knows the cases and writes their files."""
    spec = importlib.util.spec_from_file_location("make_answers", FIXTURES / "make_answers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def answers() -> dict[str, Any]:
    """What llama.cpp made of the file of each "CASE TYPE"."""
    return dict(json.loads((FIXTURES / "answers.json").read_text(encoding="utf-8")))

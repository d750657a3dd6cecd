"""The cases that llama.cpp and Go have read, and the scripts that had them read."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return FIXTURES


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """Imports a script of fixtures/ by its name, under which others find it."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, FIXTURES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def cases(script: Callable[[str], ModuleType]) -> ModuleType:
    """make_answers.py, which knows the cases and writes their files."""
    return script("make_answers")


@pytest.fixture(scope="session")
def answers() -> dict[str, Any]:
    """What llama.cpp made of the file of each "CASE TYPE"."""
    return dict(json.loads((FIXTURES / "answers.json").read_text(encoding="utf-8")))

"""The fixtures of sft's testing kit, with a model of the fixtures' own."""

from pathlib import Path

import bases
import pytest

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def base_of(tmp_path_factory):
    """``base_of(case)``: the directory of the model that a case of PEFT's is for."""
    folder = tmp_path_factory.mktemp("bases")
    return {case: bases.write(case, folder / case) for case in ("llama", "qwen2")}.__getitem__


@pytest.fixture(scope="session")
def base_model(base_of):
    return base_of("llama")


@pytest.fixture(scope="session")
def run_settings():
    return {"plugin": ["ia3"], "learning_rate": 5e-2, "max_steps": 4, "do_eval": False, "save_strategy": "no"}

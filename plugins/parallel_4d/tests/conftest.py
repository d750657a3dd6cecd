"""What the tests of this distribution share, beside plugins/conftest.py: model directories and outlines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft


@pytest.fixture(scope="session")
def run_settings() -> dict[str, Any]:
    return {"max_steps": 1, "logging_steps": 1}


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., Path]:
    """A directory with a ``config.json`` alone: 4 layers, 8 query and 4 key/value heads of 8, 512 tokens."""

    def make(model_type: str = "llama", **changes: Any) -> Path:
        values = {
            **{"model_type": model_type, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4},
            **{"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512, "sliding_window": None},
            **{"max_position_embeddings": 512, "tie_word_embeddings": model_type == "gemma"},
            **({"head_dim": 16} if model_type == "gemma" else {}),
            **changes,
        }
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return make


@pytest.fixture
def outline_of(config_of: Callable[..., Path]) -> Callable[..., sft.Outline]:
    def make(model_type: str = "llama", **changes: Any) -> sft.Outline:
        return sft.outline({"model_name_or_path": str(config_of(model_type, **changes))}).outline

    return make

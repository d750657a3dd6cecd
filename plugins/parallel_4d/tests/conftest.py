"""What the tests of this distribution share, beside plugins/conftest.py: model directories and outlines."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import SETTINGS, folders
from trainings import Trainings

from sft.files import save_tensors
from sft.testing import make_model, write_data
from sft_parallel_4d.outline import Outline
from sft_parallel_4d.paper import outline as on_paper


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
            **{"max_position_embeddings": 512, "tie_word_embeddings": model_type.startswith("gemma")},
            **({"head_dim": 16} if model_type.startswith("gemma") else {}),
            **changes,
        }
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return make


@pytest.fixture
def outline_of(config_of: Callable[..., Path]) -> Callable[..., Outline]:
    def make(model_type: str = "llama", **changes: Any) -> Outline:
        return on_paper({"model_name_or_path": str(config_of(model_type, **changes))}).outline

    return make


WEIGHTS = (1, 0.05, 4, 0.5)


def _records(count: int, weights: tuple[float, ...] = (1,)) -> list[dict[str, Any]]:
    """Of several lengths, so that rows are padded, and packed unevenly; they weigh ``weights`` in turns."""
    return [
        {
            "src": f"say the number {n} " * (1 + n % 3),
            "tgt": " ".join("01234"[: n % 5 + 1]),
            "weight": weights[n % len(weights)],
        }
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """Trainings of a Llama of four blocks whose embeddings are tied, on 17 records that weigh more or less: of a pass
    over them in steps of 8 rows, the last step has one row, which is less than there are data ranks."""
    folder = tmp_path_factory.mktemp("trainings")
    (folder / "data").mkdir()
    data = write_data(folder / "data", _records(17, WEIGHTS), _records(5))
    return Trainings(folder, make_model(folder / "model", num_hidden_layers=4), data)


@pytest.fixture(scope="session")
def uneven_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 records: of two data ranks, one has two micro-batches in a pass's last step and the other has one."""
    return write_data(tmp_path_factory.mktemp("uneven"), _records(21), _records(5))


@pytest.fixture(scope="session")
def mixed_data(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A set of records that weigh, and one of texts, of which some become several rows; drawn by weight."""
    sets = []
    texts = [{"text": f"say the number {n} " * (1 + n % 7)} for n in range(12)]
    for name, weight, records in (("asked", 0.7, _records(14, WEIGHTS)), ("texts", 0.3, texts)):
        folder = tmp_path_factory.mktemp(name)
        sets.append({"path": str(write_data(folder, records[:-3], records[-3:])), "name": name, "weight": weight})
    return sets


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


@pytest.fixture
def model_of(config_of: Callable[..., Path]) -> Callable[..., Path]:
    """``config_of`` with random weights beside it."""

    def make(model_type: str = "llama", **changes: Any) -> Path:
        import paddle

        from sft.models.config import read_config
        from sft.models.decoder import CausalLM
        from sft.models.families.known import family_of

        folder, rng = config_of(model_type, **changes), np.random.default_rng(0)
        values = read_config(folder)
        family = family_of(values, folder)
        with paddle.LazyGuard():
            model = CausalLM(family.architecture(values, folder))
        tensors = {}
        for name, parameter in model.named_parameters():
            shape = (
                parameter.shape[::-1]
                if parameter.ndim == 2 and not name.endswith("embed_tokens.weight")
                else parameter.shape
            )
            tensors[family.to_file(name, "hf")] = 0.1 * rng.standard_normal(shape, dtype=np.float32)
        save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of single characters: the models know 112 tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["<unk>", "<pad>", "</s>", *map(chr, range(32, 127)), "\n"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated"), decoders.Fuse()
    made.add_special_tokens(words[:3])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}')
    return folder


@pytest.fixture(scope="session")
def alone(trainings: Trainings, tokenizer: Path) -> Callable[[tuple[str, ...], str], list[Path]]:
    """Where the same runs of one process have written; each is made once."""
    return cache(lambda cases, what: folders(trainings, tokenizer, "one", cases, SETTINGS[what]))

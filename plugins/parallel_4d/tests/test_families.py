"""Every family that the decoder computes learns under each way of dividing it what it learns on one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from processes import RankError, run_ranks
from trainings import PLANS, Trainings, assert_equal

from sft.testing import needs

FOLDER = Path(__file__).parents[3] / "core" / "tests" / "fixtures" / "families"
WITH_EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe")
CASES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
DENSE = tuple(case for case in CASES if case not in WITH_EXPERTS)
FIXED = {"max_steps": 2, "per_device_train_batch_size": 4, "evaluation_strategy": "no"}
SETTINGS: dict[str, dict[str, Any]] = {"full": FIXED, "lora": {**FIXED, "plugin": ["lora"], "lora_rank": 4}}
SETTINGS["dora"] = {**SETTINGS["lora"], "plugin": ["lora", "dora"]}


@pytest.fixture(scope="module")
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


def folders(
    trainings: Trainings, tokenizer: Path, plan: str, cases: tuple[str, ...], settings: dict[str, Any]
) -> list[Path]:
    """Where runs of ``cases`` under ``plan`` have written, one after the other in the same processes."""
    runs = []
    for case in cases:
        positions = json.loads((FOLDER / case / "config.json").read_text())["max_position_embeddings"]
        lengths = {"max_length": min(60, positions + 1), "src_length": min(40, positions // 2)}
        model = {"model_name_or_path": str(FOLDER / case), "tokenizer_name_or_path": str(tokenizer)}
        runs.append(trainings.settings(PLANS[plan], **model, **lengths, **settings))
    run_ranks(PLANS[plan].processes, "jobs:train_each", runs, timeout=100)
    return [Path(run["output_dir"]) for run in runs]


@pytest.fixture(scope="module")
def alone(trainings: Trainings, tokenizer: Path) -> Callable[[tuple[str, ...], str], list[Path]]:
    """Where the same runs of one process have written; each is made once."""
    return cache(lambda cases, what: folders(trainings, tokenizer, "one", cases, SETTINGS[what]))


def case(plan: str, what: str, cases: tuple[str, ...], slow: bool = False) -> Any:
    marks = [needs(*SETTINGS[what].get("plugin", [])), *([pytest.mark.slow] if slow else [])]
    return pytest.param(plan, what, cases, marks=marks, id=f"{plan}-{what}-{len(cases)}")


PLANNED = ["tp2", "tp2-sequence", "pp2", "stage3", "tp2-pp2", "tp2-stage1", "cp2", "cp2-tp2-sequence"]


@pytest.mark.parametrize(
    ("plan", "what", "cases"),
    [
        # Fused matrices; biases of what is divided by inputs; norms over all heads together.
        case("tp2-sequence", "lora", ("glm4", "llama-biased", "olmo2", "phi3")),
        case("pp2", "full", ("gemma2", "granite"), slow=True),
        case("tp2", "full", ("qwen2-moe",)),
        *(case(plan, what, DENSE, slow=True) for plan in PLANNED for what in ("full", "lora")),
        case("tp2", "dora", ("glm4", "llama-biased", "phi3", "qwen2-moe"), slow=True),
        case("stage3", "full", ("mixtral",), slow=True),
        *(case(plan, what, WITH_EXPERTS, slow=True) for plan in [*PLANNED, "stage2"] for what in ("full", "lora")),
    ],
)
def test_families_learn_what_one_process_learns(
    trainings: Trainings, tokenizer: Path, alone: Any, plan: str, what: str, cases: tuple[str, ...]
) -> None:
    many = folders(trainings, tokenizer, plan, cases, SETTINGS[what])
    for one, other in zip(alone(cases, what), many, strict=True):
        assert_equal(one, other)


@needs("lora", "nf4")
def test_a_quantizer_over_fused_matrices_is_refused(trainings: Trainings, tokenizer: Path) -> None:
    settings = {**FIXED, "plugin": ["lora", "nf4"]}
    with pytest.raises(RankError, match=r"self_attn\.qkv_proj holds several matrices in one, and a quantized layer"):
        folders(trainings, tokenizer, "tp2", ("phi3",), settings)
    folders(trainings, tokenizer, "pp2", ("phi3",), settings)

"""Every family that the decoder computes learns under each way of dividing it what it learns on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import DENSE, FIXED, SETTINGS, WITH_EXPERTS, case, folders
from processes import RankError
from trainings import Trainings, assert_equal

from sft.testing import needs

pytestmark = pytest.mark.sweep  # as far as its tests are slow

PLANNED = ["tp2", "tp2-sequence", "pp2", "stage3", "tp2-pp2", "tp2-stage1", "cp2", "cp2-tp2-sequence"]


@pytest.mark.parametrize(
    ("plan", "what", "cases"),
    [
        # Fused matrices; biases of what is divided by inputs; norms over all heads together.
        case("tp2-sequence", "lora", ("glm4", "llama-biased", "olmo2", "phi3")),
        case("pp2", "full", ("gemma2", "granite"), slow=True),
        case("tp2", "full", ("olmo2", "qwen2-moe")),
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

"""Configs of published checkpoints (fixtures/published.json) are read as what those checkpoints are, without weights.

A checkpoint's ``parameters`` are what its files hold, tied matrices once; the factors of Phi's longrope are made up.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft.models.architecture import Architecture

HERE = Path(__file__).parent
PUBLISHED: dict[str, Any] = json.loads((HERE / "fixtures" / "published.json").read_text(encoding="utf-8"))
DOCS = HERE.parents[1] / "docs" / "models.md"


def read(name: str) -> Architecture:
    from sft.models.families.known import family_of

    config = PUBLISHED[name]["config"]
    return family_of(config, name).architecture(config, name)


def parameters_of(architecture: Architecture) -> int:
    """How many values the decoder has: one block of each kind is made, without memory, and counted as often as it is
    there."""
    import paddle

    from sft.models.decoder import CausalLM

    kinds = list(dict.fromkeys(architecture.blocks))
    with paddle.LazyGuard():
        model = CausalLM(replace(architecture, blocks=tuple(kinds)))
    count = 0
    for name, parameter in model.named_parameters():
        block = re.match(r"model\.layers\.(\d+)\.", name)
        times = 1 if block is None else architecture.blocks.count(kinds[int(block[1])])
        count += times * math.prod(parameter.shape)
    return count


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_checkpoint_has_the_parameters_that_were_published(paddle: Any, name: str) -> None:
    assert parameters_of(read(name)) == PUBLISHED[name]["parameters"]


def rotaries(name: str) -> list[tuple[str, float, int]]:
    return [(rotary.kind, rotary.base, rotary.size) for rotary in read(name).rotaries]


def test_rotary_embeddings_are_those_of_the_checkpoints() -> None:
    assert rotaries("meta-llama/Llama-2-7b-hf") == [("default", 1e4, 128)]
    assert rotaries("meta-llama/Llama-3.2-1B-Instruct") == [("llama3", 5e5, 64)]
    assert read("meta-llama/Llama-3.2-1B-Instruct").rotaries[0].values["factor"] == 32.0
    assert rotaries("HuggingFaceTB/SmolLM2-135M-Instruct") == [("default", 1e5, 64)]
    assert rotaries("mistralai/Mistral-Nemo-Instruct-2407") == [("default", 1e6, 128)]
    assert rotaries("google/gemma-3-1b-it") == [("default", 1e6, 256), ("default", 1e4, 256)]
    assert rotaries("microsoft/Phi-3.5-mini-instruct") == [("longrope", 1e4, 96)]
    assert rotaries("microsoft/Phi-4-mini-instruct") == [("longrope", 1e4, 96)]  # three quarters of 128
    assert read("microsoft/Phi-4-mini-instruct").rotaries[0].limit == 4096
    assert rotaries("zai-org/GLM-4-9B-0414") == [("default", 1e4, 64)]
    assert read("zai-org/GLM-4-9B-0414").rotaries[0].interleaved


def test_windows_are_those_of_the_checkpoints() -> None:
    def windows(name: str) -> list[int | None]:
        return [block.window for block in read(name).blocks]

    assert windows("mistralai/Mistral-7B-v0.1") == [4096] * 32
    assert windows("mistralai/Mistral-7B-Instruct-v0.3") == [None] * 32
    assert windows("Qwen/Qwen2.5-7B-Instruct") == [None] * 28  # use_sliding_window is off
    assert windows("Qwen/QwQ-32B") == [None] * 64
    assert windows("google/gemma-2-2b") == [4096, None] * 13
    assert windows("google/gemma-3-1b-it") == ([512] * 5 + [None]) * 4 + [512] * 2
    assert windows("google/gemma-3-270m-it") == ([512] * 5 + [None]) * 3
    assert windows("microsoft/Phi-3-mini-4k-instruct") == [2047] * 32


def test_gemma3_turns_windowed_layers_by_a_base_of_their_own() -> None:
    assert [block.rotary for block in read("google/gemma-3-1b-it").blocks] == ([1] * 5 + [0]) * 4 + [1] * 2


def test_every_fourth_layer_of_smollm3_is_not_turned() -> None:
    assert [block.rotary for block in read("HuggingFaceTB/SmolLM3-3B").blocks] == [0, 0, 0, None] * 9


def test_scales_and_caps_are_those_of_the_checkpoints() -> None:
    gemma2 = read("google/gemma-2-27b-it")
    assert (gemma2.attention_cap, gemma2.logit_cap, gemma2.attention_scale) == (50.0, 30.0, 1 / 12)
    assert gemma2.embedding_scale == math.sqrt(4608)
    granite = read("ibm-granite/granite-3.3-2b-instruct")
    scales = (granite.attention_scale, granite.embedding_scale, granite.residual_scale, granite.logit_scale)
    assert scales == (1 / 64, 12.0, 0.22, 1 / 8)


def test_experts_are_those_of_the_checkpoints() -> None:
    def experts(name: str) -> tuple[int, int, int, bool, int | None]:
        (kind,) = {block.experts for block in read(name).blocks}
        assert kind is not None
        return kind.count, kind.chosen, kind.inner, kind.normalise, kind.shared_inner

    assert experts("mistralai/Mixtral-8x7B-Instruct-v0.1") == (8, 2, 14336, True, None)
    assert experts("Qwen/Qwen1.5-MoE-A2.7B-Chat") == (60, 4, 1408, False, 5632)
    assert experts("Qwen/Qwen3-30B-A3B") == (128, 8, 768, True, None)


def test_every_family_has_a_published_checkpoint_and_docs_name_it() -> None:
    from sft.models.families.known import FAMILIES

    assert {entry["config"]["model_type"] for entry in PUBLISHED.values()} == set(FAMILIES)
    page = DOCS.read_text(encoding="utf-8")
    named = {
        name for row in page.splitlines() if row.startswith("| `") for name in re.findall(r"\w[\w.-]*/[\w.-]+", row)
    }
    assert named == set(PUBLISHED)

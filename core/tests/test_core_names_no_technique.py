"""The core knows no technique: no name of one stands in its code, but for the few places listed here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sft

CORE = Path(sft.__file__).parent

TECHNIQUES = (
    r"q?lora",
    r"(rs|ada)[-_ ]?lora",
    r"lora[-_ ]?plus",
    r"dora",
    r"pissa",
    r"vera",
    r"prefix[-_ ]?tuning",
    r"neft(une)?",
    r"(nf|fp|int)4",
    r"int8",
    r"weight[-_ ]?only",
    r"gptq",
    r"awq",
    r"flash[-_ ]?mask",
    r"flash[-_ ]?attention",
    r"zero[-_ ]?padding",
    r"(greedy|dynamic)[-_ ]?(padding|packing)",
    r"(tensor|pipeline|sharding)[-_ ]?parallel",
    r"dpo",
)
# As a word, or as a part of an identifier that dashes or underscores separate.
NAMES = re.compile(rf"(?<![a-z0-9])([a-z0-9]+[-_])*({'|'.join(TECHNIQUES)})([-_][a-z0-9]+)*(?![a-z0-9])", re.IGNORECASE)

# Each stands for what it means to users of PaddleNLP or in a paper, not for a technique that the core treats in a
# special way: PaddleNLP's names of settings, the format in which masks cross the attention seam.
ALLOWED = {
    "seams.py": {"flashmask"},
    # PaddleNLP's settings that nobody here reads: names of what the core does not do.
    "settings/paddlenlp.py": {
        "expert_tensor_parallel_degree",
        "lora_use_mixer",
        "pipeline_parallel_config",
        "pipeline_parallel_degree",
        "prefix_tuning",
        "sharding_parallel_config",
        "sharding_parallel_degree",
        "sharding_parallel_mesh_dimension",
        "tensor_parallel_config",
        "tensor_parallel_degree",
        "tensor_parallel_output",
        "use_quick_lora",
    },
    "data/batches.py": {"flashmask"},
}


def found_in(path: Path) -> set[str]:
    return {match.group(0).lower() for match in NAMES.finditer(path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize(
    "text",
    ["LoRA", "`lora`", "lora_rank", "--lora-path", "is_lora", "rsLoRA", "zero padding", "use_flash_attention", "(NF4)"],
)
def test_the_search_finds_names(text: str) -> None:
    assert NAMES.search(f"for {text}, say")


@pytest.mark.parametrize(
    "text", ["exploration", "several", "overall", "int64", "zeros", "padding", "attention", "print4"]
)
def test_the_search_finds_nothing_else(text: str) -> None:
    assert not NAMES.search(f"for {text}, say")


def test_no_technique_is_named() -> None:
    found = {
        path.relative_to(CORE).as_posix(): names
        for path in sorted(CORE.rglob("*"))
        if path.suffix in (".py", ".json", ".yaml", ".jinja") and "demo/data" not in path.as_posix()
        if (names := found_in(path))
    }
    assert found == ALLOWED


def test_no_plugin_is_imported() -> None:
    imports = re.compile(r"^\s*(import|from)\s+sft_\w+", re.MULTILINE)
    assert not [path.name for path in CORE.rglob("*.py") if imports.search(path.read_text(encoding="utf-8"))]

"""Which layers are adapted, with which rank and α: as the settings say, as PEFT would choose them, and as written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.inference.merge import merge
from sft.testing import load


def layers_of(run: Any) -> dict[str, Any]:
    return {name: layer for name, layer in run.model.named_sublayers() if hasattr(layer, "lora_A")}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lora_exclude_modules": ["down_proj", ".*self_attn.*"]}, "01 gate up"),
        ({"lora_layers_to_transform": [1], "lora_exclude_modules": ["k_proj"]}, "1 q v o gate up down"),
        ({"lora_layers_to_transform": "0-1", "lora_target_modules": "v_proj"}, "01 v"),
        ({"lora_layers_to_transform": "0", "lora_target_modules": r"model\.layers\..*\.mlp\.up_proj"}, "0 up"),
    ],
)
def test_layers_are_chosen_by_name_and_block(adapt: Any, settings: dict[str, Any], expected: str) -> None:
    blocks, *kinds = expected.split()
    names = {
        f"{name.split('.')[2]} {name.rpartition('.')[2].removesuffix('_proj')}" for name in layers_of(adapt(**settings))
    }
    assert names == {f"{block} {kind}" for block in blocks for kind in kinds}


PATTERNS: dict[str, Any] = {
    "lora_rank": 4,
    "lora_rank_pattern": [r"model\.layers\.1\..*=2", "q_proj=6"],
    "lora_alpha_pattern": ["up_proj=3", "q_proj=12"],
    "lora_exclude_modules": ["o_proj"],
}


def rank_and_alpha(name: str, alpha: float | None = None) -> tuple[int, float]:
    """By PEFT's rule, of the settings above: the first pattern that fits counts; α is 2·r where nobody says it."""
    rank = 2 if ".layers.1." in name else 6 if name.endswith("q_proj") else 4
    return rank, {"up_proj": 3.0, "q_proj": 12.0}.get(name.rpartition(".")[2], 2.0 * rank if alpha is None else alpha)


@pytest.mark.parametrize("more", [{}, {"lora_alpha": 5}, {"plugin": ["lora", "rslora"], "lora_alpha": 5}], ids=str)
def test_ranks_and_alphas_follow_patterns_and_come_back(
    train: Any, adapt: Any, base_model: Path, tmp_path: Path, looking: Any, input_ids: Any, logits_of: Any, more: Any
) -> None:
    """In the layers, in what PEFT reads of the config by its own rule, read again to the bit, and merged."""
    from sft_peft_lora.files import LoraFolder

    layers = layers_of(adapt(**PATTERNS, **more))
    root = 0.5 if "rslora" in more.get("plugin", ()) else 1
    assert len(layers) == 12
    for name, layer in layers.items():
        rank, alpha = rank_and_alpha(name, more.get("lora_alpha"))
        assert (layer.rank, layer.scaling) == (rank, pytest.approx(alpha / rank**root)), name
    look, trained = looking
    train("out", (look,), **PATTERNS, **more)
    folder = LoraFolder(tmp_path / "out")
    assert {name: (a.shape[1], folder.scaling(name)) for name, (a, _) in folder.pairs.items()} == {
        name: (layer.rank, pytest.approx(layer.scaling)) for name, layer in layers.items()
    }
    np.testing.assert_array_equal(logits_of(load(base_model, tmp_path / "out"), input_ids), trained[0])
    merge(str(base_model), tmp_path / "out", tmp_path / "merged", lambda text: None)
    np.testing.assert_allclose(logits_of(load(tmp_path / "merged"), input_ids), trained[0], atol=1e-4, rtol=0)


def test_on_paper_they_are_as_they_are(adapt: Any, base_model: Path) -> None:
    paper = pytest.importorskip("sft_parallel_4d.paper")
    settings = {"plugin": ["lora"], **PATTERNS, "lora_layers_to_transform": ["1"], "lora_rank_pattern": ["q_proj=6"]}
    trained = sum(int(p.size) for p in adapt(**settings).model.parameters() if not p.stop_gradient)
    assert paper.outline({"model_name_or_path": str(base_model), **settings}).outline.count()[1] == trained


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_exclude_modules": ["q_pro"]}, "Target 'q_pro' matches no layer"),
        ({"lora_exclude_modules": ["q_proj"], "lora_target_modules": ["q_proj"]}, "leaves out every layer"),
        ({"lora_layers_to_transform": [2]}, "names block 2, and the layers that are adapted are in blocks 0 to 1"),
        ({"lora_layers_to_transform": "one"}, "expected numbers of blocks from 0, or ranges such as 4-7, got 'one'"),
        ({"lora_layers_to_transform": "3-1"}, "got '3-1'"),
        ({"lora_layers_to_transform": [True]}, "got True"),
        ({"lora_rank_pattern": ["q_proj"]}, "lora_rank_pattern: expected NAME=NUMBER, such as q_proj=16"),
        ({"lora_rank_pattern": ["q_proj=1.5"]}, "lora_rank_pattern: expected NAME=NUMBER"),
        ({"lora_rank_pattern": ["q_proj=0"]}, "lora_rank_pattern: expected NAME=NUMBER"),
        ({"lora_alpha_pattern": ["q_proj=inf"]}, "lora_alpha_pattern: expected NAME=NUMBER"),
        ({"lora_alpha_pattern": ["nothing=1"]}, "Target 'nothing' matches no layer"),
        ({"lora_rank_pattern": ["q_proj=99"]}, "lora_rank_pattern: 99 is more than the 32 dimensions of the widest"),
    ],
    ids=str,
)
def test_what_meets_nothing_is_refused(train: Any, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(sft.UsageError, match=message):
        train("out", **settings)
    assert not (tmp_path / "out").exists()

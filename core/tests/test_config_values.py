"""Whatever a ``config.json`` says, it is an architecture that can be computed, or one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.models.architecture import Architecture
from sft.models.families.known import family_of

FAMILIES = Path(__file__).parent / "fixtures" / "families"
STRANGE = [
    None,
    True,
    False,
    "x",
    "",
    -1,
    0,
    1,
    2,
    3,
    0.5,
    -0.5,
    1e300,
    math.inf,
    math.nan,
    [],
    [1],
    ["x"],
    {},
    {"a": 1},
]
STRANGE += [{"full_attention": 1}, {"rope_type": ["linear"]}, {"rope_type": {}}, {"type": "su"}, [[]], [None] * 9]
ROTARY = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
]
FURTHER = ("original_max_position_embeddings", "attention_factor", "truncate", "rope_theta", "partial_rotary_factor")


def with_strange_values(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """``values`` with one of them, or one of an object's, changed to each of ``STRANGE``, or left out."""
    for name, value in values.items():
        yield {key: other for key, other in values.items() if key != name}
        for strange in STRANGE:
            yield {**values, name: strange}
        if isinstance(value, dict):
            for inner in with_strange_values(value):
                yield {**values, name: inner}


def read(values: dict[str, Any]) -> Architecture | None:
    """The architecture, of which everything has been computed that depends on values alone; None: it is refused."""
    try:
        found = family_of(values, "here").architecture(values, "here")
    except sft.UsageError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert refused.startswith("here: ")
        assert "\n" not in refused
        return None
    for rotary in found.rotaries:
        for length in (1, 10**6):
            frequencies, scale = rotary.frequencies(length)
            assert frequencies.shape == (rotary.size // 2,)
            assert np.isfinite(frequencies).all()
            assert math.isfinite(scale)
            assert scale > 0
    numbers = (found.norm_epsilon, found.logit_scale, found.embedding_scale, found.residual_scale)
    numbers += tuple(one for one in (found.attention_scale, found.attention_cap, found.logit_cap) if one is not None)
    assert all(math.isfinite(one) and one > 0 for one in numbers)
    assert found.heads % found.kv_heads == 0
    return found


@pytest.mark.parametrize("case", sorted(folder.name for folder in FAMILIES.iterdir() if folder.is_dir()))
def test_a_strange_value_is_read_or_refused_in_one_sentence(case: str) -> None:
    values = json.loads((FAMILIES / case / "config.json").read_text(encoding="utf-8"))
    found = [read(one) for one in with_strange_values(values)]
    assert None in found
    assert any(one is not None for one in found)


@pytest.mark.parametrize("scaling", ROTARY, ids=lambda scaling: str(scaling["rope_type"]))
def test_a_strange_scaling_is_read_or_refused_in_one_sentence(scaling: dict[str, Any]) -> None:
    values = json.loads((FAMILIES / "llama-linear" / "config.json").read_text(encoding="utf-8"))
    del values["rope_parameters"]
    values["head_dim"] = 8
    assert read({**values, "rope_scaling": scaling}) is not None
    found = [
        read({**values, "rope_scaling": one})
        for one in with_strange_values({**scaling, **{name: scaling.get(name) for name in FURTHER}})
    ]
    assert None in found

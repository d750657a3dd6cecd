"""Model folders with reference values: loading them, and two ways of computing their logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.models.architecture import Architecture
from sft.models.families.known import family_of
from sft.testing import forward as own_logits  # noqa: F401  (the other way of computing them)

# float32 noise between two implementations is 1e-5 at logits of up to 7; the smallest mistake that
# make_models.py looked for moves a logit by 0.05.
TOLERANCE = 1e-4


def load(folder: Path, quantizer: Any = None) -> Any:
    from sft.models.loading import load_model, open_model

    return load_model(open_model(folder, allow_pickle=True), quantizer)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def architecture_of(values: dict[str, Any], where: Any = "here") -> Architecture:
    return family_of(values, where).architecture(values, where)


def reference(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    found = load_file(folder / "reference.safetensors")
    return found["input_ids"], found["logits"]


def backend_logits(model: Any, input_ids: np.ndarray, position_ids: np.ndarray | None = None) -> np.ndarray:
    """Through the installed attention backend, as training computes them."""
    import paddle

    from sft.models.forward import hidden_states

    if position_ids is None:
        position_ids = np.tile(np.arange(input_ids.shape[1]), (len(input_ids), 1))
    one_document = tuple((input_ids.shape[1],) for _ in input_ids)
    ends = np.full((len(input_ids), 1, input_ids.shape[1], 1), input_ids.shape[1], np.int32)
    batch = sft.Batch(input_ids, np.full_like(input_ids, -100), position_ids, ends, one_document)
    with paddle.no_grad():
        return model.lm_head(hidden_states(model, batch)).numpy()


def paddlenlps_logits(folder: Path, input_ids: np.ndarray, **loading: Any) -> np.ndarray:
    """Of PaddleNLP's own class, which loads the folder by itself."""
    import paddle

    transformers = pytest.importorskip("paddlenlp.transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype="float32", **loading)
    model.eval()
    ids = paddle.to_tensor(input_ids)
    with paddle.no_grad():
        found = model(input_ids=ids, attention_mask=paddle.ones_like(ids))
    return np.asarray((found[0] if isinstance(found, tuple) else found).numpy())


def largest_difference(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return float(np.abs(first.astype(np.float64) - second.astype(np.float64)).max())

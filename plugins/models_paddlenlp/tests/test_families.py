"""Each family beside PaddleNLP's own model of the same checkpoint, and the protocol that every class keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft.testing import check_family, forward, load

CASES = ["qwen", "chatglm", "chatglm-plain", "deepseek-v2-lite", "deepseek-v2"]
PLUGIN = "paddlenlp-models"


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_paddlenlp(
    paddle: Any, checkpoints: Callable[[str], Path], theirs: Callable[[str], Any], case: str, monkeypatch: Any
) -> None:
    own = paddle.cumsum  # which PaddleNLP takes to keep its argument's dtype, as it once did
    monkeypatch.setattr(paddle, "cumsum", lambda x, axis=None: own(x, axis).astype(x.dtype))
    ids = np.random.default_rng(1).integers(3, 2048, (2, 19))
    with paddle.no_grad():
        found = theirs(case)(input_ids=paddle.to_tensor(ids), attention_mask=paddle.ones(ids.shape, "int64"))
    expected = np.asarray((found[0] if isinstance(found, tuple) else found).numpy())
    logits = forward(load(checkpoints(case), plugins=[PLUGIN]), ids)
    assert np.abs(logits - expected).max() <= 5e-6 * np.abs(expected).max()
    assert np.ptp(expected, axis=-1).min() > 1


@pytest.mark.parametrize("case", CASES)
def test_the_protocol_is_kept(checkpoints: Callable[[str], Path], case: str) -> None:
    check_family(checkpoints(case), PLUGIN)

"""Where PaddleNLP's model of a family computes or names something otherwise than Hugging Face's: put right on the
instance, before weights are read."""

from __future__ import annotations

import types
from typing import Any


def gemma(model: Any) -> None:
    """The name of its tied matrix, how lm_head lies, and the form of its gelu."""
    # lm_head comes before the backbone, so the tied matrix would be called lm_head.weight; every other family, and
    # the files, call it the embedding.
    head = model.lm_head
    del model.lm_head
    model.lm_head = head
    # The loss asks lm_head how its weight lies; PaddleNLP's other heads say so themselves.
    head.transpose_y = bool(model.config.tie_word_embeddings)
    for layer in model.gemma.layers:
        layer.mlp.forward = types.MethodType(_gemma_mlp, layer.mlp)


def _gemma_mlp(self: Any, x: Any) -> Any:
    """PaddleNLP has the exact gelu; Gemma was trained with the tanh form (``gelu_pytorch_tanh``)."""
    from paddle.nn.functional import gelu

    return self.down_proj(gelu(self.gate_proj(x), approximate=True) * self.up_proj(x))

"""LoRA of the embedding and of lm_head: layers over the vocabulary, which a tied model has as one matrix."""

from __future__ import annotations

from typing import Any, ClassVar

import paddle

import sft
from sft_peft_lora.layer import LoraLinear
from sft_peft_lora.names import EMBEDDING, HEAD


class LoraEmbedding(LoraLinear):
    """Rows of W + s·A·B: tokens int64 [B, S] → [B, S, out]; A [V, r], B [r, out]. As in PEFT nothing is dropped."""

    def forward(self, tokens: Any) -> Any:
        rows = self.base(tokens)
        update = paddle.matmul(self.base.look_up(tokens, self.lora_A) * self.scaling, self.lora_B)
        return rows + update.astype(rows.dtype)


class LoraHead(sft.HeadLayer, LoraLinear):
    """Logits of x·(W + s·A·B): A [hidden, r], B [r, V]."""

    def beside(self, hidden: Any) -> sft.Beside:
        x = hidden if self.dropout is None else self.dropout(hidden)
        return sft.Beside(paddle.matmul(x, self.lora_A) * self.scaling, self.lora_B)


class TiedHead(sft.HeadLayer, paddle.nn.Layer):
    """The head of a tied model, whose matrix is the adapted embedding's: x·(W + s·A·B)ᵀ. It has no parameters."""

    sides: ClassVar[dict[str, tuple[str | None, ...]]] = {}

    def __init__(self, base: Any, embedding: LoraEmbedding, dropout: float) -> None:
        super().__init__()
        self.base = base
        object.__setattr__(
            self, "embedding", embedding
        )  # no sublayer, under whose name its parameters would be known too
        self.dropout = paddle.nn.Dropout(dropout) if dropout else None

    def beside(self, hidden: Any) -> sft.Beside:
        own = self.embedding
        x = hidden if self.dropout is None else self.dropout(hidden)
        return sft.Beside(paddle.matmul(x, own.lora_B, transpose_y=True) * own.scaling, own.lora_A.T)


def layer_of(name: str, plain: type) -> type:
    """The class that stands for the layer ``name``; ``plain`` is that of Linears of the blocks."""
    return {EMBEDDING: LoraEmbedding, HEAD: LoraHead}.get(name, plain)

"""What an adapter in lm_head's place computes beside the products with its matrix. The loss takes the two apart and
goes through them chunk by chunk, so that logits [B, S, V] exist as little as without it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from sft.distributed.meeting import Vocabulary


@dataclass(frozen=True)
class Beside:
    """What belongs to products of hidden states [..., hidden] with lm_head's matrix, before they are scaled and capped.

    Attributes:
        inputs: [..., r], of those hidden states; gradients flow through them.
        matrix: [r, columns]: inputs · matrix is added to the products. Where processes share the vocabulary it has the
            columns that are here. None where there are ``tokens``.
        tokens: r different ids. What the inputs have of each takes the place of its product.
    """

    inputs: Any
    matrix: Any | None = None
    tokens: tuple[int, ...] = ()

    def places(self, columns: int, vocabulary: Vocabulary) -> tuple[Any, Any] | None:
        """Which of the inputs stand for a token whose column is here, and these columns: int64 [k] each; None: none
        does. ``columns`` are how many are here."""
        found = np.asarray(self.tokens, np.int64) - (vocabulary.start or 0)
        here = np.flatnonzero((found >= 0) & (found < columns))
        return (paddle.to_tensor(here), paddle.to_tensor(found[here])) if len(here) else None

    def onto(self, products: Any, vocabulary: Vocabulary) -> Any:
        """The ``products`` [..., columns] of the same hidden states with what belongs to them; gradients flow."""
        if self.matrix is not None:
            return products + paddle.matmul(self.inputs, self.matrix)
        places = self.places(int(products.shape[-1]), vocabulary)
        if places is None:
            return products
        own, columns = places
        chosen = paddle.index_select(self.inputs, own, axis=-1).astype(products.dtype)
        return paddle.put_along_axis(products, columns.expand(chosen.shape), chosen, axis=-1)


class HeadLayer(ABC):
    """What takes lm_head's place (:func:`sft.vocabulary_layers`), before ``paddle.nn.Layer`` among the bases of its
    class.

    Attributes:
        base: The head, as the model had it.
    """

    base: Any

    @abstractmethod
    def beside(self, hidden: Any) -> Beside:
        """What belongs to the products of ``hidden`` [..., hidden] with the base's matrix."""

    def forward(self, hidden: Any) -> Any:
        """[..., hidden] → logits [..., V]."""
        products = self.base.products(hidden)
        return self.base.logits(self.beside(hidden).onto(products, self.base.vocabulary))

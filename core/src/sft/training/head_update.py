"""What an adapter in lm_head's place adds to the chunked loss (:class:`sft.Beside`), with its gradients."""

from __future__ import annotations

from typing import Any

import paddle

from sft.distributed.meeting import Vocabulary
from sft.models.beside import Beside
from sft.models.kernels import Kernels


class Update:
    """What stands beside the products with lm_head's matrix (:class:`Beside`), for chunks of positions. Gradients are
    written here, and add up."""

    def __init__(self, beside: Beside, columns: int, vocabulary: Vocabulary, kernels: Kernels) -> None:
        self.inputs, self.matrix = beside.inputs, beside.matrix
        self._vocabulary, self._kernels = vocabulary, kernels
        self._places = None if self.matrix is not None else beside.places(columns, vocabulary)
        found = [self.inputs] if self.matrix is None else [self.inputs, self.matrix]
        self.learns = paddle.is_grad_enabled() and any(not one.stop_gradient for one in found)
        """Whether gradients are wanted of any of it."""
        self._inputs_grads: list[Any] = []
        self._matrix_grad: Any = None

    def onto(self, products: Any, here: slice) -> Any:
        """Products float32 [n, columns] of the positions ``here``, which this may change, with what belongs to them."""
        inputs = self.inputs[here]
        if self.matrix is not None:
            return products.add_(self._kernels.product(inputs, self.matrix).astype("float32"))
        if self._places is None:
            return products
        own, columns = self._places
        chosen = paddle.index_select(inputs, own, axis=-1).astype("float32")
        return products.put_along_axis_(columns.expand(chosen.shape), chosen, axis=-1)

    def take(self, difference: Any, here: slice) -> Any:
        """Keep what belongs to the update of the products' gradient [n, columns] at the positions ``here``; the rest of
        it, which takes its place."""
        if self.matrix is not None:
            product = self._kernels.product(difference, self.matrix, transpose_y=True)
            share = self._kernels.product(self.inputs[here], difference, transpose_x=True).astype("float32")
            self._matrix_grad = share if self._matrix_grad is None else self._matrix_grad.add_(share)
        else:
            product = paddle.zeros([difference.shape[0], self.inputs.shape[-1]], difference.dtype)
            if self._places is not None:
                own, columns = self._places
                columns = columns.expand([difference.shape[0], columns.shape[0]])
                chosen = paddle.take_along_axis(difference, columns, axis=-1)
                product = product.put_along_axis_(own.expand(chosen.shape), chosen, axis=-1)
                difference = difference.put_along_axis_(columns, paddle.zeros_like(chosen), axis=-1)
        self._inputs_grads.append(self._vocabulary.total(product))
        return difference

    def gradients(self) -> list[Any]:
        """Of the inputs, and of the matrix where there is one, in their types; None of what does not learn."""
        inputs = paddle.concat(self._inputs_grads) if self._inputs_grads else None
        pairs = [(self.inputs, inputs), *([] if self.matrix is None else [(self.matrix, self._matrix_grad)])]
        return [None if one.stop_gradient or grad is None else grad.astype(one.dtype) for one, grad in pairs]

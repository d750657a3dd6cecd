"""Plugin ``neftune``: noise on the embeddings while training (arXiv 2310.05914)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sft

if TYPE_CHECKING:
    import numpy as np

    from sft import Batch, Run


@dataclass
class NeftuneOptions:
    neftune_noise_alpha: float = sft.option(5.0, "size α of the noise", above=0)


class Neftune(sft.Plugin):
    """Embeddings + U(-1, 1)·α/√(L·d) in training; L is the length of the token's own document, d the hidden size.

    In a packed row each document has its own L; padding gets no noise; evaluation and generation get none.
    """

    name = "neftune"
    api_version = 1
    summary = "Uniform noise on the embedding output while training."
    reference = "arXiv 2310.05914"
    Options = NeftuneOptions

    def __init__(self, options: NeftuneOptions) -> None:
        super().__init__(options)
        self._size: Any = None

    @sft.hookimpl
    def sft_adapt_model(self, run: Run, model: Any) -> None:
        embedding = model.get_input_embeddings()
        embedding.register_forward_post_hook(self._add)
        self._hidden = int(embedding.weight.shape[1])

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: Any) -> None:
        """Changes nothing: noise has no tensor that stays, freezes none, and adding it keeps nothing for backward."""

    @sft.hookimpl
    def sft_micro_batch(self, run: Run, batch: Batch) -> None:
        import paddle

        self._size = paddle.to_tensor(noise_size(batch, self.options.neftune_noise_alpha, self._hidden)).unsqueeze(-1)

    def _add(self, layer: Any, inputs: Any, output: Any) -> Any:
        import paddle

        if not layer.training or self._size is None:
            return output
        noise = paddle.uniform(output.shape, dtype="float32", min=-1.0, max=1.0) * self._size
        return output + noise.astype(output.dtype)


def noise_size(batch: Batch, alpha: float, hidden: int) -> np.ndarray:
    """α/√(L·d) for each token, 0 for padding: float32 [B, S]."""
    import numpy as np

    size = np.zeros((len(batch.lengths), batch.width), np.float32)
    for row, lengths in enumerate(batch.lengths):
        start = 0
        for length in lengths:
            size[row, start : start + length] = alpha / math.sqrt(length * hidden)
            start += length
    return batch.here(size)

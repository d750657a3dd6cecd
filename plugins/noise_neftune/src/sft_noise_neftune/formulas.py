"""The paper's formula, tried by `sft certify` on a small run: the group ``sft.certify`` in pyproject.toml."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import sft


def check_noise_is_that_of_the_paper(lab: Any) -> None:
    """Embeddings get U(±1)·α/√(L·d) in training, with the L of each token's own document; padding and evaluation get
    none (arXiv 2310.05914)."""
    alpha, lengths = 3.0, ((40, 10), (30,))
    rows = [[sft.Example(np.arange(3, 3 + n), np.arange(3, 3 + n)) for n in row] for row in lengths]
    batch = sft.assemble(rows, 0)

    def look(run: sft.Run) -> Any:
        import paddle

        embedding, ids = run.model.get_input_embeddings(), paddle.to_tensor(batch.input_ids)
        run.model.eval()
        plain = embedding(ids).numpy()
        run.hook.sft_micro_batch(run=run, batch=batch)
        quiet = embedding(ids).numpy()
        run.model.train()
        return plain, quiet, embedding(ids).numpy()

    plain, quiet, noisy = lab.run(started=look, neftune_noise_alpha=alpha).started
    assert np.array_equal(plain, quiet), "evaluation gets noise"
    noise, hidden = noisy.astype(np.float64) - plain, plain.shape[-1]
    for row, documents in enumerate(lengths):
        start = 0
        for length in documents:
            own = noise[row, start : start + length] * math.sqrt(length * hidden) / alpha
            most, deviation = np.abs(own).max(), own.std() * math.sqrt(3)
            assert 0.97 < most < 1.001, f"the noise of {length} tokens reaches {most:.3f} times α/√(L·d)"
            assert abs(deviation - 1) < 0.1, f"the noise of {length} tokens is not uniform ({deviation:.3f})"
            start += length
        assert not noise[row, start:].any(), "padding gets noise"


NEFTUNE = (check_noise_is_that_of_the_paper,)

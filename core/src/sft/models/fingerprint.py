"""Whether two model directories hold the same weights, told from a few numbers of each tensor."""

from __future__ import annotations

import hashlib

from sft.models.loading import ModelSource

CORNER = 8


def fingerprint(source: ModelSource) -> str:
    """32 hexadecimal digits of the first 8 (x 8) values of every tensor, in Hugging Face's names and in float32.

    Layout, sharding and file format make no difference; training, even of one layer, does.
    """
    import numpy as np

    weights = source.weights()
    corners = {}
    for original in weights:
        name = original if weights.layout == "hf" else source.family.to_hf(original)
        tied = name == "lm_head.weight" and source.config.tie_word_embeddings  # some writers store it twice
        if tied or name.endswith("rotary_emb.inv_freq"):
            continue
        corner = weights.read_corner(original, CORNER)
        if weights.layout == "paddle" and source.family.is_transposed(original, corner.ndim):
            corner = corner.T
        corners[name] = np.ascontiguousarray(corner).tobytes()
    digest = hashlib.sha256()
    for name in sorted(corners):
        digest.update(name.encode() + b"\0" + corners[name])
    return digest.hexdigest()[:32]

"""Whether two model directories hold the same weights, told from some values of each tensor."""

from __future__ import annotations

import hashlib

from sft.models.loading import ModelSource

PLACES = 32
CORNER = 8
FORM = "2:"
"""What the fingerprints of today begin with. Those of corners have no mark; files still hold them."""


def fingerprint(source: ModelSource) -> str:
    """``2:`` and 32 hexadecimal digits of values in every tensor, in Hugging Face's names and in float32: of a matrix
    those at 32 even places along each dimension, from its first to its last (1,024 values), of a vector all.

    Layout, sharding and file format make no difference; training, even of one layer, does, and so does any other change
    of a rectangle that is larger than a 31st of a matrix in each direction.
    """
    return FORM + _digest(source, grid=True)


def has_fingerprint(source: ModelSource, expected: str) -> bool:
    """Whether ``expected`` is the fingerprint of the weights of ``source``, in today's form or in the older one, of the
    first 8 (x 8) values of every tensor."""
    return expected == (fingerprint(source) if expected.startswith(FORM) else _digest(source, grid=False))


def _digest(source: ModelSource, grid: bool) -> str:
    import numpy as np

    weights = source.weights()
    samples = {}
    for original in weights:
        name = source.family.to_file(source.family.from_file(original, weights.layout), "hf")
        sample = weights.read_grid(original, PLACES) if grid else weights.read_corner(original, CORNER)
        if weights.layout == "paddle" and source.family.is_transposed(name, sample.ndim):
            sample = sample.T
        samples[name] = np.ascontiguousarray(sample).tobytes()
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(name.encode() + b"\0" + samples[name])
    return digest.hexdigest()[:32]

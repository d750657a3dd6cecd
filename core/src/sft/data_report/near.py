"""Records that are nearly the same: MinHash signatures (datasketch) of a sample of the different ones.

A sample of a fixed size keeps memory constant. It is chosen by the content's own hash, so that it depends neither on
the order of the records nor on a seed, and equal records are in it once.
"""

from __future__ import annotations

import heapq
import importlib.util
from typing import Any

import numpy as np

from sft.data_report.value import NearDuplicates, Pair

LIBRARY = "datasketch"
MISSING = "near duplicates are not looked for: pip install 'sft-core[data]', which brings datasketch"
THRESHOLD = 0.8
"""Records whose pieces are alike to this share (Jaccard) are near duplicates."""
LARGEST_SAMPLE = 10_000
PIECE = 5
"""Characters of a piece; texts are compared by the set of all their pieces, in whatever language they are."""
LONGEST = 100_000
"""Characters of a text that are compared."""
_PERMUTATIONS = 128
_AT_ONCE = 4096
_MARGIN = 0.15
"""Pairs are proposed from so much below the threshold on: there the index still overlooks some, above it hardly any."""
_PAIRS = 3


def is_there() -> bool:
    """Whether the library is installed."""
    return importlib.util.find_spec(LIBRARY) is not None


class NearSample:
    """The ``most`` different records with the smallest hashes, by their signatures."""

    def __init__(self, most: int = LARGEST_SAMPLE) -> None:
        from datasketch import MinHash

        self._most = most
        self._empty = MinHash(_PERMUTATIONS, hashfunc=int)
        self._heap: list[int] = []
        """Hashes of the sample, negative, so that the largest comes first."""
        self._held: dict[int, tuple[Any, int]] = {}
        """By hash: the signature, and the number of the record."""

    def takes(self, content: int) -> bool:
        """Whether a record with this hash of its content is to be added."""
        return content not in self._held and (len(self._heap) < self._most or content < -self._heap[0])

    def add(self, content: int, number: int, text: str) -> None:
        """Record ``number``, which :meth:`takes` has accepted."""
        if len(self._heap) == self._most:
            del self._held[-heapq.heappushpop(self._heap, -content)]
        else:
            heapq.heappush(self._heap, -content)
        self._held[content] = (self._signature(text), number)

    def _signature(self, text: str) -> Any:
        signature, pieces = self._empty.copy(), pieces_of(text)
        for start in range(0, len(pieces), _AT_ONCE):
            signature.update_batch(pieces[start : start + _AT_ONCE].tolist())
        return signature

    def near(self, different: int, places: Any, threshold: float = THRESHOLD) -> NearDuplicates:
        """What is alike in the sample of ``different`` records; ``places`` says where the record of a number stands."""
        from datasketch import MinHashLSH

        index, found = MinHashLSH(threshold - _MARGIN, _PERMUTATIONS), []
        signatures = {number: signature for signature, number in self._held.values()}
        for number, signature in sorted(signatures.items()):
            alike = [(signature.jaccard(signatures[other]), other) for other in sorted(index.query(signature))]
            likeness, earlier = max(alike, key=lambda one: one[0], default=(0.0, 0))
            if likeness >= threshold:
                found.append((number, earlier, likeness))
            index.insert(number, signature)
        pairs = [Pair(places[one], places[other], round(likeness, 3)) for one, other, likeness in found[:_PAIRS]]
        return NearDuplicates(len(self._held), different, threshold, len(found), pairs)


def pieces_of(text: str) -> np.ndarray:
    """uint32: a hash of each different piece of ``text``, whose case and white space do not count."""
    plain = " ".join(text[:LONGEST].casefold().split())
    codes = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(codes) < PIECE:
        codes = np.pad(codes, (0, PIECE - len(codes)))
    count = len(codes) - PIECE + 1
    mixed = np.zeros(count, np.uint64)
    for start in range(PIECE):
        mixed = (mixed ^ codes[start : start + count]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))

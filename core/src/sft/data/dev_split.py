"""Dev data taken out of training data (``dev_split``): which side a record is on, told from the record alone."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sft.data.bad_records import BadRecord
from sft.data.sources import Record

_ALL = 2**64


@dataclass(frozen=True)
class Side:
    """One side of a division: the records whose hash is below ``bound``, which are measured, or the others."""

    bound: int
    is_dev: bool

    @property
    def share(self) -> float:
        """The share of all hashes that is measured."""
        return self.bound / _ALL

    def holds(self, record: Record | BadRecord) -> bool:
        """Whether a record is on this side; one that cannot be read is among those to train on."""
        if isinstance(record, BadRecord):
            return not self.is_dev
        return (hash_of(record.value) < self.bound) == self.is_dev


def hash_of(value: dict[str, Any]) -> int:
    """64 bits of a record's SHA-256, as JSON with sorted names: the same for the same content, in whatever file."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def bound_of_share(share: float) -> int:
    """The bound below which ``share`` of all hashes are. A record stays on its side whatever others come."""
    return int(share * _ALL)


def bound_of_number(number: int, records: Iterable[Record | BadRecord]) -> int:
    """The bound below which are the ``number`` smallest hashes of ``records``; those of equal records count once.

    Records that come may send some from dev to train, never one from train to dev. 0 where there are no more than so
    many, so that nothing would be left to train on.
    """
    held: set[int] = set()
    largest: list[int] = []  # negative, so that the largest comes first
    for record in records:
        if isinstance(record, BadRecord):
            continue
        one = hash_of(record.value)
        if one in held or (len(held) > number and one > -largest[0]):
            continue
        held.add(one)
        heapq.heappush(largest, -one)
        if len(held) > number + 1:
            held.remove(-heapq.heappop(largest))
    return -largest[0] if len(held) > number else 0

"""Experts whose matrices lie stacked in files, one tensor a block for each kind, as transformers 5 writes them where
it is asked to (``save_original_format=False``)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_STACK = re.compile(r".+\.experts\.(gate_up_proj|down_proj)")


@dataclass(frozen=True)
class Part:
    """Where the matrix of one expert lies: in ``stack``, [experts, out, in], the rows from ``first`` to ``last``."""

    stack: str
    expert: int
    first: int
    last: int
    columns: int

    @property
    def shape(self) -> list[int]:
        return [self.last - self.first, self.columns]

    def within(self, where: Sequence[slice]) -> tuple[slice, slice, slice]:
        """What is at ``where`` of the matrix, as a place in the stack."""
        start, stop, step = where[0].indices(self.last - self.first)
        return slice(self.expert, self.expert + 1), slice(self.first + start, self.first + stop, step), where[1]


def is_stack(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of a file holds a matrix of every expert of a block."""
    return len(shape) == 3 and _STACK.fullmatch(name) is not None


def parts_of(stack: str, shape: Sequence[int]) -> dict[str, Part]:
    """The matrices in ``stack`` by the names that they have alone; of ``gate_up_proj``, gate lies above up."""
    base, _, kind = stack.rpartition(".")
    count, rows, columns = shape
    half = rows // 2
    kinds = {"gate_proj": (0, half), "up_proj": (half, rows)} if kind == "gate_up_proj" else {kind: (0, rows)}
    return {
        f"{base}.{expert}.{one}.weight": Part(stack, expert, first, last, columns)
        for expert in range(count)
        for one, (first, last) in kinds.items()
    }


def stacked(tensors: Iterable[tuple[str, Any]], parts: dict[str, Part]) -> Iterator[tuple[str, np.ndarray]]:
    """``tensors`` by name, of which those in ``parts`` become their stacks again; each stack follows its last part."""
    import numpy as np

    of_stack: dict[str, list[Part]] = {}
    for part in parts.values():
        of_stack.setdefault(part.stack, []).append(part)
    begun: dict[str, np.ndarray] = {}
    filled = dict.fromkeys(of_stack, 0)
    for name, tensor in tensors:
        if name not in parts:
            yield name, tensor
            continue
        part = parts[name]
        whole = of_stack[part.stack]
        if part.stack not in begun:
            experts, rows = 1 + max(one.expert for one in whole), max(one.last for one in whole)
            begun[part.stack] = np.empty((experts, rows, part.columns), tensor.dtype)
        begun[part.stack][part.expert, part.first : part.last] = tensor
        filled[part.stack] += 1
        if filled[part.stack] == len(whole):
            yield part.stack, begun.pop(part.stack)

"""One safetensors file, of which tensors and parts of them are read.

What is read is copied out of the file and not mapped: mapped pages of a whole model would stay in memory beside it. A
file that another takes the place of goes on to be read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import UsageError
from sft.small_files import check_plain, why
from sft.tensor_files import open_tensors

if TYPE_CHECKING:
    import numpy as np

_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "U16": "bfloat16"}
"""paddle has no bfloat16 in numpy: PaddleNLP's files say U16 for the same bits."""


class SafeFile:
    """The tensors of a file by name, in its own dtypes, bfloat16 as ``ml_dtypes`` has it."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`UsageError` where it is not a readable safetensors file."""
        self.path = path
        check_plain(path)
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({why(error)}); look at its permissions.") from error
        self._checked()  # that offsets are in order, and the file as long as they say
        size = int.from_bytes(self._file.read(8), "little")
        self._start = 8 + size
        self._tensors: dict[str, Any] = json.loads(self._file.read(size))
        self._tensors.pop("__metadata__", None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> list[int]:
        return list(self._tensors[name]["shape"])

    def dtype(self, name: str) -> str:
        """By numpy's name, or the file's own where numpy has none."""
        kind = str(self._tensors[name]["dtype"])
        return _TYPES.get(kind, kind)

    def read(self, name: str, where: tuple[slice, ...] = ()) -> np.ndarray:
        """What is at ``where`` of a tensor, slices of step 1; without it all."""
        import numpy as np

        shape, kind = self.shape(name), self._tensors[name]["dtype"]
        bounds = [(where[axis] if where else slice(None)).indices(length) for axis, length in enumerate(shape)]
        ranges = [(start, max(start, stop)) for start, stop, _ in bounds]
        divided = [axis for axis, (start, stop) in enumerate(ranges) if stop - start != shape[axis]]
        in_one_piece = not divided or all(stop - start == 1 for start, stop in ranges[: divided[-1]])
        dtype = self._dtype(kind)
        if dtype is None or not in_one_piece:
            opened = self._checked()  # anew, as it keeps every page that it reads
            found = np.asarray(opened.get_slice(name)[where] if where else opened.get_tensor(name))
            return found if dtype is None else found.view(dtype)
        first = sum(start * math.prod(shape[axis + 1 :]) for axis, (start, _) in enumerate(ranges))
        found = np.empty([stop - start for start, stop in ranges], dtype)
        self._fill(name, first, found)
        return found

    def read_onto(self, name: str, target: np.ndarray) -> None:
        """Give ``target``, of a tensor's shape, its values, rounded to the dtype of that: straight from the file where
        they lie as they do there, and otherwise some rows at a time."""
        from sft.arrays import PART, copy_onto

        shape = self.shape(name)
        if target.dtype == self._dtype(self._tensors[name]["dtype"]) and target.flags.c_contiguous:
            self._fill(name, 0, target)
            return
        if len(shape) != 2 or 0 in shape:
            copy_onto(target, self.read(name))
            return
        step = max(1, PART // shape[1])
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            copy_onto(target[rows], self.read(name, (rows, slice(None))))

    def _fill(self, name: str, first: int, target: np.ndarray) -> None:
        """Read as many values as ``target``, dense and of the file's dtype, has, beginning with value ``first``."""
        import numpy as np

        left = target.reshape(-1).view(np.uint8).data
        place = self._start + self._tensors[name]["data_offsets"][0] + first * target.itemsize
        while left:
            count = os.preadv(self._file.fileno(), [left], place)
            if count == 0:
                raise UsageError(f"{self.path} has become shorter while it was read; copy it again.")
            left, place = left[count:], place + count

    def _checked(self) -> Any:
        """The file as the library opens it, which is told by its path."""
        opened = open_tensors(self.path)
        if not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
            raise replaced(self.path)
        return opened

    def _dtype(self, kind: str) -> Any:
        """None: one that is left to the library."""
        import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
        import numpy as np

        return np.dtype(_TYPES[kind]) if kind in _TYPES else None


def replaced(path: Path) -> UsageError:
    """Tensors of two models may not be mixed: a run may publish its result where one is read."""
    return UsageError(f"{path} has been replaced while it was read; try again when nothing writes there.")

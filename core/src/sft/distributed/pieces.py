"""Optimizer state on disk, by the structured name of the whole parameter: readable under any division of it.

A file holds the state of what one process updates. Where that is a piece of a parameter, the file's metadata say which
one. A reader puts a tensor together from the pieces in all files, and takes from it the piece that it updates itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft.distributed.parts import Part
from sft.errors import UsageError
from sft.files import save_tensors

METADATA = "sft.pieces"


@dataclass(frozen=True)
class Piece:
    """Values ``start`` to ``stop`` of a ``part`` of a parameter, in memory order.

    Attributes:
        written: Whether this process writes it; if not, another one that holds the same does.
    """

    part: Part
    start: int
    stop: int
    written: bool = True

    @property
    def is_whole(self) -> bool:
        return self.part.count == 1 and (self.start, self.stop) == (0, math.prod(self.part.shape))

    def of(self, whole: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """This piece of the whole tensor, in the ``shape`` of what is stepped (which may end in padding)."""
        values = self.part.read(whole.__getitem__).reshape(-1)[self.start : self.stop]
        filled = np.zeros(math.prod(shape), whole.dtype)
        filled[: values.size] = values
        return filled.reshape(shape)

    def put(self, values: np.ndarray, whole: np.ndarray) -> None:
        """Write this piece's ``values`` [stop - start] to their place in ``whole``, which has the whole shape."""
        part = np.ascontiguousarray(self.part.read(whole.__getitem__))
        part.reshape(-1)[self.start : self.stop] = values
        self.part.write(part, whole)


def save_pieces(
    path: Path, state: Mapping[str, np.ndarray], pieces: Mapping[str, Piece], grains: Mapping[str, int]
) -> None:
    """Write an optimizer's ``state`` (``NAME.KIND``), except for what another process writes.

    ``grains`` says of a kind how many values of the parameter one of its numbers stands for (0: all; not listed: one).
    """
    tensors: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        piece = pieces[name]
        if not piece.written:
            continue
        grain = grains.get(kind, 1)
        if not grain:
            tensors[key] = value
            continue
        tensors[key] = np.ascontiguousarray(value.reshape(-1)[: -(-(piece.stop - piece.start) // grain)])
        if piece.is_whole and grain == 1:  # which may have been stepped flat
            tensors[key] = tensors[key].reshape(piece.part.shape)
        if not piece.is_whole:
            about[name] = {"part": asdict(piece.part), "start": piece.start, "stop": piece.stop}
    save_tensors(path, tensors, {METADATA: json.dumps(about)} if about else None)


class SavedState:
    """The optimizer state in ``folder``, whoever wrote it: files whose names begin with ``stem``; ``grains`` as
    :func:`save_pieces` has them."""

    def __init__(self, folder: Path, stem: str, grains: Mapping[str, int]) -> None:
        from safetensors import safe_open

        self.folder, self._grains = folder, grains
        paths = sorted(folder.glob(f"{stem}*.safetensors"))
        if not paths:
            raise UsageError(f"{folder} has no {stem}.safetensors; resume from another checkpoint.")
        # The files stay open: each opening reads what a file says of all its tensors.
        self._where: dict[str, list[tuple[Any, Piece | None]]] = {}
        for path in paths:
            try:
                file = safe_open(str(path), framework="numpy")
                about = json.loads((file.metadata() or {}).get(METADATA, "{}"))
                for key in file.keys():  # noqa: SIM118  (no dict)
                    name, _, kind = key.rpartition(".")
                    values = about.get(name) if grains.get(kind, 1) else None
                    self._where.setdefault(key, []).append((file, _piece(values) if values else None))
            except MemoryError:
                raise
            except Exception as error:
                raise UsageError(f"{path} cannot be read ({error}); resume from another checkpoint.") from error

    def piece(self, key: str, piece: Piece, shape: tuple[int, ...]) -> np.ndarray:
        """The ``piece`` of a tensor that is stepped here, in the ``shape`` of what is stepped; KeyError without it.

        Raises :class:`UsageError` where one number stands for several values, and was written for others than are now
        together.
        """
        grain = self._grains.get(key.rpartition(".")[2], 1)
        if grain > 1:
            return self._blocks(key, piece, -(-math.prod(shape) // grain), grain)
        whole = self.whole(key)
        return piece.of(whole, shape) if grain else whole

    def _blocks(self, key: str, piece: Piece, count: int, grain: int) -> np.ndarray:
        """The ``count`` numbers for ``piece``, each of which stands for ``grain`` values."""
        size = math.prod(piece.part.local_shape)
        wanted = np.zeros(count, self._where[key][0][0].get_tensor(key).dtype)
        missing = -(-(piece.stop - piece.start) // grain)
        for file, stored in self._where[key]:
            stored = stored or Piece(Part(piece.part.shape, 0, 0, 1), 0, math.prod(piece.part.shape))
            begin, end = max(piece.start, stored.start), min(piece.stop, stored.stop)
            if stored.part != piece.part or begin >= end:
                continue
            edges = {piece.start, stored.start, *({piece.stop, stored.stop} - {size})}
            if (piece.start, piece.stop) != (stored.start, stored.stop) and any(edge % grain for edge in edges):
                continue
            values = file.get_tensor(key)[(begin - stored.start) // grain : -(-(end - stored.start) // grain)]
            start = (begin - piece.start) // grain
            wanted[start : start + len(values)] = values
            missing -= len(values)
        if missing:
            raise UsageError(
                f"{self.folder} holds {key} in blocks of {grain} values, which the processes of this run cut otherwise "
                "than those that wrote it; resume with the number of processes and the parallel plan of that run."
            )
        return wanted

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def whole(self, key: str) -> np.ndarray:
        """The whole tensor, put together if it was written in pieces. Not for what stands for several values each."""
        stored = self._where[key]
        if stored[0][1] is None:
            return np.asarray(stored[0][0].get_tensor(key))
        whole: np.ndarray | None = None
        covered = 0
        for file, piece in stored:
            assert piece is not None
            values = np.asarray(file.get_tensor(key))
            if whole is None:
                whole = np.zeros(piece.part.shape, values.dtype)
            piece.put(values, whole)
            covered += values.size
        assert whole is not None
        if covered != whole.size:
            raise UsageError(
                f"{self.folder} lacks pieces of {key} ({covered} of {whole.size} values); a process's file is missing: "
                "resume from another checkpoint."
            )
        return whole


def _piece(values: dict[str, Any]) -> Piece:
    part = values["part"]
    fused = tuple(part.get("fused", ()))
    return Piece(
        Part(tuple(part["shape"]), part["axis"], part["index"], part["count"], fused), values["start"], values["stop"]
    )

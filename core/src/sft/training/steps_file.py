"""``steps.bin``: loss and gradient norm of every step of a run, whatever ``logging_steps`` is.

Sixteen bytes that say what the file is, then sixteen for each step from 1 on: its loss (as ``sft_step_ended`` has it)
and its gradient norm, both float64 in little-endian order. A step that was skipped has numbers that are not finite. Of
a step whose numbers are not known, since a file was lost or an earlier version computed it, the norm is -1.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sft.errors import UsageError
from sft.files import is_own_file, replaced, sync

NAME = "steps.bin"
HEAD = b"sft steps, 1\n\0\0\0"
SIZE = 16
_RECORD = struct.Struct("<2d")
_UNKNOWN = _RECORD.pack(float("nan"), -1.0)


@dataclass(frozen=True)
class StepFigures:
    """Figures of steps; those of step N are at N - 1.

    ``loss`` and ``grad_norm`` are float64 [steps], as they were computed, also of steps that were skipped: there one of
    them is not finite. Where ``known``, bool [steps], is false, nobody wrote them down, and both are NaN.
    """

    loss: np.ndarray
    grad_norm: np.ndarray
    known: np.ndarray

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def taken(self) -> np.ndarray:
        """bool [steps]: those that are known and were not skipped."""
        return self.known & np.isfinite(self.loss) & np.isfinite(self.grad_norm)


def read_steps(folder: Path) -> StepFigures | None:
    """What the run in ``folder`` wrote down of its steps; None where it wrote no such file. Raises :class:`UsageError`
    where the file is something else, or cannot be read."""
    path = folder / NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); check the disk and the permissions.") from error
    if not content.startswith(HEAD) and not HEAD.startswith(content):
        raise UsageError(f"{path} is not the figures of a run's steps, or of a later version of sft; move it away.")
    figures = np.frombuffer(content[len(HEAD) :][: SIZE * _whole(content)], "<f8").reshape(-1, 2).astype(np.float64)
    known = ~(figures[:, 1] < 0)
    return StepFigures(figures[:, 0], np.where(known, figures[:, 1], np.nan), known)


def _whole(content: bytes) -> int:
    """How many steps are in a file's ``content``; one may have been under way when its process was killed."""
    return max(0, len(content) - len(HEAD)) // SIZE


@dataclass
class StepsFile:
    """Appends to ``steps.bin``. Its state travels in checkpoints, so that a resumed run writes the same file.

    Without a ``path`` it only counts: another process of the run writes.
    """

    path: Path | None
    count: int = 0
    """Steps that it has."""
    _digest: Any = field(default_factory=hashlib.sha256)
    """Of these, by which a resumed run sees that they have changed."""
    _stream: BinaryIO | None = None

    def add(self, step: int, loss: float, grad_norm: float) -> None:
        """Write down a step: nothing that it has been told is lost where the process is killed."""
        record = _UNKNOWN * (step - 1 - self.count) + _RECORD.pack(loss, grad_norm)
        if self.path is not None:
            self._append(self.path, record)
        self._digest.update(record)
        self.count = step

    def _append(self, path: Path, record: bytes) -> None:
        if self._stream is None:
            self._stream = path.open("ab", buffering=0)
            record = record if self._stream.tell() else HEAD + record
        if self._stream.write(record) != len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def lost(self) -> None:
        """Begin the file anew if it is not there any more; earlier steps are then not known."""
        if self.path is not None and not self.path.exists():
            self.close()
            self.count, self._digest = 0, hashlib.sha256()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "digest": self._digest.hexdigest()}

    def rewind(self, step: int, state: Mapping[str, Any] | None, written: Path) -> str | None:
        """Go back to the checkpoint of ``step``, and keep what ``written`` had by then, as its ``state`` says (None: an
        earlier version wrote it). Where that is not what it was, what is there is kept, and a clause says so."""
        state = state or self.__class__(None).state()
        self.count = min(int(state["count"]), step)
        if self.path is None:
            return None
        content = written.read_bytes() if written.is_file() else b""
        content = content if content.startswith(HEAD) else b""
        kept = content[len(HEAD) : len(HEAD) + SIZE * min(_whole(content), self.count)]
        self._digest = hashlib.sha256(kept)
        is_same = self._digest.hexdigest() == state["digest"]
        self._keep(self.path, written, HEAD + kept if kept else b"")
        was, self.count = self.count, len(kept) // SIZE
        if is_same:
            return None
        if self.count < was:
            return f"{written} has the figures of {self.count:,} of the {was:,} steps up to step {step} only"
        return f"{written} has been changed since step {step}, so the figures of earlier steps may not be theirs"

    def _keep(self, path: Path, written: Path, content: bytes) -> None:
        """Let ``content``, with which ``written`` begins, be all that ``path`` holds."""
        if not content:
            path.unlink(missing_ok=True)
        elif is_own_file(path, written):
            os.truncate(path, len(content))
            sync(path)
        else:
            with replaced(path) as staging:
                staging.write_bytes(content)

"""Whether data files are what they were when a run began to read them, told without reading all of a large one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sft.errors import UsageError
from sft.files import state_of

BLOCK = 1 << 16
BLOCKS = 1024
"""Of a larger file than so many blocks (64 MiB) as many are read, at even places from its first byte to its last."""


class Contents:
    """What is in ``files`` now. Raises :class:`UsageError` where one cannot be read."""

    def __init__(self, files: list[Path]) -> None:
        self._states = {path: state_of(path) for path in files}
        self._digests = {path: digest_of(path) for path in files}
        names = (f"{path.name} {digest}" for path, digest in self._digests.items())
        self.digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        """Of the names of the files, and what is in them."""

    def check_same(self) -> None:
        """Refuse to go on where a file has changed since. Costs nothing as long as none has been written to."""
        for path, before in self._states.items():
            state = state_of(path)
            if state != before and digest_of(path) != self._digests[path]:
                raise UsageError(
                    f"{path} has been changed while this run reads it; put it back as it was and resume, or start a "
                    "new run."
                )
            self._states[path] = state


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal: of its size, and of all of it or of ``BLOCKS`` blocks."""
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(f"{size} ".encode())
        with path.open("rb") as file:
            if size <= BLOCK * BLOCKS:
                while part := file.read(BLOCK):
                    digest.update(part)
            else:
                for number in range(BLOCKS):
                    file.seek(number * (size - BLOCK) // (BLOCKS - 1))
                    digest.update(file.read(BLOCK))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error
    return digest.hexdigest()

"""A disk that is full from one operation on, as Python sees it: for tests in the process that writes.

An audit hook of Python refuses what would make or rename a file; what does not go through Python is replaced.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_WRITES = ("os.mkdir", "os.rename", "os.link", "os.truncate")


class FullDisk:
    """The disk under ``folder``. Nothing can be removed from Python's audit hooks, so there is one of this."""

    def __init__(self, folder: Path) -> None:
        self.count = 0
        """Operations since :meth:`from_operation`."""
        self._folder, self._first, self._code = str(folder), 0, 0

    @contextmanager
    def from_operation(self, number: int, code: int) -> Iterator[None]:
        """Operation ``number``, from 0, and all later ones fail with this errno."""
        self.count, self._first, self._code = 0, number, code
        try:
            yield
        finally:
            self._code = 0

    def refuse(self, path: Any) -> None:
        """An operation that needs room in ``path``."""
        if not self._code or not os.fsdecode(path).startswith(self._folder):
            return
        self.count += 1
        if self.count > self._first:
            raise OSError(self._code, os.strerror(self._code), os.fsdecode(path))

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._code:
            return
        if event in _WRITES and isinstance(arguments[0], (str, bytes, os.PathLike)):
            self.refuse(arguments[0])
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            _, mode, flags = arguments
            if set(mode) & set("wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR):
                self.refuse(arguments[0])


_disks: list[FullDisk] = []


def full_disk(folder: Path, patch: pytest.MonkeyPatch) -> FullDisk:
    """The disk under ``folder``, with room until :meth:`FullDisk.from_operation`."""
    import safetensors.numpy

    if not _disks:
        sys.addaudithook(lambda event, arguments: [disk.heard(event, arguments) for disk in _disks] and None)
    disk = FullDisk(folder)
    _disks[:] = [disk]
    own_save: Callable[..., None] = safetensors.numpy.save_file
    own_sync: Callable[[int], None] = os.fsync

    def save_file(tensors: Any, path: Any, *more: Any, **named: Any) -> None:
        disk.refuse(path)
        own_save(tensors, path, *more, **named)

    def fsync(handle: int) -> None:
        """What was written may find no room until it goes to the disk."""
        disk.refuse(os.readlink(f"/proc/self/fd/{handle}"))
        own_sync(handle)

    patch.setattr(safetensors.numpy, "save_file", save_file)
    patch.setattr(os, "fsync", fsync)
    return disk

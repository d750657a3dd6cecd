"""One run in a folder at a time: a lock that dies with its owner, and that other machines see on a disk they share.

The system holds the lock, so a process that is killed leaves none. A system does not always know of the locks of
another machine, and some disks have none: therefore the file also says who holds it, and its time goes on while its
owner lives.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import SftError, UsageError
from sft.files import STAGING
from sft.foreign_text import shown

NAME = "run.lock"
BEAT = 10.0
"""Seconds after which the owner sets the time of its file anew."""
SILENCE = 60.0
"""Seconds without that after which an owner on another machine is taken for dead."""
_TRIES = 6
"""Attempts to lock, 50 ms apart: whoever only looks has the lock for a moment."""


@dataclass(frozen=True)
class Holder:
    """Who holds the folder of a run: the process that writes there.

    Attributes:
        pid: Its number on its machine; None where it has not said it yet.
        host: The name of that machine.
        since: When it took the folder, in its local time, ISO 8601.
        is_here: Whether that is this machine, as far as the system's own name for itself tells.
    """

    pid: int | None
    host: str
    since: str
    is_here: bool


class FolderLock:
    """The lock of a folder that exists, held until :meth:`release`, or until this process ends."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        """Take it. Raises :class:`UsageError`, which names the other owner, where it is held."""
        self._path = folder / NAME
        self._handle = _free(self._path, say)
        self._said = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "machine": _machine(),
                "token": uuid.uuid4().hex,
            }
        ).encode()
        try:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, self._said, 0)
        except OSError:
            os.close(self._handle)
            raise
        self._released = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="sft-folder-lock", daemon=True)
        self._beats.start()

    @property
    def is_held(self) -> bool:
        """Whether no other run has taken the folder over, as it may while this process was stopped."""
        return not self._released.is_set() and _said_in(self._path) in (None, self._said)

    def check(self) -> None:
        """:class:`SftError` if it is not held any more."""
        if not self.is_held:
            raise SftError(
                f"Another run, {_who(_owner(_said_in(self._path) or b''))}, has taken {self._path.parent} over while "
                "this one was silent; this one ends, and writes nothing more there."
            )

    def release(self) -> None:
        """Let others take it. Safe to call twice."""
        if self._released.is_set():
            return
        self._released.set()
        self._beats.join(BEAT)
        with contextlib.suppress(OSError):
            if _is_at(self._handle, self._path) and _said_in(self._path) == self._said:
                self._path.unlink()
        os.close(self._handle)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):  # a disk that cannot be reached; saving says so
                os.utime(self._handle)


def is_used(folder: Path) -> bool:
    """Whether a run on this machine holds ``folder`` now."""
    try:
        with (folder / NAME).open("rb") as file:
            return _is_locked(file.fileno())[0]
    except OSError:
        return False


def holder_of(folder: str | os.PathLike[str]) -> Holder | None:
    """The run that holds ``folder`` now, on this machine or, by the time of its lock file, on another; None where none
    does. Nothing is changed there, and nothing is waited for.

    Where ``run.json`` says that a run is under way and nobody holds its folder, the run has died: it was killed, or its
    machine went down. Another machine is believed for a minute after its last sign of life, if the clocks agree."""
    path = Path(folder) / NAME
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # whatever lies there under that name
    except OSError:
        return None
    try:
        beat, said = os.fstat(handle).st_mtime, _owner(os.read(handle, 4096))
        is_locked, system_knows = _is_locked(handle)
    except OSError:
        return None
    finally:
        os.close(handle)
    is_here = said.get("machine") in (None, _machine())
    if not is_locked and ((system_knows and is_here) or time.time() - beat >= SILENCE):
        return None
    pid, host, since = said.get("pid"), said.get("host", ""), said.get("since", "")
    return Holder(pid if isinstance(pid, int) else None, shown(host, 80), shown(since, 80), is_here)


def _is_locked(handle: int) -> tuple[bool, bool]:
    """Whether somebody has locked the file, and whether the system knows: some disks have no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True, True
    except OSError:
        return False, False
    return False, True


def check_unused(folder: Path, say: Callable[[str], None]) -> None:
    """:class:`UsageError` if a run holds ``folder``. Nothing is changed there."""
    path = folder / NAME
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        _check(path, handle, fcntl.LOCK_SH, say)
    finally:
        os.close(handle)


def _free(path: Path, say: Callable[[str], None]) -> int:
    """The locked file, which nobody else holds."""
    while True:
        try:
            handle, is_new = _opened(path)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.ELOOP):
                raise
            raise UsageError(f"{path} cannot be opened ({error.strerror}); choose another folder.") from error
        try:
            if is_new:
                _lock(path, handle, fcntl.LOCK_EX)
            else:
                _check(path, handle, fcntl.LOCK_EX, say)
            if _is_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its owner has removed it meanwhile


def _opened(path: Path) -> tuple[int, bool]:
    """The file, and whether this process has made it: on a disk without locks one alone does. No link is followed, for
    what it leads to would be overwritten."""
    while True:
        with contextlib.suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        with contextlib.suppress(FileNotFoundError):  # its owner has removed it between two looks
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW), False


def _check(path: Path, handle: int, kind: int, say: Callable[[str], None]) -> None:
    """Lock ``handle``; :class:`UsageError` where a living process holds it."""
    system_knows = _lock(path, handle, kind)
    owner = _owner(os.pread(handle, 4096, 0))
    if (system_knows and owner.get("machine") in (None, _machine())) or not _is_at(handle, path):
        return  # its owner would still have the lock
    if _is_silent(path, owner, say):
        return
    raise UsageError(_in_use(path, owner))


def _lock(path: Path, handle: int, kind: int) -> bool:
    """Whether the system has locked it; False where the disk has no locks."""
    for attempt in range(_TRIES):
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt + 1 < _TRIES:
                time.sleep(0.05)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK):
                raise
            return False
    raise UsageError(_in_use(path, _owner(_said_in(path) or b"")))


def _is_silent(path: Path, owner: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Whether the owner's time has stood still for SILENCE seconds, by the clock of the disk.

    A clock that has been set makes them look long ago, so at least one beat is waited for whatever it says."""
    try:
        first = path.stat().st_mtime
    except FileNotFoundError:
        return True
    left = min(max(SILENCE - (_clock_of(path) - first), 2 * BEAT), SILENCE)
    say(f"note: waiting up to {left:.0f} s to see whether {_who(owner)}, still uses {path.parent}")
    began = time.monotonic()
    while time.monotonic() - began < left:
        time.sleep(min(1.0, BEAT / 10))
        try:
            if path.stat().st_mtime != first:
                return False
        except FileNotFoundError:  # it has just ended
            return True
    return True


def _clock_of(path: Path) -> float:
    """What time it is for the disk, whose machine may have another; this machine's, where nothing can be written."""
    probe = path.with_name(f"{STAGING}clock-{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    """Names the running system: two with one name have their own locks, and a lock of before a restart is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _said_in(path: Path) -> bytes | None:
    try:
        return path.read_bytes()[:4096]
    except OSError:
        return None


def _owner(said: bytes) -> dict[str, Any]:
    """What the file says of its owner; empty where it was killed before it had written that."""
    try:
        found = json.loads(said)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _who(owner: dict[str, Any]) -> str:
    if not owner:
        return "a process that has not said its number"
    number, host, since = (shown(owner.get(key), 80) for key in ("pid", "host", "since"))
    return f"process {number} on {host}, since {since}"


def _in_use(path: Path, owner: dict[str, Any]) -> str:
    return (
        f"Another run is writing to {path.parent} ({_who(owner)}); wait until it has ended, stop it, or choose another "
        "output_dir."
    )

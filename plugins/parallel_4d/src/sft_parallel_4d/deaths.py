"""Which ranks of a launch were killed: they are gone without a word of their own, and before anybody ended the rest."""

from __future__ import annotations

import signal
from pathlib import Path


class Deaths:
    """Looks at the ranks of the launch in ``folder`` again and again, since what comes after the first death is mostly
    its consequence."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._signals: dict[int, int | None] = {}
        """Of each rank that is gone, the signal that ended it where the system still says it."""
        self._first: set[int] = set()

    def look(self) -> None:
        """See who is gone. Once paddle's launcher ends the others nobody's death tells anything."""
        gone = {rank: how for rank, how in self._gone().items() if rank not in self._signals}
        if not gone or "Pod failed" in read(self._folder / "launcher.log"):
            return
        self._first = self._first or set(gone)
        self._signals.update(gone)

    @property
    def killed(self) -> tuple[int, ...]:
        """The ranks of which the system still says that they were."""
        return tuple(sorted(rank for rank, how in self._signals.items() if how == signal.SIGKILL))

    @property
    def lost(self) -> tuple[int, ...]:
        """These; if the system has not said so of any, those that were gone first. What loses its peers may abort by
        itself (gloo and NCCL do), which is not to count."""
        return self.killed or tuple(sorted(self._first))

    def _gone(self) -> dict[int, int | None]:
        found = {}
        for path in self._folder.glob("rank.*"):
            number = read(path)
            if number.isdecimal() and not self._has_spoken(int(number)):
                is_gone, how = _fate(int(path.suffix[1:]))
                if is_gone and not self._has_spoken(int(number)):  # its last word may have come in between
                    found[int(number)] = how
        return found

    def _has_spoken(self, rank: int) -> bool:
        """Whether a rank has come to an end of its own, or has said why it ends."""
        return (self._folder / f"ended.{rank}").exists() or (self._folder / f"rank{rank}.error").exists()


def _fate(process: int) -> tuple[bool, int | None]:
    """Whether a process is gone, and the signal that ended it, as long as its parent has not asked (Linux)."""
    stat = read(Path(f"/proc/{process}/stat"))
    if not stat:
        return Path("/proc/self/stat").exists(), None
    fields = stat.rpartition(")")[2].split()
    if fields[0] not in ("Z", "X"):
        return False, None
    status = int(fields[-1]) & 0x7F  # proc(5): exit_code comes last
    return True, status or None


def read(path: Path) -> str:
    """The text of a file that may be gone, or not there yet; then none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

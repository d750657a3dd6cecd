"""Where the ranks say how far they are: who is missing, and what went wrong first, is decided in this one place."""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sft_parallel_4d.door import SECONDS, StrangerError, let_in

SETTLE = 0.5
"""Seconds that an error waits before it counts: it may be the consequence of a rank that was killed."""
LONGEST = 1 << 17
"""Bytes of a line; more is not from a rank."""
STRANGERS = 64
"""Connections at a time that have not shown the token."""


class News(NamedTuple):
    """What went wrong in ``rank``, in a sentence for people; ``gone``: the ranks that ended without a word, as data."""

    rank: int
    text: str
    gone: tuple[int, ...] = ()


@dataclass
class _Seen:
    """A rank as it was last heard: phases entered and parts of the last one, its name, seconds waited in it (None: it
    works), and when."""

    count: list[int]
    phase: str
    waited: float | None
    at: float
    done: bool
    lost: bool = False

    @property
    def where(self) -> str:
        return f"{'after' if self.waited is None else 'in'} {self.phase!r}"


WAYS: dict[str, Callable[[Sequence[float]], float]] = {"sum": sum, "largest": max}
"""What numbers that ranks bring can come to. A sum is in the order of ranks, so that it repeats."""


@dataclass
class Meeting:
    """A phase to which ranks bring as many numbers each."""

    brought: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    result: list[float] | None = None
    left: set[int] = field(default_factory=set)
    """Ranks that have been answered with it."""

    def close(self) -> None:
        """All have come. Raises ValueError where they bring something else."""
        (way,) = {way for brings in self.brought.values() for way in brings}
        columns = zip(*(self.brought[rank][way] for rank in sorted(self.brought)), strict=True)
        self.result = [float(WAYS[way](column)) for column in columns]


class Board(socketserver.ThreadingTCPServer):
    """Serves ``world`` ranks, which call every ``beat`` seconds, and wait for each other at most ``timeout``.

    It listens at ``host`` alone, and to nobody who does not show ``key``.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, host: str, port: int, world: int, timeout: float, beat: float, key: str) -> None:
        super().__init__((host, port), _Line)
        self.key = key
        self.strangers = threading.BoundedSemaphore(STRANGERS + world)
        self.first: News | None = None
        """What went wrong first."""
        self._world, self._timeout, self._beat = world, timeout, beat
        self._seen: dict[int, _Seen] = {}
        self._connected: set[int] = set()
        self._told: set[int] = set()
        self._answered: dict[int, int] = {}
        self._meetings: dict[int, Meeting] = {}
        """By phases entered: those that not all ranks have left yet."""
        self._lock = threading.Condition()
        threading.Thread(target=self.serve_forever, args=(0.1,), name="sft-board", daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whatever a stranger sends: nothing is printed."""

    def connected(self, rank: Any) -> int:
        """A rank has shown the token. Raises :class:`StrangerError` where there is none of that number, or it is
        connected already."""
        with self._lock:
            if type(rank) is not int or not 0 <= rank < self._world or rank in self._connected:
                raise StrangerError("no such rank")
            self._connected.add(rank)
            return rank

    def heard(self, rank: int, said: dict[str, Any]) -> dict[str, Any]:
        """Note what a rank said; what it is answered."""
        error = said.get("error")
        if error is not None:
            time.sleep(SETTLE)
        with self._lock:
            seen = _Seen(said["count"], said["phase"], said["waited"], time.monotonic(), bool(said.get("done")))
            self._seen[rank] = seen
            if error is not None:
                self.first = self.first or News(rank, f"rank {rank}: {error}")
                self._lock.notify_all()
            elif not seen.done and seen.waited is not None and seen.waited > self._timeout:
                self.first = self.first or self.missing()
            together = self._met(rank, said["count"][0], said["brings"]) if "brings" in said else None
        if error is not None:  # the launcher may end this machine's ranks as soon as one of them has ended
            self.wait_for(lambda board: board.all_told(but=rank), 3 * self._beat)
        return {"first": self.first, "absent": self._absent(), "together": together, "asked": said["asked"]}

    def _met(self, rank: int, phases: int, brings: dict[str, list[float]]) -> list[float] | None:
        """What all ranks have brought to a phase comes to. None: not all have come yet; whoever has asks again, and
        is answered at once when the last one comes."""
        meeting = self._meetings.setdefault(phases, Meeting())
        meeting.brought[rank] = brings
        if meeting.result is None and len(meeting.brought) == self._world:
            try:
                meeting.close()
            except ValueError:
                what = self._seen[rank].phase
                self.first = self.first or News(
                    -1, f"The ranks bring different numbers to {what!r}; run one sft in all."
                )
            for earlier in [number for number in self._meetings if number < phases]:
                del self._meetings[earlier]  # who is here has left them
            self._lock.notify_all()
        self._lock.wait_for(lambda: meeting.result is not None or self.first, self._beat / 2)
        return meeting.result

    def lost(self, rank: int) -> None:
        """The connection of a rank has ended; it should have said before that it is done, or why it fails."""
        with self._lock:
            seen = self._seen.get(rank)
            if seen is None:  # it has said nothing, and may come again
                self._connected.discard(rank)
                return
            seen.lost = True
            self._lock.notify_all()
            if not seen.done:
                self.first = self.first or News(
                    rank,
                    f"rank {rank} ended without a word, last seen {seen.where}; was it killed, or out of memory?",
                    gone=(rank,),
                )

    def missing(self, at_end: bool = False) -> News:
        """Who keeps the others waiting, which are done ``at_end``: ranks that never came, are silent, or elsewhere."""
        now, furthest = time.monotonic(), max(self._seen.values(), key=lambda seen: (seen.done == at_end, seen.count))
        absent = self._absent()
        texts = {rank: f"rank {rank} has never appeared" for rank in absent}
        for rank, seen in sorted(self._seen.items()):
            if now - seen.at > self._timeout / 2 and not seen.done:
                texts[rank] = f"rank {rank} has been silent for {now - seen.at:.0f} s, last seen {seen.where}"
            elif seen.done != at_end or (not at_end and seen.count < furthest.count):
                texts[rank] = f"rank {rank} is {seen.where}" + (" and has ended" if seen.done else "")
        waited = f"have waited {self._timeout:g} s in {furthest.phase!r}"
        if not texts:
            return News(-1, f"All ranks {waited} for each other; look at the network between them.")
        named = sorted(texts)
        details = ", ".join(texts[rank] for rank in named[:8])
        return News(named[0], f"{_are_missing(named)}: the others {waited}; {details}.")

    def told(self, rank: int) -> None:
        """A rank has been answered with what went wrong."""
        self._told.add(rank)

    def all_told(self, but: int | None = None) -> bool:
        listening = {rank for rank, seen in self._seen.copy().items() if not (seen.done or seen.lost)}
        return listening - {but} <= self._told

    def answered(self, rank: int, phases: int, has_met: bool) -> None:
        """A rank has got the answer to what it said when it had entered so many phases; whether with a result."""
        self._answered[rank] = phases
        if has_met:
            with self._lock:
                if (meeting := self._meetings.get(phases)) is not None:
                    meeting.left.add(rank)
                    if len(meeting.left) == self._world:
                        self._lock.notify_all()

    def until_answered(self, phases: int) -> None:
        """Wait until all ranks that live have the result of a meeting."""

        def all_have() -> bool:
            return phases not in self._meetings or len(self._meetings[phases].left) == self._world or bool(self.first)

        with self._lock:
            self._lock.wait_for(all_have, self._timeout)

    def all_answered(self, phases: int) -> bool:
        return len(self._answered) == self._world and all(count >= phases for count in self._answered.copy().values())

    def all_done(self) -> bool:
        return len(self._seen) == self._world and all(seen.done for seen in self._seen.copy().values())

    def wait_for(self, condition: Callable[[Board], Any], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition(self) and time.monotonic() < deadline:
            time.sleep(0.02)

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def _absent(self) -> list[int]:
        if len(self._seen) == self._world:
            return []  # asked at each line of each rank
        return [rank for rank in range(self._world) if rank not in self._seen]


def understood(line: bytes) -> dict[str, Any]:
    """What a rank says in ``line``; ValueError for what no rank says: the board computes with it, and repeats it."""
    try:
        said = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(said, dict):
        raise ValueError("no object")
    count, waited, phase, error = said.get("count"), said.get("waited"), said.get("phase"), said.get("error")
    if any(type(said.get(name)) is not int or said[name] < 0 for name in ("rank", "asked")):
        raise ValueError("no rank, or no number of its question")
    if not (isinstance(count, list) and len(count) == 2 and all(type(n) is int and 0 <= n < 2**63 for n in count)):
        raise ValueError("no count")
    if waited is not None and not (type(waited) in (int, float) and 0 <= waited < 1e12):
        raise ValueError("no seconds")
    if not isinstance(phase, str) or not phase.isprintable() or not isinstance(error, (str, type(None))):
        raise ValueError("no text")
    if "brings" in said and not _are_numbers(said["brings"]):
        raise ValueError("no numbers")
    return said


def _are_numbers(brings: Any) -> bool:
    if not (isinstance(brings, dict) and len(brings) == 1 and brings.keys() <= WAYS.keys()):
        return False
    (numbers,) = brings.values()
    return isinstance(numbers, list) and all(type(number) is float for number in numbers)


class _Line(socketserver.StreamRequestHandler):
    """The connection of one rank: a line of JSON each way. Whoever speaks otherwise is not a rank and is left alone."""

    def handle(self) -> None:
        board, rank = self.server, None
        assert isinstance(board, Board)
        try:
            rank = self._greeted(board)
            while line := self.rfile.readline(LONGEST):
                said = understood(line)
                if said["rank"] != rank:
                    raise StrangerError("no message of this rank's")
                answer = board.heard(rank, said)
                self.wfile.write(json.dumps(answer).encode() + b"\n")
                board.answered(rank, said["count"][0], answer["together"] is not None)
                if answer["first"]:
                    board.told(rank)
        except (OSError, EOFError, ValueError, StrangerError):
            pass
        finally:
            if rank is not None:
                board.lost(rank)

    def _greeted(self, board: Board) -> int:
        """The rank on the other side, which has shown the token in time."""
        if not board.strangers.acquire(blocking=False):
            raise StrangerError("too many")
        try:
            # A deadline for all of it: somebody may send a byte a second.
            hurry = threading.Timer(SECONDS, self._hang_up)
            hurry.daemon = True
            hurry.start()
            try:
                return board.connected(let_in(self.rfile, self.wfile, board.key))
            finally:
                hurry.cancel()
        finally:
            board.strangers.release()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _are_missing(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} is missing"
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} others" if len(ranks) > 8 else "")
    return f"ranks {shown} are missing"

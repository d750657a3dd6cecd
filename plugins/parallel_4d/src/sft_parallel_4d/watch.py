"""No run hangs: each rank says where it is, and the ranks that are missing are named.

A thread of each rank tells one server, in the first rank whose port paddle leaves free, where its main thread is; the
server answers with the first thing that went wrong anywhere, once there is one, and the rank ends with it. These are
plain sockets, because paddle's store stops all Python threads while it waits for ranks, and cannot say who is missing.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from sft import SftError
from sft_parallel_4d import door
from sft_parallel_4d.board import LONGEST, Board

Place = tuple[int, str, int]
"""Rank of the server, host, port."""
Report = Callable[[str, Sequence[int]], None]
"""It gets a sentence, and the ranks that are gone (:class:`News`)."""


class OtherRankError(SftError):
    """What went wrong in another rank, which the message names; ``gone``: see :class:`News`."""

    def __init__(self, text: str, gone: Sequence[int] = ()) -> None:
        super().__init__(text)
        self.gone = tuple(gone)


def meeting_place(environ: Mapping[str, str]) -> Place:
    """The first endpoint that paddle's launcher reserved and paddle leaves free, from the variables it sets.

    Paddle's own store listens at ``PADDLE_MASTER`` (without it: at the first endpoint).
    """
    endpoints = environ["PADDLE_TRAINER_ENDPOINTS"].split(",")
    master = environ.get("PADDLE_MASTER") or endpoints[0]
    rank = next(rank for rank, endpoint in enumerate(endpoints) if endpoint != master)
    host, _, port = endpoints[rank].rpartition(":")
    return rank, host, int(port)


class Watch:
    """One for each rank; ``enter`` is called as often, and for the same phases, by all ranks.

    ``timeout``: seconds that a rank waits for others. ``report`` is called with one sentence, mostly in the thread of
    the watch, before it ends the process with exit code 1: the main thread may be inside a collective and cannot be
    told. ``place``: see :func:`meeting_place`, which reads it from the environment by default.
    """

    def __init__(self, rank: int, world: int, timeout: float, report: Report, place: Place | None = None) -> None:
        self.rank, self.world, self.timeout, self._report = rank, world, timeout, report
        self._server, self._host, self._port = place or meeting_place(os.environ)
        self._beat = min(timeout / 10, max(0.5, world / 200))  # many ranks ask less often
        self._now: tuple[tuple[int, int], str, float | None] = ((0, 0), "", None)  # replaced whole: the thread reads it
        self._asked = 0
        self._board: Board | None = None
        self._failing = False
        self._stopped = threading.Event()
        self._line, self._ending = threading.Lock(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="sft-watch", daemon=True)

    def start(self) -> None:
        """Meet all other ranks. Raises :class:`OtherRankError`, naming those who have not come after ``timeout``.

        Call it before paddle's own rendezvous, which blocks all threads of Python.
        """
        self.enter("the start")
        if self.rank == self._server:
            self._board = self._serve()
        self._socket = self._connect()
        while True:
            answer = self._ask()
            if answer["first"]:
                self._spread()
                raise OtherRankError(*answer["first"][1:])
            if not answer["absent"]:
                break
            time.sleep(self._beat / 2)
        # Once paddle stops the threads of the server's process, nobody there is answered: each must know before.
        self.enter("the start, where all are")
        self._ask()
        if self._board is not None:
            self._board.wait_for(lambda board: board.all_answered(2), self.timeout)
        self.leave()
        self._thread.start()

    def enter(self, phase: str) -> None:
        """From now on this rank waits for others in ``phase``."""
        self._now = ((self._now[0][0] + 1, 0), phase, time.monotonic())

    def meet(self, numbers: Iterable[float] = (), way: str = "sum") -> list[float]:
        """Wait until all ranks have entered this phase; what the ``numbers`` that each brings come to, one by one
        (:data:`~sft_parallel_4d.board.WAYS`). Where something goes wrong in one, this process ends."""
        brings = {way: [float(number) for number in numbers]}
        while True:
            try:
                answer = self._ask(brings=brings)
            except OtherRankError as error:
                self._end(str(error))
            if answer["first"]:
                self._end(*answer["first"][1:])
            if answer["together"] is not None:
                if self._board is not None:  # this process may now keep all its threads waiting for what others compute
                    self._board.until_answered(self._now[0][0])
                return list(answer["together"])

    def go_on(self) -> None:
        """This rank gets on within its phase; how often, differs from rank to rank."""
        (phases, parts), phase, _ = self._now
        self._now = ((phases, parts + 1), phase, time.monotonic())

    def leave(self) -> None:
        """The others have come; this rank works alone."""
        self._now = (*self._now[:2], None)

    def fail(self, message: str) -> None:
        """This rank ends with an error, and the others with it.

        Where that is the consequence of what happened to another rank, this is reported, and the process ends at once.
        Otherwise it has 30 seconds to end by itself; then the system ends it.
        """
        if not self._thread.is_alive():
            return
        self._failing = True
        try:
            rank, *news = self._ask(error=message[:10_000])["first"]
        except OtherRankError as error:
            self._end(str(error))
        if rank != self.rank:
            self._end(*news)
        signal.alarm(30)  # what paddle tears down at exit may wait for ranks that are no more

    def stop(self) -> None:
        """This rank is done. Raises :class:`OtherRankError` if another failed.

        The rank of the server waits for the others; those who are not done after ``timeout`` are named.
        """
        self.enter("the end")
        self._stopped.set()
        self._thread.join()
        first = self._ask(done=True)["first"]
        if self._board is not None:
            self._board.wait_for(lambda board: board.first or board.all_done(), self.timeout)
            if not self._board.all_done():
                self._board.first = self._board.first or self._board.missing(at_end=True)
                self._spread()
            first = self._board.first
            self._board.close()
        self._file.close()
        self._socket.close()
        if first:
            raise OtherRankError(*first[1:])

    def _serve(self) -> Board:
        deadline = time.monotonic() + min(10.0, self.timeout)
        while True:
            try:
                return self._listen(self._host)
            except OSError as error:  # a connection of another program may have the port for a moment
                if time.monotonic() > deadline:
                    raise SftError(
                        f"The ranks cannot meet at port {self._port} of this machine: {error.strerror}."
                    ) from error
                time.sleep(0.2)

    def _listen(self, host: str) -> Board:
        try:
            return Board(host, self._port, self.world, self.timeout, self._beat, door.token())
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL or not host:
                raise
        return self._listen("")  # the others reach this machine by an address that is none of its own

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                connection = socket.create_connection((self._host, self._port), timeout=5)
                self._greet(connection)
                return connection
            except door.StrangerError as error:
                raise OtherRankError(
                    f"What answers at {self._host}:{self._port} is not rank {self._server} of this run, or has another "
                    f"token; set {door.TOKEN} to the same text for all ranks."
                ) from error
            except (OSError, EOFError) as error:
                if time.monotonic() > deadline:
                    raise OtherRankError(
                        f"rank {self._server} is missing: nothing answers at {self._host}:{self._port} after "
                        f"{self.timeout:g} s ({getattr(error, 'strerror', None) or error or 'it hangs up'})."
                    ) from error
                time.sleep(self._beat / 2)

    def _greet(self, connection: socket.socket) -> None:
        """Show the token, and see that the other side has it."""
        connection.settimeout(door.SECONDS)
        self._file = connection.makefile("rwb")
        try:
            door.enter(self._file, self._file, door.token(), self.rank)
        except BaseException:
            self._file.close()
            connection.close()
            raise
        connection.settimeout(max(self.timeout, 10))

    def _watch(self) -> None:
        while not self._stopped.wait(self._beat):
            try:
                first = self._ask()["first"]
            except OtherRankError as error:
                first = (self._server, str(error))
            if self._failing:
                return
            if first:
                self._end(*first[1:])

    def _ask(self, **more: Any) -> dict[str, Any]:
        """Tell the server where this rank is; its answer: ``first``, a :class:`News` or None, the ``absent`` ranks, and
        what all have brought to the phase, once they have (``together``)."""
        with self._line:
            count, phase, since = self._now
            waited = None if since is None else time.monotonic() - since
            try:
                self._asked += 1
                said = {
                    "rank": self.rank,
                    "count": count,
                    "phase": phase,
                    "waited": waited,
                    "asked": self._asked,
                    **more,
                }
                self._file.write(json.dumps(said).encode() + b"\n")
                self._file.flush()
                answer = dict(json.loads(self._file.readline(LONGEST)))
                while answer["asked"] != self._asked:  # a signal has raised while an earlier one was awaited
                    answer = dict(json.loads(self._file.readline(LONGEST)))
                return answer
            except (OSError, ValueError) as error:
                raise OtherRankError(
                    f"rank {self._server} ended without a word, or cannot be reached any more at "
                    f"{self._host}:{self._port}; was it killed, or out of memory?"
                ) from error

    def _spread(self) -> None:
        """Let the other ranks hear the news before the server ends with this process."""
        if self._board is not None:
            self._board.wait_for(lambda board: board.all_told(), 5 * self._beat)

    def _end(self, text: str, gone: Sequence[int] = ()) -> NoReturn:
        self._ending.acquire()  # of two threads that hear it one speaks
        try:
            self._spread()
            self._report(text, gone)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(1)

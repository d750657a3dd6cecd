"""Conversations encoded by several processes (``dataset_num_proc``): the same tokens, messages and order as by one.

This process reads the records and asks plugins for their formats; the others write conversations down and tokenise
them, a group at a time. They are started as programs of their own, not forked, so that it does not matter which threads
and libraries this process has, and not by ``multiprocessing``, so that the program that calls :func:`sft.run` is not
imported again.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from sft.conversations import Conversation, Turn
from sft.data.bad_records import BadRecord
from sft.data.encoded import Encoded
from sft.data.encoding import Encoding, Group
from sft.data.sources import size_of
from sft.errors import SftError, UsageError
from sft.runtime import physical_cores, processes_of_run

PAYS_OFF = 16 << 20
"""Bytes of data from which several processes are used where nothing is said: a second or two each, to begin with."""
_MOST = 12
"""Processes that this one can keep busy: encoding a record takes about 12 times as long as reading it."""
_PATIENCE = 900.0
"""Seconds in which a group has been encoded, whatever is in it; a process that takes longer has stopped."""
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from sft.data.processes import serve; serve(int(sys.argv[1]))"
)


def processes_for(files: list[Path], wanted: int | None) -> int:
    """How many processes encode ``files``: as many as are ``wanted``, else one where there is little, and one a
    physical core where there is more; processes that share a run share the cores."""
    if wanted is not None:
        return wanted
    return 1 if size_of(files) < PAYS_OFF else max(1, min(_MOST, physical_cores() // processes_of_run()))


@contextmanager
def encoders(number: int) -> Iterator[Callable[[Encoding, Iterator[Group]], Iterator[Encoded]]]:
    """What applies an encoding to groups by ``number`` processes; by this one alone where it is 1."""
    if number == 1:
        yield map
        return
    several = Encoders(number)
    try:
        yield several
    finally:
        several.close()


class Encoders:
    """Up to ``number`` processes, each started when there is a group for it. They end with :meth:`close`, with this
    object, and with this process, however it ends."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._idle: SimpleQueue[_Process | None] = SimpleQueue()
        self._started: list[_Process] = []
        for _ in range(number):
            self._idle.put(None)
        self.close = weakref.finalize(self, _end, self._started)
        """End them all. Safe to call twice."""

    @property
    def processes(self) -> list[int]:
        """The numbers of those that have been started."""
        return [process.number for process in self._started]

    def __call__(self, encoding: Encoding, groups: Iterator[Group]) -> Iterator[Encoded]:
        """What ``encoding`` makes of each group, in order. Of several faults the one is raised that one process, which
        reads a group, encodes it and reads on, would have met first."""
        waiting: deque[Future[Encoded]] = deque()
        fault: Exception | None = None
        with ThreadPoolExecutor(self.number, "sft-encoding") as threads:
            try:
                while True:
                    try:
                        group = next(groups, None)
                    except Exception as error:
                        fault = error
                        break
                    if group is None:
                        break
                    waiting.append(threads.submit(self._encode, encoding, group))
                    if len(waiting) > 2 * self.number:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BaseException:
                self.close()  # those that encode what nobody waits for
                raise
            finally:
                for future in waiting:
                    future.cancel()
        if fault is not None:
            raise fault

    def _encode(self, encoding: Encoding, group: Group) -> Encoded:
        process = self._idle.get()
        try:
            if process is None:
                process = _Process(max(1, physical_cores() // self.number))
                self._started.append(process)
            if not self.close.alive:  # while it started
                process.end()
            return process.encode(encoding, group)
        finally:
            self._idle.put(process)


class _Process:
    def __init__(self, threads: int) -> None:
        own, other = socket.socketpair()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_PATIENCE), 0))
        line = [sys.executable, "-c", _PROGRAM, str(other.fileno()), json.dumps([str(path) for path in sys.path])]
        environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
        try:
            with other:
                self._process = subprocess.Popen(
                    line, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL, env=environment
                )
        except OSError as error:
            raise SftError(
                f"A process that encodes data cannot be started ({error}); give dataset_num_proc 1 to do without."
            ) from error
        self._connection = Connection(own.detach())

    @property
    def number(self) -> int:
        return self._process.pid

    def encode(self, encoding: Encoding, group: Group) -> Encoded:
        plain = [turns if isinstance(turns, BadRecord) else _plain(Conversation.seen(turns)) for turns in group]
        try:
            self._connection.send((pickle.dumps(encoding), plain))
            if not self._connection.poll(_PATIENCE):
                raise BlockingIOError
            answer = self._connection.recv()
        except BlockingIOError as error:
            self.end()
            raise SftError(
                f"A process that encodes data has not answered for {_PATIENCE:g} s; look what has stopped it, or give "
                "dataset_num_proc 1 to encode in one process."
            ) from error
        except (EOFError, OSError) as error:
            code = self._ended()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise SftError(
                f"A process that encodes data has ended by itself ({how}), perhaps for lack of memory; give "
                "dataset_num_proc a lower number, or 1 to encode in one process."
            ) from error
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, Encoded)
        return answer

    def end(self) -> None:
        """Safe to call twice, and beside a thread that waits for an answer: it finds the other end closed. This end is
        closed with this object, when no thread can be reading from it any more."""
        self._process.kill()
        self._ended()

    def _ended(self) -> int:
        """Its exit code, once it has closed its end."""
        try:
            return self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(10)


def _end(processes: list[_Process]) -> None:
    while processes:
        processes.pop().end()


_TEXT = vars(Turn("", ""))


def _plain(conversation: Conversation) -> tuple[Any, ...]:
    """A conversation without its classes, which take longer to send than what is in it."""
    turns = []
    for turn in conversation:
        more = {name: value for name, value in vars(turn).items() if value != _TEXT[name]}
        turns.append((more.pop("role", ""), more.pop("content", ""), more.pop("trains", False), more))
    beside = tuple(map(_plain, conversation.beside))
    return turns, conversation.place, conversation.tools, conversation.weight, beside


def _made(
    turns: list[tuple[str, str, bool, dict[str, Any]]], place: Any, tools: Any, weight: float, beside: Any
) -> Conversation:
    others = [_made(*one) for one in beside]
    return Conversation([Turn(*turn[:3], **turn[3]) for turn in turns], place, tools, weight, others)


def serve(handle: int) -> None:
    """The other side: encode groups that come through the socket ``handle`` until it is closed."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the process that started this one ends it
    connection = Connection(handle)
    sent = b""
    try:
        while True:
            wanted, plain = connection.recv()
            group: Group = [one if isinstance(one, BadRecord) else _made(*one) for one in plain]
            try:
                if wanted != sent:  # a tokenizer takes long to read
                    sent, encoding = wanted, pickle.loads(wanted)
                answer: Encoded | Exception = encoding(group)
            except UsageError as error:
                answer = error
            except MemoryError:
                answer = SftError(
                    "A process that encodes data gets no more memory; give dataset_num_proc a lower number, or 1 to "
                    "encode in one process."
                )
            except Exception as error:
                traceback.print_exc()
                answer = SftError(f"Encoding failed ({type(error).__name__}: {error}).")
            connection.send(answer)
    except (EOFError, OSError):
        pass

"""Signals that ask a run to end, SIGTERM, SIGINT (Ctrl-C) and SIGHUP: it finishes what would be lost, then ends.

While a step is made, or the result is written, the first signal waits until that is done; a second one, and any at
another time, ends the run at once. Either way it ends with :class:`sft.SignalError`.

What must not be left by half where a run ends at once is done in the handler, or waits there, because an exception can
come between any two instructions: also between a ``try`` that has failed and the first line that would put it right.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from sft.errors import SignalError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PATIENCE = 2.0
"""Seconds that the end of a run waits for a line to the user, who may not be reading."""


class Stop:
    """What one run has been asked by signals. ``say`` tells the user a line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._before = ""
        self._ended = 0
        self._closes: Callable[[BaseException], None] = lambda error: None
        self._late: list[int] = []
        self._silent = _thread.allocate_lock()
        """Held while the user is being told that a signal waits."""
        self.waiting = False
        """Whether signals wait for now, until :meth:`whole` or :meth:`heard` ends. To set it is no call: Python looks
        for signals in calls, so none comes between this and what stands before."""
        self.asked = 0
        """The signal that waits until what is under way has been done; 0 if there is none."""

    def waits_for(self, what: str) -> None:
        """From now on the first signal tells the user ``what`` is done before the run ends, and waits; if that is
        empty, it ends the run at once."""
        self._before = what

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within it, in the main thread, signals wait for its end: for a moment in which nothing may come between."""
        if self.waiting or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.waiting = True
        try:
            yield
        finally:
            self._catch_up()

    @contextlib.contextmanager
    def heard(self, closes: Callable[[BaseException], None] = lambda error: None) -> Iterator[None]:
        """Within it signals are heard, if this is the main thread: others cannot. One that the user lets this process
        ignore (as ``nohup`` does), or that has a handler of the user's, is left alone. ``closes`` is called with what
        ends the run at once before that is raised."""
        self._closes = closes
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        usual = (signal.SIG_DFL, signal.default_int_handler)
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in before.items() if handler in usual}
        try:
            for number in before:
                signal.signal(number, self._hear)
            yield
        finally:
            self.waiting = True
            for number, handler in before.items():
                signal.signal(number, handler)
            self._catch_up()
            if self._silent.acquire(timeout=_PATIENCE):  # what the user is told comes before the end
                self._silent.release()

    def instead_of(self, error: BaseException) -> BaseException:
        """What ends the run: ``error``, or the signal that ended it at once. Where that was raised in the midst of
        paddle's code, or of a plugin's, ``error`` is what they have made of it."""
        return SignalError(self._ended) if self._ended and not isinstance(error, SignalError) else error

    def _catch_up(self) -> None:
        """Hear what has come while signals waited."""
        self.waiting = False
        while self._late:
            self._hear(self._late.pop(0), None)

    def _hear(self, number: int, frame: Any) -> None:
        if self.waiting:
            self._late.append(number)
            return
        if self.asked or not self._before:
            self._ended = number
            error = SignalError(number)
            with self.whole():
                self._closes(error)
            raise error
        self.asked = number
        # In a thread: the main one may be in the midst of printing. Not by threading, whose lock it may hold.
        self._silent.acquire()
        _thread.start_new_thread(self._tell, (f"{signal.Signals(number).name}: {self._before}; again to stop at once",))

    def _tell(self, text: str) -> None:
        try:
            self._say(text)
        finally:
            self._silent.release()


def keep_handlers(work: Callable[[], object]) -> None:
    """Do ``work``, after which Python's handlers hear :data:`SIGNALS` again, whatever a library has put there. Those
    that come meanwhile wait."""
    if threading.current_thread() is not threading.main_thread():
        work()
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        work()
    finally:
        for number, handler in before.items():
            if handler is not None:  # one of C, which was there before
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

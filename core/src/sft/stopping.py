"""Signals that ask a run to end, SIGTERM, SIGINT (Ctrl-C) and SIGHUP: it finishes what would be lost, then ends.

While a step is made, or the result is written, the first signal waits until that is done; a second one, and any at
another time, ends the run at once. Either way it ends with :class:`sft.SignalError`.
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


class Stop:
    """What one run has been asked by signals. ``say`` tells the user a line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._before = ""
        self._ended = 0
        self.asked = 0
        """The signal that waits until what is under way has been done; 0 if there is none."""

    def waits_for(self, what: str) -> None:
        """From now on the first signal tells the user ``what`` is done before the run ends, and waits; if that is
        empty, it ends the run at once."""
        self._before = what

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Within it signals are heard, if this is the main thread: others cannot. One that the user lets this process
        ignore (as ``nohup`` does), or that has a handler of the user's, is left alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        usual = (signal.SIG_DFL, signal.default_int_handler)
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in before.items() if handler in usual}
        for number in before:
            signal.signal(number, self._hear)
        try:
            yield
        except BaseException as error:
            if self._ended and not isinstance(error, SignalError):
                raise self.instead_of(error) from error
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def instead_of(self, error: BaseException) -> BaseException:
        """What ends the run: ``error``, or the signal that ended it at once. Where that was raised in the midst of
        paddle's code, or of a plugin's, ``error`` is what they have made of it."""
        return SignalError(self._ended) if self._ended else error

    def _hear(self, number: int, frame: Any) -> None:
        if self.asked or not self._before:
            self._ended = number
            raise SignalError(number)
        self.asked = number
        # In a thread: the main one may be in the midst of printing. Not by threading, whose lock it may hold.
        _thread.start_new_thread(self._say, (f"{signal.Signals(number).name}: {self._before}; again to stop at once",))


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

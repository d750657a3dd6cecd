"""How far long work is: a bar in a terminal, and elsewhere a line now and then. Short work says nothing.

Everything that may take long goes through :meth:`Progress.over` or :meth:`Progress.task`, so that the bars of a
process share one place at the bottom of its terminal, and lines go where the run's other lines go.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

from sft.durations import duration
from sft.foreign_text import one_line
from sft.voice import LEVELS, Printer, Voice, put

T = TypeVar("T")

BAR_AFTER = 1.0
"""Seconds that work has taken before its bar appears in a terminal: what is quicker would only flicker."""
LINE_EVERY = 10.0
"""Seconds between the lines of work that is shown in lines, the first one included."""
LOOK_EVERY = 0.5
"""Seconds between two looks at whether work that does not advance is due to be shown."""


class Shown(Protocol):
    """Work that is going on."""

    def look(self) -> None:
        """Show how far it is, if that is due."""


class Progress:
    """Where a run shows how far it is. ``voice`` gets its lines; bars need one that is a :class:`Printer`, whose stream
    is a terminal, and ``bars``.

    Work shows itself when it advances. So that one long batch is not silent, a thread looks after it too, while there
    is some and lines are printed: a callable of the user's is called by the thread that works alone.
    """

    def __init__(self, voice: Callable[[str], None], bars: bool = True) -> None:
        self.voice = voice
        self.ears: list[Callable[[str], None]] = []
        """What hears each line too, whatever ``voice`` makes of it."""
        self._bars = bars
        self._live: Any = None
        self._shown = 0
        self._open: list[Shown] = []
        self._ended: threading.Event | None = None
        self.lock = threading.RLock()
        """Held by whoever shows something."""

    def say(self, text: str) -> None:
        """Tell the user one line, whatever names are in it."""
        text = one_line(text)
        self.note(text)
        put(self.voice, text)

    def note(self, text: str) -> None:
        """A line for ``ears`` alone: what it says the user sees in another way, such as a bar."""
        for hear in self.ears:
            hear(text)

    def tell(
        self, event: str, values: Mapping[str, Any], text: str | Sequence[str] | None, level: str = "info"
    ) -> None:
        """Say ``text``, a line or several, if there is any; where a run is logged as JSON, the ``event`` with its
        ``values`` instead."""
        said = None
        if text is not None:
            said = "\n".join(map(one_line, [text] if isinstance(text, str) else text))
            self.note(said)
        if isinstance(self.voice, Voice):
            self.voice.event(event, values, said, level)
        elif said is not None:
            put(self.voice, said)

    def relay(self, line: str) -> None:
        """Say a line that another process of this run, with the same settings, has said: it is as they ask already."""
        self.note(line)
        if isinstance(self.voice, Voice):
            self.voice.relay(line)
        else:
            put(self.voice, one_line(line))

    @property
    def level(self) -> str:
        """The least that is said (:data:`sft.voice.LEVELS`)."""
        return self.voice.level if isinstance(self.voice, Voice) else LEVELS[0]

    @property
    def width(self) -> int | None:
        """The columns of the terminal that lines go to; None where they go elsewhere, and stay whole."""
        printer = self._printer
        return None if printer is None else printer.width

    @property
    def _printer(self) -> Printer | None:
        voice = self.voice.say if isinstance(self.voice, Voice) else self.voice
        return voice if isinstance(voice, Printer) else None

    def over(self, items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterator[T]:
        """``items`` one by one, as a task of ``total`` of them (of ``len(items)`` where they have one)."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        with self.task(what, unit, total) as task:
            for item in items:
                yield item
                task.advance()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def task(self, what: str, unit: str, total: float | None = None, of_units: bool = True) -> Iterator[Task]:
        """Work that calls :meth:`Task.advance`; ``what`` and ``unit`` say of what, as "reading train data", "records".
        ``of_units`` is false where the total is of something else than units (bytes of files whose records are
        counted). Ends, and leaves nothing on a terminal, with the block."""
        task = Task(self, what, unit, total, of_units)
        with self.looking_after(task):
            try:
                yield task
            finally:
                task.close()

    @contextmanager
    def looking_after(self, work: Shown) -> Iterator[None]:
        """Within the block ``work`` is looked at from time to time, while nothing else is going on within it."""
        with self.lock:
            self._open.append(work)
            if self._ended is None and self._printer is not None:
                self._ended = threading.Event()
                threading.Thread(target=self._watch, args=(self._ended,), daemon=True).start()
        try:
            yield
        finally:
            with self.lock:
                if work in self._open:  # close() may have come first
                    self._open.remove(work)

    def _watch(self, ended: threading.Event) -> None:
        with suppress(OSError, ValueError):  # the stream is closed: the thread that works meets that too
            while not ended.wait(LOOK_EVERY):
                with self.lock:
                    if ended.is_set():
                        return
                    if not self._open:  # not as soon as there is none: a step may take less time than a thread to begin
                        self._stop_watching()
                    elif self._printer is not None:
                        self._open[-1].look()

    def _stop_watching(self) -> None:
        if self._ended is not None:
            self._ended.set()
            self._ended = None

    @property
    def has_bars(self) -> bool:
        """Whether there is a terminal for bars."""
        dumb = os.environ.get("TERM") in ("dumb", "unknown")
        return self._bars and not dumb and isinstance(self.voice, Printer) and bool(self.voice.file.isatty())

    def show(self, description: str, total: float | None, texts: Sequence[str], began: float) -> int:
        """Open a bar below those that are there, of work that ``began`` then; its number for :meth:`update` and
        :meth:`hide`. The first of ``texts`` says how far the work is, and is shown in any case; the others as far as
        the terminal is wide enough."""
        from sft.bars import Bars

        with self.lock:
            if self._live is None:
                assert isinstance(self.voice, Printer)  # it has bars
                self._live = Bars(self.voice.file)
                self._live.start()
            self._shown += 1
            return int(self._live.add_task(description, total=total, texts=texts, began=began, ends=None))

    def update(self, bar: int, completed: float, texts: Sequence[str], ends: float | None) -> None:
        """Move a bar; ``ends`` is when the work will be done by the clock of :func:`time.monotonic`, None where that is
        not known."""
        with self.lock:
            if self._live is not None:
                self._live.update(bar, completed=completed, texts=texts, ends=ends)

    def hide(self, bar: int) -> None:
        """Take a bar away. The last one that goes leaves the terminal as it was."""
        with self.lock:
            if self._live is None:
                return
            self._live.remove_task(bar)
            self._shown -= 1
            if not self._shown:
                self._stop_bars()

    def keep(self, bar: int) -> None:
        """Leave a bar as it is on the terminal, if it is the only one; those that come open below it. Nobody
        says any more when its work ends."""
        with self.lock:
            if self._live is not None and self._shown == 1:
                self._live.update(bar, ends=None)
                self._live.live.transient = False
                self._stop_bars()
            else:
                self.hide(bar)

    def close(self) -> None:
        """No bars and no lines any more; an error may have left some work open."""
        with self.lock:
            self._open.clear()
            self._stop_watching()
            self._stop_bars()

    def _stop_bars(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live, self._shown = None, 0


class Task:
    """Work that is going on; made by :meth:`Progress.task`."""

    def __init__(self, progress: Progress, what: str, unit: str, total: float | None, of_units: bool) -> None:
        self._progress, self._what, self._unit, self._total, self._of_units = progress, what, unit, total, of_units
        self._began = time.monotonic()
        self._bars = progress.has_bars
        self._bar: int | None = None
        self._count, self._done = 0, 0.0
        self._due = self._began + (BAR_AFTER if self._bars else LINE_EVERY)

    def advance(self, count: int = 1, done: float | None = None) -> None:
        """``count`` more units have been done; ``done`` says where that is on the way to the total, where the total is
        of something else than units."""
        with self._progress.lock:
            self._count += count
            self._done = self._count if done is None else done
            self.look()

    def look(self) -> None:
        """Show how far it is, if that is due."""
        now = time.monotonic()
        if now < self._due:
            return
        if not self._bars:
            self._due = now + LINE_EVERY
            if self._done != self._total:  # what comes after the work says that it is done
                self._say(now)
            return
        self._due = now + 0.1
        texts = self._texts(now)
        if self._bar is None:
            self._bar = self._progress.show(self._what, self._total, texts, self._began)
        left = self._left(now)
        self._progress.update(self._bar, self._done, texts, None if left is None else now + left)

    def close(self) -> None:
        if self._bar is not None:
            self._progress.hide(self._bar)
            self._bar = None

    def _say(self, now: float) -> None:
        left = self._left(now)
        share = min(1.0, self._done / self._total) if self._total else None
        values = {
            "what": self._what,
            "unit": self._unit,
            "done": self._count,
            "total": self._total if self._of_units else None,
            "share": share,
            "seconds": round(now - self._began, 1),
            "seconds_left": left,
        }
        texts = self._texts(now)
        if not self._count:
            texts.append(f"{duration(now - self._began)} so far")
        elif left is not None and share is not None:
            texts += [f"{100 * share:.0f} %", f"{duration(left)} left"]
        self._progress.tell("progress", values, f"{self._what}: {', '.join(texts)}")

    def _texts(self, now: float) -> list[str]:
        of = f" of {self._total:,}" if self._total is not None and self._of_units else ""
        texts = [f"{self._count:,}{of} {self._unit}"]
        if self._count:
            speed = self._count / (now - self._began)
            texts.append(f"{speed:,.{0 if speed >= 10 else 1}f} a second")
        return texts

    def _left(self, now: float) -> float | None:
        """Seconds; None as long as nothing is known."""
        if not self._count or not self._total or not self._done:
            return None
        share = min(1.0, self._done / self._total)
        return (now - self._began) * (1 - share) / share

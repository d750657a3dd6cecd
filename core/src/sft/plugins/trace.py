"""``SFT_TRACE_PLUGINS=1``: each call of a hook, in order, who answered it with what, and how long that took; and sums
at the end of the process. On standard error, so that what commands print stays what it is."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pluggy

VARIABLE = "SFT_TRACE_PLUGINS"
_OFF = ("", "0", "false", "no", "off")


@dataclass
class _Call:
    hook: str
    began: float
    answers: list[str] = field(default_factory=list)


class Trace:
    """Writes a line for each call of a hook; ``write`` gets it."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._open = threading.local()
        self._last, self._more, self._more_seconds = "", 0, 0.0
        self._sums: dict[str, dict[str, tuple[int, float]]] = {}

    def watch(self, manager: pluggy.PluginManager) -> None:
        """Listen to all calls of the hooks of ``manager``, whose plugins are registered."""
        for name, plugin in manager.list_name_plugin():
            for caller in manager.get_hookcallers(plugin) or []:
                for one in caller.get_hookimpls():
                    if one.plugin is plugin:
                        if one.wrapper or one.hookwrapper:
                            continue  # it is around the others, whose time would count twice
                        one.function = self._timed(one.function, name, caller.name)  # type: ignore[misc]
        manager.add_hookcall_monitoring(self._before, self._after)

    def _timed(self, function: Callable[..., Any], plugin: str, hook: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began, said = time.perf_counter(), ""
            try:
                result = function(*args, **kwargs)
                said = "" if result is None else _short(result)
                return result
            except BaseException as error:
                said = f"raises {type(error).__name__}"
                raise
            finally:
                seconds = time.perf_counter() - began
                calls = self._calls()
                if calls:
                    calls[-1].answers.append(f"{plugin}{f': {said}' if said else ''} ({_milliseconds(seconds)})")
                with self._lock:
                    of_plugin = self._sums.setdefault(plugin, {})
                    count, total = of_plugin.get(hook, (0, 0.0))
                    of_plugin[hook] = (count + 1, total + seconds)

        return timed

    def _calls(self) -> list[_Call]:
        """The calls that this thread is in, the innermost last."""
        if not hasattr(self._open, "calls"):
            self._open.calls = []
        return self._open.calls

    def _before(self, hook_name: str, hook_impls: Any, kwargs: Any) -> None:
        self._calls().append(_Call(hook_name, time.perf_counter()))

    def _after(self, outcome: Any, hook_name: str, hook_impls: Any, kwargs: Any) -> None:
        call = self._calls().pop()
        seconds, depth = time.perf_counter() - call.began, len(self._calls())
        around = [f"{one.plugin_name} around it" for one in hook_impls if one.wrapper or one.hookwrapper]
        hook = f"{'  ' * depth}{call.hook}"
        with self._lock:
            if hook == self._last:  # records are many, and each is asked about
                self._more, self._more_seconds = self._more + 1, self._more_seconds + seconds
                return
            self._told()
            self._last = hook
            self._write(f"{hook:<24} {', '.join([*call.answers, *around]) or 'nobody'}")

    def _told(self) -> None:
        """What has not been said of the last hook: that it was called again and again."""
        if self._more:
            calls = _counted(self._more, "more call")
            self._write(f"{self._last:<24} {calls} ({_milliseconds(self._more_seconds)})")
        self._last, self._more, self._more_seconds = "", 0, 0.0

    def end(self) -> None:
        """The sums: what each plugin has taken, the longest first."""
        with self._lock:
            self._told()
            totals = {plugin: sum(seconds for _, seconds in hooks.values()) for plugin, hooks in self._sums.items()}
            for plugin in sorted(totals, key=lambda name: -totals[name]):
                hooks = sorted(self._sums[plugin].items(), key=lambda row: -row[1][1])
                each = "; ".join(
                    f"{hook} {_counted(count, 'call')}, {_milliseconds(seconds)}" for hook, (count, seconds) in hooks
                )
                self._write(f"in all: {plugin} {_milliseconds(totals[plugin])} ({each})")
            self._sums.clear()


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _short(value: Any) -> str:
    """An answer in a word or two."""
    if isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, list):
        return f"list of {len(value):,}"
    return type(value).__name__


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms"


@functools.cache
def _of_process() -> Trace:
    rank = os.environ.get("PADDLE_TRAINER_ID")
    who = f"trace {rank}" if rank is not None else "trace"
    trace = Trace(lambda line: print(f"{who}: {line}", file=sys.stderr, flush=True))
    atexit.register(trace.end)
    return trace


def watch_if_asked(manager: pluggy.PluginManager) -> None:
    """Trace the calls of ``manager``'s hooks if the environment asks for it."""
    if os.environ.get(VARIABLE, "").lower() not in _OFF:
        _of_process().watch(manager)

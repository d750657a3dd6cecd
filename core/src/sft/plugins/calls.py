"""Every call of a plugin's hook: what it raises or returns wrongly is said with the names of plugin and hook.

What a hook may return is the return annotation of its specification, for the hooks that plugins publish too.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import numbers
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Generator
from typing import Any

import pluggy

from sft.control import observing
from sft.errors import PluginError, SftError, TooEarlyError

RAISES: dict[str, tuple[type[BaseException], ...]] = {"sft_record_format": (ValueError,), "sft_launch": (SystemExit,)}
"""Exceptions that a hook is documented to raise, beside those of sft."""
ANSWERS = ("sft_export_adapter", "sft_import_adapter", "sft_adapter_merger")
"""Hooks whose None means nothing: there is no other way of doing what they are asked for."""
COPIED = dict.fromkeys(("sft_step_ended", "sft_evaluated", "sft_metrics", "sft_logged"), "record")
"""Arguments of which each plugin gets a copy of its own: what one does with it is no business of the others."""

EVENTS = (
    *("sft_restore", "sft_run_record", "sft_run_started", "sft_micro_batch", "sft_step_ended", "sft_metrics"),
    *("sft_evaluated", "sft_logged", "sft_state", "sft_checkpoint_saved", "sft_run_ended"),
)
"""Hooks in which an observer's errors are said, and end nothing."""
WATCHING = (*EVENTS, "sft_run_failed", "sft_check", "sft_commands", "sft_memory_advice", "sft_memory_need")
"""Hooks that an observer may implement."""

_CURE = "tell its author, or leave the plugin out"


def guard(manager: pluggy.PluginManager, plugin: Any, who: str, tell: Callable[[str], None]) -> None:
    """Let the hooks of a registered ``plugin`` say whose they are where they go wrong; ``who`` names it. Of an observer
    what goes wrong is only told (``tell``), once for each hook."""
    for caller in manager.get_hookcallers(plugin) or []:
        for implementation in caller.get_hookimpls():
            if implementation.plugin is plugin:
                wraps = implementation.wrapper or implementation.hookwrapper
                arguments = list(implementation.argnames)
                own = arguments.index(COPIED[caller.name]) if COPIED.get(caller.name) in arguments else -1
                function = (_guarded_wrapper if wraps else _guarded)(implementation.function, caller, who, own)
                if getattr(plugin, "observes", False) and caller.name in EVENTS:
                    function = _only_told(function, f"{who} failed in {caller.name}", tell)
                implementation.function = function  # type: ignore[misc]


def _guarded(function: Callable[..., Any], caller: pluggy.HookCaller, who: str, own: int) -> Callable[..., Any]:
    hook, passed, answers = caller.name, _passed(caller.name), caller.name in ANSWERS

    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*_own(args, own), **kwargs)
        except TooEarlyError as error:
            raise failed(error, hook, who) from from_plugin(error)
        except passed:
            raise
        except (Exception, SystemExit) as error:  # an exit would end the run without a word
            raise failed(error, hook, who) from from_plugin(error)
        if (result is not None or answers) and caller.spec is not None:
            wrong = mismatch(result, _expected(caller.spec.function))
            if answers and result is False:
                wrong = "False where True is expected"
            if wrong is not None:
                raise mistaken(wrong, hook, who)
        return result

    return guarded


def _only_told(function: Callable[..., Any], what: str, tell: Callable[[str], None]) -> Callable[..., Any]:
    """An observer's ``function``, which neither ends the run nor asks anything of it; ``what`` says what happens."""
    told = False

    def watching(*args: Any, **kwargs: Any) -> Any:
        nonlocal told
        try:
            with observing():
                return function(*args, **kwargs)
        except KeyboardInterrupt:  # a signal, which is no error of the plugin
            raise
        except SftError as error:  # whatever it was, for the function is guarded
            if not told:
                told = True
                cause = str(error)
                # What is the plugin's fault names plugin and hook already, and says what to do about it.
                clause = (
                    cause.rpartition("; ")[0] if isinstance(error, PluginError) else f"{what} ({cause.rstrip('.')})"
                )
                tell(f"note: {clause}; it only watches, so the run goes on, and this is not said again")
            return None

    return watching


def _guarded_wrapper(function: Callable[..., Any], caller: pluggy.HookCaller, who: str, own: int) -> Callable[..., Any]:
    """Of one that yields where the others' calls are: what these raise goes through it unchanged. It gives what it
    makes of the one answer of a hook that has one."""
    answers = caller.name in ANSWERS

    def guarded(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        try:
            result = yield from function(*_own(args, own), **kwargs)
        except TooEarlyError as error:
            raise failed(error, caller.name, who) from from_plugin(error)
        except _passed(caller.name):
            raise
        except (Exception, SystemExit) as error:
            raise failed(error, caller.name, who) from from_plugin(error)
        if caller.spec is not None and caller.spec.opts.get("firstresult") and (result is not None or answers):
            wrong = mismatch(result, _expected(caller.spec.function))
            if wrong is not None:
                raise mistaken(wrong, caller.name, who)
        return result

    return guarded


def _own(args: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    """``args`` with a copy of the one that is the plugin's own (-1: none is)."""
    return args if index < 0 else (*args[:index], copy.deepcopy(args[index]), *args[index + 1 :])


def _passed(hook: str) -> tuple[type[BaseException], ...]:
    """What a plugin raises for the user, and not because it is broken."""
    return (SftError, *RAISES.get(hook, ()))


def checking(function: Callable[..., Any], expected: Any, what: str, who: str) -> Callable[..., Any]:
    """``function``, which the plugin that is called ``who`` gave as ``what``, so that what goes wrong in it, or comes
    of it that is not as ``expected``, is said with the plugin's name."""

    def called(*args: Any) -> Any:
        try:
            result = function(*args)
        except SftError:
            raise
        except Exception as error:
            raise failed(error, what, who) from from_plugin(error)
        return checked(result, expected, what, who)

    return called


def checked(result: Any, expected: Any, what: str, who: str) -> Any:
    """``result``, with which the plugin that is called ``who`` answers ``what``, if it is as ``expected``."""
    wrong = mismatch(result, expected)
    if wrong is not None:
        raise mistaken(wrong, what, who)
    return result


def mistaken(wrong: str, hook: str, who: str) -> PluginError:
    """What is said of the plugin that is called ``who`` and answers ``hook`` with ``wrong``."""
    return PluginError(f"{who} answers {hook} with {wrong}; correct it there, or leave the plugin out.")


def failed(error: BaseException, hook: str, who: str) -> PluginError:
    """What is said of ``error``, which the plugin that is called ``who`` raised in ``hook``."""
    text = " ".join(str(error).split())
    cause = f"{type(error).__name__}: {text}" if text else type(error).__name__
    machine = isinstance(error, (OSError, MemoryError))  # a full disk, too little memory
    cure = "if the machine is not to blame, tell its author, or leave the plugin out" if machine else _CURE
    return PluginError(f"{who} failed in {hook} ({cause}); {cure}.")


def from_plugin(error: BaseException) -> BaseException:
    """``error`` with the traceback from the plugin's function on."""
    trace = error.__traceback__
    return error.with_traceback(trace.tb_next if trace is not None else None)


# --- what is returned ---------------------------------------------------------------------------------------


@functools.cache
def _expected(specification: Callable[..., Any]) -> Any:
    """The return annotation of a hook's specification; Any where its names mean nothing here."""
    written = getattr(specification, "__annotations__", {}).get("return", Any)
    return _resolved({"return": written}, getattr(specification, "__globals__", {})).get("return", Any)


def annotations_of(function: Callable[..., Any]) -> dict[str, Any]:
    """What arguments and result of a hook are annotated with; empty where a name means nothing here."""
    written = dict(getattr(function, "__annotations__", {}))
    return _resolved(written, getattr(function, "__globals__", {}))


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    """Names and types of a dataclass's fields."""
    written = {field.name: field.type for field in dataclasses.fields(kind)}
    hints = _resolved(written, vars(sys.modules[kind.__module__]))
    return {field.name: hints.get(field.name, Any) for field in dataclasses.fields(kind)}


def _resolved(annotations: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    """What annotations written as text stand for, with what modules import for their types alone."""
    import numpy as np

    from sft import conversations, seams

    carrier = types.SimpleNamespace(__annotations__=annotations)
    known = {"np": np, **vars(conversations), **vars(seams)}
    try:
        return typing.get_type_hints(carrier, {**known, **names})
    except NameError:
        return {}


def mismatch(value: Any, expected: Any) -> str | None:
    """What ``value`` is where something else is ``expected``, as in "a list where a dict is expected"; None if it fits.

    Knows what specifications are annotated with: classes, protocols (by their members), dataclasses (by their fields),
    list, dict, tuple, numbers, unions.
    """
    origin, inner = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any or (expected in (None, type(None)) and value is None):
        return None
    if origin in (typing.Union, types.UnionType):
        wrong = [mismatch(value, kind) for kind in inner]
        return None if None in wrong else wrong[0]
    kind = type(None) if expected is None else origin or expected
    if getattr(kind, "_is_protocol", False):
        return _lacks(value, kind)
    accepted = {float: numbers.Real, int: numbers.Integral}.get(kind, kind)
    if not isinstance(value, accepted) and not (kind is bool and type(value).__name__ == "bool_"):  # numpy's
        return f"{_described(value)} where {_wanted(kind)} is expected"
    return _inside(value, kind, inner)


def _inside(value: Any, kind: Any, inner: tuple[Any, ...]) -> str | None:
    """:func:`mismatch` of what a value of the right kind holds."""
    parts: list[tuple[str, Any, Any]] = []
    if kind is list and inner:
        parts = [("a list with", part, inner[0]) for part in value]
    elif kind is dict and inner:
        parts = [("a dict with the key", key, inner[0]) for key in value]
        parts += [(f"a dict whose {key!r} is", part, inner[1]) for key, part in value.items()]
    elif kind is tuple and inner and inner[-1] is not Ellipsis:
        if len(value) != len(inner):
            return f"a tuple of {len(value)} where {len(inner)} values are expected"
        parts = [("a tuple with", part, of) for part, of in zip(value, inner, strict=True)]
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        fields = _fields(kind)
        parts = [(f"{a_or_an(kind.__name__)} whose {name} is", getattr(value, name), of) for name, of in fields.items()]
    for where, part, of in parts:
        wrong = mismatch(part, of)
        if wrong is not None:
            return f"{where} {wrong}"
    return None


def _lacks(value: Any, protocol: Any) -> str | None:
    # Of its methods: an attribute may be left out where the seam has a default for it.
    members = [name for kind in protocol.__mro__ for name, member in vars(kind).items() if inspect.isfunction(member)]
    names = [name for name in dict.fromkeys(members) if not name.startswith("_")]
    missing = [name for name in names if not hasattr(value, name)]
    if isinstance(value, type) and len(missing) < len(names):
        return f"the class {value.__name__} where an instance of it is expected"
    if missing:
        what = f"{a_or_an(protocol.__name__)} (sft.{protocol.__name__}) is expected"
        return f"{_described(value)} where {what}, and it has no {', '.join(missing)}"
    return None


def _described(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    simple = isinstance(value, (str, int, float, bool))
    return f"{a_or_an(kind)} ({reprlib.repr(value)})" if simple else a_or_an(kind)


def _wanted(kind: type) -> str:
    if kind is type(None):
        return "nothing"
    return "a number" if kind is float else a_or_an(kind.__name__)


def a_or_an(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' or name == 'ndarray' else 'a'} {name}"

"""The plugin API as a number, and the range of it that a plugin says it is written for; docs/api-policy.md is the
promise behind both."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from sft.errors import SftDeprecationWarning, UsageError

API_VERSION = "1.1"
"""MAJOR.MINOR: MINOR rises when something is added, MAJOR when a plugin that is right today could be wrong."""

_MAJOR = int(API_VERSION.partition(".")[0])
_WRITTEN = f">={API_VERSION},<{_MAJOR + 1}"
"""What an author writes today."""
_ENDLESS = "1000000"


def check_version(plugin: Any, who: str) -> None:
    """Refuse a ``plugin`` (``who`` names it) that does not say for which API it is written, or for another one."""
    declared = declared_version(plugin)
    if declared is None:
        raise UsageError(
            f"{who} does not say for which plugin API it is written; add api_version = {_WRITTEN!r} to it, once it "
            "fits docs/plugins.md."
        )
    wrong = fault(declared)
    if wrong is not None:
        raise UsageError(
            f"{who} is not well formed: api_version is {declared!r}, {wrong}; write api_version = {_WRITTEN!r}, once "
            "it fits docs/plugins.md."
        )
    if not fits(declared):
        raise UsageError(
            f"{who} is written for plugin API {declared}, and this sft has {API_VERSION}; install versions of sft-core "
            "and of the plugin that go together."
        )


def fault(declared: Any) -> str | None:
    """What is wrong with a declared range, as a clause; None if it is one."""
    if isinstance(declared, int) and not isinstance(declared, bool):
        return None
    accepts = _specifiers(declared) if isinstance(declared, str) else None
    if accepts is None:
        return "not a range of versions"
    if accepts.contains(_ENDLESS):
        return "a range without an end, which would fit an API that nobody knows yet"
    return None


def fits(declared: int | str) -> bool:
    """Whether this sft's API is in a range that is well formed (:func:`fault`). A number N stands for ``>=N,<N+1``."""
    if isinstance(declared, int):
        return declared == _MAJOR
    return bool(_specifiers(declared).contains(API_VERSION))


def declared_version(plugin: Any) -> Any:
    """What its own code declares: a range inherited from sft, or from a plugin of others, is that of what is installed
    now, and would always fit."""
    if not isinstance(plugin, type):
        return getattr(plugin, "api_version", None)
    for base in plugin.__mro__:
        if "api_version" in vars(base):
            own = base.__module__.partition(".")[0] == plugin.__module__.partition(".")[0]
            return vars(base)["api_version"] if own else None
    return None


def _specifiers(text: str) -> Any:
    """``text`` as pip reads it; None if it is none."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return SpecifierSet(text)
    except InvalidSpecifier:
        return None


@contextlib.contextmanager
def said_once(who: str) -> Iterator[None]:
    """Within it, what pluggy says of hooks that go (``warn_on_impl``) is said once, with the name of the plugin."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SftDeprecationWarning)
        yield
    for one in caught:
        if issubclass(one.category, SftDeprecationWarning):
            deprecated(f"{who}: {one.message}")
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


_WARNED: set[str] = set()


def deprecated(text: str) -> None:
    """Warn, once in this process, that something of the API goes: ``text`` is a sentence that says what, in which
    version, and what to use instead."""
    if text not in _WARNED:
        warnings.warn(text, SftDeprecationWarning, stacklevel=3)
        _WARNED.add(text)

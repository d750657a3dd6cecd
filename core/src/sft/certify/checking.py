"""Checks by name: what each says must hold, whom it asks, and in which cases it is tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sft.certify.lab import Lab

Holds = Callable[["Lab", str], "str | None"]


@dataclass(frozen=True)
class Check:
    """Something that must hold.

    Attributes:
        name: What the report calls it.
        sentence: What must hold.
        holds: Tries one case; raises where it does not hold, and may return what is worth saying where it does.
        asks: Whether the check is about this plugin.
        cases: The cases, by what they are called; one without a name where there is one alone.
    """

    name: str
    sentence: str
    holds: Holds
    asks: Callable[[Lab], bool]
    cases: Callable[[Lab], Iterable[str]]


def _always(lab: Lab) -> bool:
    return True


def _once(lab: Lab) -> Iterable[str]:
    return ("",)


def check(
    sentence: str,
    asks: Callable[[Lab], bool] = _always,
    cases: Callable[[Lab], Iterable[str]] = _once,
) -> Callable[[Holds], Check]:
    """Make a function (lab, case) a :class:`Check` of its own name."""

    def make(function: Holds) -> Check:
        return Check(function.__name__.replace("_", " ").strip(), sentence, function, asks, cases)

    return make

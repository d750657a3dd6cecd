"""The budget on which a chat template writes a text: steps, and characters that are made on the way.

What one step of Python would make or look through is counted before it is done. Nothing asks for the time: a budget is
the same on every machine, in every thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MappingView
from itertools import chain
from typing import Any

from jinja2 import TemplateRuntimeError

STEPS = 1_000_000
"""Steps in which a text is written, for no conversation; the busiest templates take some hundred for each turn."""
STEPS_PER_TURN = 2_000
MADE = 1 << 28
"""Characters that a template may make on the way to a text, thrown away or not, for an empty conversation."""
MADE_PER_CHARACTER = 64
WRITTEN = 1_000_000
"""Characters of the text itself, for an empty conversation."""
WRITTEN_PER_CHARACTER = 16
OPERATION = 64
"""Characters that an output or a sum counts for beside its own, so that it is no step too."""
CELL = 16
"""Characters that a place in a list, which holds something that is there already, counts for."""
DEPTH = 500
"""Lists in lists: much deeper ones overrun the stack of the code in C that goes through them."""
ROWS: Any = (list, tuple, set, frozenset, range, MappingView)


class LimitError(TemplateRuntimeError):
    """A template takes more than a text is worth; the message says what, as the end of a sentence."""


class Budget:
    """What is left for the text that is being written; whoever does something takes from it first."""

    _steps = STEPS
    _made = MADE

    def _grant(self, turns: int, characters: int) -> None:
        """A text begins, for a conversation of so many turns and characters."""
        self._steps = STEPS + STEPS_PER_TURN * turns + characters // CELL
        self._made = MADE + MADE_PER_CHARACTER * characters

    def _step(self, count: int = 1) -> None:
        self._steps -= count
        if self._steps < 0:
            raise LimitError("it takes more steps than a conversation can need")

    def _make(self, characters: int) -> None:
        """So many characters are about to be made."""
        self._made -= characters + OPERATION
        if self._made < 0:
            raise LimitError("it makes texts or lists without measure")

    def _weigh(self, value: Any) -> int:
        """Characters and places in ``value``, which is about to be looked through, all that is in it included: a list
        that has another one twice, and this a third twice, is short and has no end."""
        if isinstance(value, str):
            self._step(1 + (len(value) >> 10))
            return len(value)
        weight, steps, within = 0, 0, [iter((value,))]
        while within:
            for one in within[-1]:
                steps += 1
                if isinstance(one, str):
                    weight += len(one)
                    steps += len(one) >> 10
                elif isinstance(one, Mapping):
                    weight += 2 * CELL * len(one)
                    within.append(chain(one.keys(), one.values()))
                    break
                elif isinstance(one, ROWS):
                    weight += CELL * len(one)
                    within.append(iter(one))
                    break
                else:
                    weight += CELL
            else:
                within.pop()
            if len(within) > DEPTH:
                raise LimitError("it nests lists without end")
            if steps > 1000:
                self._step(steps)
                steps = 0
        self._step(steps)
        return weight

    def _weighed(self, value: Any) -> Any:
        self._weigh(value)
        return value

    def _result(self, value: Any) -> Any:
        if isinstance(value, str):
            self._make(len(value))
        elif isinstance(value, (list, tuple, dict, set, frozenset)):
            self._make(CELL * len(value))
        return value

    def _each(self, values: Iterable[Any], characters: int = 0, steps: int = 1) -> Iterator[Any]:
        """``values``, with so many characters and steps for each of them."""
        for value in values:
            self._made -= characters
            self._steps -= steps
            if self._made < 0 or self._steps < 0:
                raise LimitError("it takes more steps than a conversation can need")
            yield value

    def _all(self, values: Any) -> Any:
        """``values`` in a form that :meth:`_weigh` looks into."""
        is_whole = isinstance(values, (str, Mapping, *ROWS)) or not hasattr(values, "__iter__")
        return values if is_whole else list(self._each(values))

"""Where chat templates run: Jinja's sandbox, in limits of work and memory.

A template comes with a model, so it is a stranger's program. Jinja's sandbox keeps it from the machine; here it is also
kept from taking it up. Each text is written on a budget (``sandbox_budget.py``), and whatever a template can do again
and again takes from it: a turn of a loop, a call, a filter, an operator, an output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce, wraps
from types import BuiltinMethodType, MethodType
from typing import Any, cast

from jinja2 import TemplateError, nodes, pass_context, pass_eval_context
from jinja2.runtime import LoopContext, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace
from markupsafe import Markup

from sft.data.sandbox_budget import CELL, OPERATION, ROWS, WRITTEN, WRITTEN_PER_CHARACTER, Budget, LimitError
from sft.data.sandbox_nodes import Counting

SOURCE = 100_000
"""Characters of a template; the longest of published models have some 30,000."""
NUMBER = 100_000
"""The largest number that says how often or how wide."""
BITS = 1 << 14
"""Bits of the largest whole number that is computed with."""
_WIDE = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*?(?:\d{5}|\*)")
"""In a text for the operator %: a width or a precision of five digits, or one that is an argument."""
_SLOW_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
"""Jinja's for debugging and for web pages, which take more time than their input is long."""
_LAZY = frozenset(("map", "select", "reject", "selectattr", "rejectattr"))
_QUICK = frozenset(("length", "count", "first", "last", "default", "d", "random", "attr", "items", *_LAZY))
"""Filters that look at no more of a value than its beginning or end; of their arguments they may look at all."""
_COMPARING = ("eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan", "ge")
_TESTS = (*_COMPARING, ">=", "in", "upper", "lower", "test", "filter", "odd", "even", "divisibleby")
_DIVIDING = ("test_odd", "test_even", "test_divisibleby")
"""Tests that compute with %."""
_PLAIN = frozenset(("strip", "lstrip", "rstrip", "split", "startswith", "endswith", "lower", "upper", "find"))
"""Methods of texts that make no more than the text is."""
_NUMBERED = frozenset(("batch", "slice", "center", "indent", "truncate"))
"""Filters whose arguments say how often or how wide."""
_REFUSED = frozenset(("encode", "translate", "to_bytes", "from_bytes"))
"""Methods of texts and numbers that no template needs: without them there are no bytes, and no quadratic codecs."""
_ASKED = 1000
"""Attributes of types of which is kept whether a template may have them."""


class Sandbox(Budget, ImmutableSandboxedEnvironment):
    """A Jinja environment in which a template reaches nothing but what it is given, can ``raise_exception``, and ends.

    Compile with :meth:`compiled`, render with :meth:`written`. It is for one thread.
    """

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, **options)
        self._safe: dict[tuple[type, str], bool] = {}
        self.finalize = self._put_out
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = self._fail
        for name in _SLOW_FILTERS:
            self.filters.pop(name, None)
        for name, function in self.filters.items():
            self.limit_filter(name, function)
        for name in _TESTS:
            self.tests[name] = self._limited_test(cast("Callable[..., Any]", self.tests[name]))
        # No template can write these names, which are in the place of what is written otherwise.
        self.filters |= {
            " begun": self._begun,
            " turns": self._turns,
            " weighed": self._weighed,
            " searched": self._searched,
            " slice": self._slice,
            " joined": self._joined,
            " summed": self._summed,
        }

    def limit_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Make ``function`` the filter ``name``."""
        self.filters[name] = self._limited_filter(name, function)

    def compiled(self, source: str) -> Any:
        """The template with the text ``source``. Raises what Jinja raises, and :class:`LimitError`."""
        if len(source) > SOURCE:
            raise LimitError(f"it has {len(source):,} characters, and {SOURCE:,} are the limit")
        self._grant(0, 0)  # constants are computed beforehand
        try:
            return self.from_string(source)
        except (RecursionError, MemoryError) as error:
            raise LimitError("it is nested too deeply, or too long") from error

    def written(self, template: Any, texts: Sequence[str], variables: Mapping[str, Any]) -> str:
        """What ``template`` makes of ``variables``, in which ``texts`` are what a conversation has: the budget grows
        with them. Raises whatever a template may raise, and :class:`LimitError`."""
        length = sum(map(len, texts))
        self._grant(len(texts), length)
        try:
            text = template.render(variables)
        except RecursionError as error:
            raise LimitError("it calls itself without end, or nests lists without end") from error
        if len(text) > WRITTEN + WRITTEN_PER_CHARACTER * length:
            raise LimitError(f"it writes {len(text):,} characters for a conversation of {length:,}")
        return str(text)

    # --- what a template does -------------------------------------------------------------------------------

    def _fail(self, message: Any) -> None:
        raise TemplateError(str(self._weighed(message)))

    def _put_out(self, value: Any) -> Any:
        self._made -= OPERATION + (len(value) if type(value) is str else self._weigh(value))
        if self._made < 0:
            raise LimitError("it makes texts or lists without measure")
        return value

    @pass_context
    def _begun(self, context: Any, nothing: None, characters: int, steps: int) -> None:
        """A body that may run again begins, of so many characters of text and ``steps`` that are not counted singly."""
        self._made -= characters
        self._steps -= steps
        if self._made < 0 or self._steps < 0:
            raise LimitError("it takes more steps than a conversation can need")

    @pass_context
    def _turns(self, context: Any, values: Iterable[Any], characters: int = 0, steps: int = 1) -> Iterator[Any]:
        """``values`` of a loop, each of which is a turn of so many characters of text and steps."""
        return self._each(values, characters, steps)

    def _searched(self, value: Any) -> Any:
        """What something is looked for in; in a table it is not looked through."""
        return value if type(value) is dict else self._weighed(value)

    def _slice(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        self._make(len(value) if isinstance(value, str) else 0)
        return self._result(value[start:stop:step])

    @pass_eval_context
    def _joined(self, eval_ctx: Any, values: list[Any]) -> str:
        self._make(sum(self._weigh(value) for value in values))
        return str(markup_join(values) if eval_ctx.autoescape else str_join(values))

    def _summed(self, values: list[Any]) -> Any:
        """All of ``values``, with + between them."""
        made = OPERATION
        for value in values:
            if type(value) is not str:
                break
            made += len(value)
        else:
            self._made -= made
            if self._made < 0:
                raise LimitError("it makes texts or lists without measure")
            return "".join(values)
        return reduce(lambda left, right: self.call_binop(None, "+", left, right), values)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Found out once for each type and name: Jinja asks a dozen questions, and answers by these alone."""
        found = self._safe.get((type(obj), attr))
        if found is None:
            found = not (attr in _REFUSED and isinstance(obj, (str, int)))
            found = found and super().is_safe_attribute(obj, attr, value)
            if len(self._safe) < _ASKED:
                self._safe[type(obj), attr] = found
        return found

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._step()
        if isinstance(left, int) and isinstance(right, int):
            bits = max(left.bit_length(), right.bit_length())
            if operator == "**" and right > 1:
                bits = left.bit_length() * right
            if bits > BITS:
                raise LimitError("it computes with numbers without measure")
            self._step(bits >> 8)
        elif operator == "+":
            self._make(_size(left) + _size(right))
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    self._make(_size(value) * max(0, times))
        elif operator == "%" and isinstance(left, str):
            self._formats(left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self._step()
        if isinstance(obj, LoopContext):
            return super().call(context, obj, *map(self._each, args), **kwargs)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            if obj.__name__ in _PLAIN:
                self._step(len(owner) >> 10)
            else:
                args = self._method(owner, obj.__name__, *args)
        elif owner is not None or isinstance(obj, type):
            weight = sum(self._weigh(value) for value in (*args, *kwargs.values()) if type(value) is not str)
            if isinstance(owner, ROWS) and not isinstance(owner, type):  # each of these is compared with it
                self._step(len(owner) * (1 + (weight >> 6)))
        return self._result(super().call(context, obj, *args, **kwargs))

    def _method(self, text: str, name: str, *args: Any) -> tuple[Any, ...]:
        """The arguments for a method of ``text``, where there is room for what it makes."""
        self._step(len(text) >> 10)
        if name == "join" and args:
            args = (self._all(args[0]), *args[1:])
            self._make(self._weigh(args[0]) + len(text) * len(args[0]))
        elif name == "replace" and len(args) >= 2:
            self._replaces(text, *args)
        else:
            for value in args:
                self._weigh(value)
                if name in ("ljust", "rjust", "center", "zfill"):
                    self._make(value if isinstance(value, int) else 0)
                elif name == "expandtabs":
                    self._make(len(text) + text.count("\t") * value)
        return args

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format``, which Jinja's sandbox has in its own way; here its widths are held within limits too."""
        if not isinstance(value, (BuiltinMethodType, MethodType)) or super().wrap_str_format(value) is None:
            return None
        text: Any = value.__self__
        formatter = _EscapeFormatter(self, escape=text.escape) if isinstance(text, Markup) else _Formatter(self)
        mapped = value.__name__ == "format_map"

        def written(*args: Any, **kwargs: Any) -> str:
            self._make(len(text) + text.count("{") * (self._weigh(args) + self._weigh(kwargs)))
            return str(type(text)(formatter.vformat(text, () if mapped else args, args[0] if mapped else kwargs)))

        return written

    def _replaces(self, text: Any, old: Any, new: Any, *_: Any) -> None:
        text, old, new = (one if isinstance(one, str) else str(one) for one in (text, old, new))
        self._make(len(text) + text.count(old) * len(new) if new else len(text))

    def _formats(self, text: str, values: Any) -> None:
        if _WIDE.search(text):
            raise LimitError("it writes with a width of five digits, or one that is not plain")
        self._make(len(text) + (1 + text.count("%")) * self._weigh(values))

    # --- filters and tests ----------------------------------------------------------------------------------

    def _limited_test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def tested(*args: Any) -> Any:
            for value in args:
                self._weigh(value)
            if function.__name__ in _DIVIDING and isinstance(args[0], str):
                self._formats(*args[:2], *([2] if len(args) < 2 else []))
            return function(*args)

        return tested

    def _limited_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0
        bound = getattr(self, f"_room_{name}", None)
        is_plain = bound is None and name not in _LAZY

        @wraps(function)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            if is_plain and len(args) == first + 1 and type(args[first]) is str and not kwargs:
                length = len(args[first])
                self._step(2 + (length >> 10))
                self._make(length)
                return self._result(function(*args))
            self._step()
            given = list(args)
            if name in _QUICK:
                for value in (*given[first + 1 :], *kwargs.values()):
                    self._weigh(value)
                if len(given) > first and name in _LAZY:
                    # Of what is lazy itself a list: a chain of many overruns the stack when it is asked for a value.
                    given[first] = self._each(self._all(given[first])) if given[first] else given[first]
            else:
                given[first:] = map(self._all, given[first:])
                values = [*given[first:], *kwargs.values()]
                if name in _NUMBERED:
                    for value in values[1:]:
                        _check_number(value)
                weight = sum(map(self._weigh, values))
                self._make(bound(*given[first:], **kwargs) if bound is not None else weight)
            return self._result(function(*given, **kwargs))

        return filtered

    def _room_center(self, value: Any, width: int = 80) -> int:
        return max(self._weigh(value), width)

    def _room_indent(self, s: Any, width: int | str = 4, *_: Any, **__: Any) -> int:
        lines = 2 + len(str(s).splitlines())
        return self._weigh(s) + lines * (len(width) if isinstance(width, str) else max(0, width))

    def _room_wordcount(self, s: Any) -> int:
        self._step(self._weigh(s))
        return 0

    _room_title = _room_urlencode = _room_wordcount

    def _room_replace(self, s: Any, old: Any, new: Any, count: Any = None) -> int:
        self._replaces(s, old, new)
        return 0

    def _room_format(self, value: Any, *args: Any, **kwargs: Any) -> int:
        self._formats(value if isinstance(value, str) else str(value), args or kwargs)
        return 0

    def _room_join(self, value: Any, d: Any = "", attribute: Any = None) -> int:
        return self._weigh(value) + len(str(d)) * len(value)

    def _room_sum(self, iterable: Any, attribute: Any = None, start: Any = 0) -> int:
        if not isinstance(start, (int, float)):
            raise LimitError("it sums up what are no numbers")
        return self._weigh(iterable)

    def _room_round(self, value: Any, precision: int = 0, method: str = "common") -> int:
        if abs(precision) > 300:
            raise LimitError("it rounds to a place that no number has")
        return 0

    def _room_tojson(
        self, value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, *_: Any, **__: Any
    ) -> int:
        each = len(indent) if isinstance(indent, str) else indent or 0
        return self._weigh(value) * (1 + each + self._weigh(separators or ""))

    # --- the template's own text ----------------------------------------------------------------------------

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Jinja's place for whoever wants other code to be made of a template."""
        return super()._generate(Counting().visit(source), *args, **kwargs)


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"\d{5}", format_spec):
            raise LimitError("it writes with a width of five digits")
        return super().format_field(value, format_spec)


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    pass


class _Namespace(Namespace):
    """What a template sets values on; its text is short, whatever it holds."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return CELL * len(value) if isinstance(value, (list, tuple)) else 0


def _check_number(value: Any) -> None:
    if isinstance(value, int) and abs(value) > NUMBER:
        raise LimitError(f"it asks for something {NUMBER:,} times or more")
